"""Upsampler files: published sizes, both directions, and what is refused."""

import json
import math
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sparse_files

from idlora_jax.config_upsampler import UpsamplerConfig, upsampler_config
from idlora_jax.model import upsampler
from idlora_jax.weights import (
    leaves,
    rules,
    tables,
    tensorfile,
    upsampler_check,
    upsampler_files,
)

CFG = UpsamplerConfig(4, 32, 2, 3, (3, 2), 1, True)
FORMS = {
    "rational": CFG,
    "plain": UpsamplerConfig(4, 32, 1, 3, (2, 1), 1, False),
    "pictures": UpsamplerConfig(4, 32, 1, 2, (2, 1), 1, False),
    "time": UpsamplerConfig(4, 32, 0, 3, (1, 1), 2, False),
}
# Tensors and parameters of the published files.
PUBLISHED = {
    "ltx-2-spatial-upscaler-x2-1.0": (73, 497_867_929),
    "ltx-2.3-spatial-upscaler-x2-1.1": (72, 497_867_904),
}
QUIET = {"say": lambda line: None}


def make(cfg, dtype=np.float32):
    """Random parameters, as numpy."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: upsampler.init(cfg, jax.random.key(0)))
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(dtype), shapes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds an original file in bfloat16 and its conversion."""
    path = tmp_path_factory.mktemp("upsampler")
    params = make(CFG, ml_dtypes.bfloat16)
    upsampler_files.save_upsampler(
        path / "original.safetensors", CFG, params, {"license": "none"}
    )
    made = path / "converted.safetensors"
    assert upsampler_files.convert_upsampler(
        path / "original.safetensors", made, **QUIET
    )
    return path


@pytest.fixture(scope="module")
def original(folder):
    return folder / "original.safetensors"


@pytest.fixture(scope="module")
def converted(folder):
    return folder / "converted.safetensors"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_holds_exactly_the_tensors_of_its_config(name):
    cfg = upsampler_config(sparse_files.config(name))
    shapes = jax.eval_shape(lambda: upsampler.init(cfg, jax.random.key(0)))
    needed = leaves.sources("upsampler", shapes, tables.UPSAMPLER)
    ours = {key: s.torch_shape for s in needed.values() for key in s.keys}
    theirs = {k: tuple(v["shape"]) for k, v in sparse_files.manifest(name).items()}
    assert ours == theirs
    plan = rules.plan(theirs, tables.UPSAMPLER)
    assert set(plan) == set(rules.flatten(shapes, "upsampler"))
    count = sum(math.prod(shape) for shape in ours.values())
    index = json.loads((sparse_files.MANIFESTS / "index.json").read_text())[name]
    assert (len(ours), count) == (index["tensors"], index["params"]) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_of_published_size_is_checked_from_its_header(name, tmp_path):
    path = sparse_files.write(tmp_path / "x.safetensors", name)
    found = upsampler_check.report(path)
    assert found.complete and (found.tensors, found.parameters) == PUBLISHED[name]
    assert found.nbytes == os.path.getsize(path)
    assert "497,867,9" in str(found) and "complete" in str(found)


@pytest.mark.parametrize("form", FORMS)
def test_saving_then_loading_gives_the_same(form, tmp_path):
    cfg, params = FORMS[form], make(FORMS[form])
    upsampler_files.save_upsampler(tmp_path / "x", cfg, params)
    found, loaded = upsampler_files.load_upsampler(tmp_path / "x")
    assert found == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_converted_file_gives_the_same_parameters(original, converted):
    (cfg, want), (same, got) = map(
        upsampler_files.load_upsampler, (original, converted)
    )
    assert cfg == same == CFG
    assert got["conv_in"]["kernel"].dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert tensorfile.verify(converted)


def test_exporting_gives_back_the_original_file_bit_for_bit(
    original, converted, tmp_path
):
    back = tmp_path / "back.safetensors"
    digest = upsampler_files.export_upsampler(converted, back, **QUIET)
    assert back.read_bytes() == original.read_bytes()
    assert digest == tensorfile.header(original).metadata[tensorfile.HASH]


def test_foreign_metadata_comes_back_word_by_word(original, tmp_path):
    odd = {"config": ' {"in_channels":4, "mid_channels": 32}', "license": "ü\n"}
    params = make(upsampler_config(json.loads(odd["config"])))
    needed = leaves.sources("upsampler", params, tables.UPSAMPLER)
    entries = leaves.original_entries(leaves.from_arrays(params, needed), needed)
    tensorfile.write(tmp_path / "a", entries, odd)
    upsampler_files.convert_upsampler(tmp_path / "a", tmp_path / "b", **QUIET)
    upsampler_files.export_upsampler(tmp_path / "b", tmp_path / "c", **QUIET)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_converting_casts_on_demand(original, tmp_path):
    path = tmp_path / "x.safetensors"
    upsampler_files.convert_upsampler(original, path, jnp.float32, **QUIET)
    _, params = upsampler_files.load_upsampler(path)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    _, half = upsampler_files.load_upsampler(path, jnp.bfloat16)
    assert half["norm_in"]["scale"].dtype == jnp.bfloat16


def test_converting_again_says_so_and_changes_nothing(original, converted):
    before, lines = converted.stat().st_mtime_ns, []
    assert not upsampler_files.convert_upsampler(original, converted, say=lines.append)
    assert len(lines) == 1 and "nothing to do" in lines[0]
    assert converted.stat().st_mtime_ns == before


def test_a_destination_with_something_else_is_left_alone(original, converted, tmp_path):
    run, note = upsampler_files.convert_upsampler, tmp_path / "note"
    note.write_text("mine")
    for place in (note, tmp_path, original):
        with pytest.raises(ValueError, match="something else"):
            run(original, place)
    with pytest.raises(ValueError, match="'dtype': 'float32'"):
        run(original, converted, jnp.float32)
    with pytest.raises(ValueError, match="got a converted upsampler"):
        run(converted, tmp_path / "x")
    with pytest.raises(ValueError, match="got an original file"):
        upsampler_files.export_upsampler(original, tmp_path / "x")
    with pytest.raises(ValueError, match="the source itself"):
        upsampler_files.export_upsampler(converted, converted)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_failure_leaves_nothing_behind(original, tmp_path, monkeypatch):
    def failing(out, piece):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(leaves, "copy", failing)
    with pytest.raises(OSError, match="no space left"):
        upsampler_files.convert_upsampler(original, tmp_path / "x", **QUIET)
    assert not any(tmp_path.iterdir())


def rewritten(original, path, tensors=None, **metadata):
    """The file with other tensors (by name; None removes one) or metadata."""
    opened = tensorfile.tensors_of(original)
    arrays = {name: opened.tensor(name) for name in opened.specs} | (tensors or {})
    entries = [tensorfile.entry(k, v) for k, v in arrays.items() if v is not None]
    text = tensorfile.header(original).metadata | metadata
    tensorfile.write(path, entries, {k: v for k, v in text.items() if v is not None})
    return path


def test_missing_unexpected_and_misshapen_tensors_are_all_named(original, tmp_path):
    changes = {
        "final_conv.bias": None,
        "extra": np.zeros(1),
        "initial_norm.weight": np.zeros(3),
    }
    path = rewritten(original, tmp_path / "x", changes)
    found = upsampler_check.report(path)
    assert not found.complete and "INCOMPLETE" in str(found)
    for line in (
        "missing: final_conv.bias",
        "unexpected: extra",
        "wrong shape: initial_norm.weight: got [3], expected [32]",
    ):
        assert line in found.problem
    with pytest.raises(ValueError, match="1 missing, 1 of a wrong shape, 1 unexp"):
        upsampler_files.load_upsampler(path)


def test_a_plain_file_whose_config_says_rational_is_refused(original, tmp_path):
    text = json.loads(tensorfile.header(original).metadata["config"])
    text["rational_resampler"] = False
    path = rewritten(original, tmp_path / "x", config=json.dumps(text))
    with pytest.raises(ValueError, match=r"missing: upsampler\.0\.weight"):
        upsampler_files.load_upsampler(path)


ADAPTER = {"diffusion_model.a.lora_A.weight": np.zeros((2, 2), np.float32)}
KOHYA = {"lora_unet_a.lora_down.weight": np.zeros((2, 2), np.float32)}
BASE = {"model.diffusion_model.patchify_proj.bias": np.zeros(2, np.float32)}
OURS = {"blocks/video/ff/up/bias": np.zeros(2, np.float32)}
OTHERS = {
    "a base checkpoint": (BASE, {"config": '{"transformer": {}}'}),
    "an adapter": (ADAPTER, {}),
    "an adapter (LoRA)": (KOHYA, {"config": "{}"}),
    "the transformer of a converted base": (OURS, {"network": "transformer"}),
    "a file whose metadata has no 'config'": (OURS, {}),
    "a 'config' that is no JSON object": (OURS, {"config": "[" * 99_999}),
}


@pytest.mark.parametrize("got", OTHERS)
def test_something_else_is_called_what_it_is(got, tmp_path):
    tensors, metadata = OTHERS[got]
    path = tmp_path / "x.safetensors"
    entries = [tensorfile.entry(name, array) for name, array in tensors.items()]
    tensorfile.write(path, entries, metadata)
    with pytest.raises(ValueError) as error:
        upsampler_files.load_upsampler(path)
    assert got in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_file_or_folder_is_refused(original, tmp_path):
    run, cut = upsampler_files.load_upsampler, tmp_path / "cut.safetensors"
    cut.write_bytes(original.read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes as its header says"):
        run(cut)
    with pytest.raises(ValueError, match="no such file"):
        run(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"a folder without config\.json"):
        run(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="got a converted base"):
        run(tmp_path)
    bad = rewritten(original, tmp_path / "x", config='{"mid_channels": 33}')
    with pytest.raises(ValueError, match=r"x: upsampler config: mid_channels = 33"):
        run(bad)


def test_a_folder_of_diffusers_must_say_its_class_and_be_whole(original, tmp_path):
    weights = "diffusion_pytorch_model"
    (tmp_path / f"{weights}-00001-of-00002.safetensors").write_bytes(
        original.read_bytes()
    )
    (tmp_path / "config.json").write_text('{"mid_channels": 32}')
    with pytest.raises(ValueError, match="without '_class_name'"):
        upsampler_files.load_upsampler(tmp_path)
    config = {"_class_name": "LTX2LatentUpsamplerModel", "mid_channels": 32}
    config |= {"in_channels": 4, "num_blocks_per_stage": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing: res_blocks\.2"):
        upsampler_files.load_upsampler(tmp_path)

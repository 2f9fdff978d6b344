"""Folders of diffusers, written and opened without torch."""

import json
import shutil

import jax
import numpy as np
import pytest
import small_bases

from idlora_jax.weights import convert, diffusers_folder, io, networks

QUIET = {"say": lambda line: None}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    return small_bases.write(place / "base.safetensors", "2.3")


@pytest.fixture(scope="module")
def folder(file):
    out = file.with_name("exported")
    diffusers_folder.export_diffusers(file, out, limit=300_000, **QUIET)
    return out


def assert_same(path, other, names):
    for name in names:
        got, want = (io.load_network(io.open_base(p), name) for p in (path, other))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_folder_has_shards_an_index_and_the_pipelines_components(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "LTX2Pipeline"
    assert index["vocoder"] == ["ltx2", "LTX2VocoderWithBWE"]
    assert index["text_encoder"] == [None, None]
    inner = folder / "transformer"
    name = "diffusion_pytorch_model.safetensors.index.json"
    shards = set(json.loads((inner / name).read_text())["weight_map"].values())
    assert shards == {p.name for p in inner.glob("*.safetensors")} and len(shards) > 2


def test_a_folder_opens_as_an_original_file(file, folder):
    base = io.open_base(folder)
    assert base.generation == "2.3" and io.names_in(base) == tuple(io.NETWORKS)
    assert not io.unowned(base)
    assert_same(folder, file, io.NETWORKS)
    nets, params = networks.load(folder, ["vocoder"])
    assert nets.vocoder.sample_rate == 48_000 and [*params] == ["vocoder"]


def test_a_folder_converts_and_the_conversion_exports_it_again(folder, tmp_path):
    converted, again = tmp_path / "converted", tmp_path / "again"
    assert convert.convert_base(folder, converted, **QUIET)
    assert not convert.convert_base(folder, converted, **QUIET)
    chosen = ("video_vae", "text_connector")
    diffusers_folder.export_diffusers(converted, again, networks=chosen, **QUIET)
    assert io.names_in(io.open_base(again)) == ("text_connector", "video_vae")
    assert_same(again, folder, chosen)


def test_a_component_alone_is_a_base_with_one_network(folder):
    base = io.open_base(folder / "transformer")
    assert io.names_in(base) == ("transformer",) and base.generation == "2.3"
    assert_same(base.path, folder, ["transformer"])


def copied(folder, tmp_path, component="vae"):
    shutil.copytree(folder / component, tmp_path / component)
    return tmp_path / component


def test_a_config_of_another_model_or_place_is_refused(folder, tmp_path):
    inner = copied(folder, tmp_path)
    config = json.loads((inner / "config.json").read_text())
    for name in ("AutoencoderKLLTXVideo", "LTX2Vocoder"):
        (inner / "config.json").write_text(json.dumps({**config, "_class_name": name}))
        with pytest.raises(ValueError, match=f"class '{name}', expected one of"):
            io.open_base(tmp_path)


def test_a_pipeline_without_components_says_which_are_expected(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"some of \['transformer', 'connectors'"):
        io.open_base(tmp_path)


def test_a_tensor_of_another_class_is_named(folder, tmp_path):
    inner = copied(folder, tmp_path, "connectors")
    path = min(inner.glob("*.safetensors"))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"video_connector.", b"other_connector."))
    for index in inner.glob("*.index.json"):
        index.unlink()
    with pytest.raises(ValueError, match="tensors that an LTX-2 has not"):
        io.names_in(io.open_base(tmp_path))


def test_exporting_refuses_what_it_cannot_do_and_leaves_nothing(file, folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for source, name, message in (
        (folder, "a", "a folder of diffusers"),
        (file, "full", "something else"),
    ):
        with pytest.raises(ValueError, match=message):
            diffusers_folder.export_diffusers(source, tmp_path / name, **QUIET)
    with pytest.raises(ValueError, match="expected also"):
        diffusers_folder.export_diffusers(file, tmp_path / "b", networks=["x"], **QUIET)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_distilled_model_gets_a_scheduler_that_does_not_shift(file, tmp_path):
    options = {"networks": ["vocoder"], "distilled": True, **QUIET}
    diffusers_folder.export_diffusers(file, tmp_path / "d", **options)
    text = (tmp_path / "d" / "scheduler" / "scheduler_config.json").read_text()
    scheduler = json.loads(text)
    assert scheduler["use_dynamic_shifting"] is False
    assert scheduler["shift_terminal"] is None


def test_exporting_again_says_so_and_does_nothing(file, tmp_path):
    out, lines = tmp_path / "d", []
    options = {"networks": ["vocoder"], "say": lines.append}
    diffusers_folder.export_diffusers(file, out, **options)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert diffusers_folder.export_diffusers(file, out, **options) == ("vocoder",)
    assert "already" in lines[-1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
    with pytest.raises(ValueError, match="something else"):
        diffusers_folder.export_diffusers(file, out, distilled=True, **options)

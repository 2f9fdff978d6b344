"""Folders of the text encoder: every layout of transformers, conversion, damage."""

import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_files
from safetensors.numpy import load_file, save_file

from idlora_jax import tiny
from idlora_jax.data import tokenize
from idlora_jax.model import text_encoder
from idlora_jax.weights import io, networks, text_encoder_files
from idlora_jax.weights.text_encoder_files import LAYOUTS, open_text_encoder

PUBLISHED = LAYOUTS[0]
FULL = 11_766_034_176


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return tiny.write_gemma(tmp_path_factory.mktemp("gemma"), 0, ["a caption"])


@pytest.fixture(scope="module")
def run():
    path = pathlib.Path(__file__).parents[2] / "convert" / "text_encoder.py"
    spec = importlib.util.spec_from_file_location("script_text_encoder", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *argv: module.main([str(arg) for arg in argv])


def read(folder, dtype=None):
    return io.read_all(networks.text_encoder_leaves(folder)[1], dtype)


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def others(layout):
    """What some folders hold beside the text tower."""
    vision = "model." if layout == "model.language_model." else ""
    names = ("vision_tower.x.weight", "multi_modal_projector.mm_soft_emb_norm.weight")
    return [vision + name for name in names] + ["lm_head.weight"]


def rewrite(gemma, folder, layout, shards=1):
    """The same folder with other beginnings of its keys, in several files."""
    weights = load_file(gemma / "model.safetensors")
    renamed = {layout + k.removeprefix(PUBLISHED): v for k, v in weights.items()}
    renamed |= {name: np.zeros(2, np.float32) for name in others(layout)}
    names, weight_map = sorted(renamed), {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = {name: renamed[name] for name in names[n::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    shutil.copy(gemma / "config.json", folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_transformers_gives_the_same_parameters(
    gemma, layout, tmp_path
):
    folder = rewrite(gemma, tmp_path, layout, shards=1 + LAYOUTS.index(layout))
    assert_equal(read(folder), read(gemma))
    assert open_text_encoder(folder).ignored == 3


def test_keys_of_two_layouts_in_one_folder_are_refused(gemma, tmp_path):
    weights = load_file(gemma / "model.safetensors")
    twice = {"model.norm.weight": weights[f"{PUBLISHED}norm.weight"]}
    save_file(weights | twice, tmp_path / "model.safetensors")
    shutil.copy(gemma / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"1 unexpected:\n  unexpected: model\.norm"):
        open_text_encoder(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "ignored"), [("gemma-3-12b-it", 439), ("gemma-3-12b-text", 0)]
)
def test_the_published_folders_are_matched_completely(
    run, manifest, ignored, tmp_path, capsys
):
    sparse_files.write(tmp_path / "model.safetensors", manifest)
    config = sparse_files.config("gemma-3-12b-it")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("--check", tmp_path) == 0
    out = capsys.readouterr().out
    assert f"626 tensors {FULL:,} parameters  complete" in out
    assert (f"left out: {ignored} tensors" in out) == bool(ignored)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_keys_have_one_name_each_in_every_layout(layout):
    keys = [k for k in sparse_files.manifest("gemma-3-12b-text")]
    spelled = {layout + key.removeprefix(PUBLISHED): key for key in keys}
    named = text_encoder_files.published_names([*spelled, *others(layout)])
    assert named == {key: theirs for theirs, key in spelled.items()}


def test_a_conversion_loads_as_the_source_does_and_is_made_once(
    run, gemma, tmp_path, capsys
):
    folder = tmp_path / "converted"
    assert run(gemma, folder) == 0 and run(gemma, folder) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert_equal(read(folder), read(gemma))
    loaded, original = (tokenize.load(f) for f in (folder, gemma))
    assert (loaded.pad, loaded.length) == (original.pad, original.length)
    assert run("--check", folder) == 0 and run("--verify", folder) == 0
    out = capsys.readouterr().out
    assert "converted folder" in out and "complete" in out and "every byte" in out
    assert not [p.name for p in tmp_path.iterdir() if p.name != "converted"]


def test_a_conversion_casts_and_another_one_is_refused(run, gemma, tmp_path, capsys):
    assert run(gemma, tmp_path / "half", "--dtype", "f32") == 0
    assert {x.dtype for x in jax.tree.leaves(read(tmp_path / "half"))} == {
        jnp.dtype("float32")
    }
    assert run(gemma, tmp_path / "half") == 1
    assert "another folder" in capsys.readouterr().err
    assert run(tmp_path / "half", tmp_path / "again") == 1
    assert "a converted text encoder" in capsys.readouterr().err


def test_small_shards_are_one_text_encoder(gemma, tmp_path):
    quiet = {"say": lambda line: None}
    folder = tmp_path / "sharded"
    text_encoder_files.convert_text_encoder(gemma, folder, limit=20_000, **quiet)
    assert len([*folder.glob("text_encoder-*.safetensors")]) > 2
    assert_equal(read(folder), read(gemma))
    next(folder.glob("text_encoder-00002*")).unlink()
    with pytest.raises(ValueError, match=r"without \['text_encoder-00002-of"):
        open_text_encoder(folder)


def test_a_changed_byte_is_found(run, gemma, tmp_path, capsys):
    assert run(gemma, tmp_path / "made") == 0
    path = tmp_path / "made" / "text_encoder.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert run("--verify", tmp_path / "made") == 1
    assert run("--verify", gemma) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "other bytes" in errors[0] and "no recorded hashes" in errors[1]


def test_a_pipeline_of_diffusers_holds_the_tokenizer_beside_it(run, gemma, tmp_path):
    inner, tokenizer = tmp_path / "p" / "text_encoder", tmp_path / "p" / "tokenizer"
    for folder in (inner, tokenizer):
        folder.mkdir(parents=True)
    rewrite(gemma, inner, "model.language_model.", shards=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(gemma / name, tokenizer)
    for place in (tmp_path / "p", inner):
        assert_equal(read(place), read(gemma))
        assert tokenize.load(place).length == tiny.TEXT_LENGTH
    assert run(tmp_path / "p", tmp_path / "made") == 0
    assert tokenize.load(tmp_path / "made").length == tiny.TEXT_LENGTH


def test_failures_are_one_message_and_leave_nothing(run, gemma, tmp_path, capsys):
    assert run(tmp_path / "absent", tmp_path / "made") == 1
    assert run("--check", tmp_path) == 1
    for name in ("model.safetensors", "config.json"):
        shutil.copy(gemma / name, tmp_path)
    assert run(tmp_path, tmp_path / "made") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "a folder without config.json" in errors[0]
    assert "no tokenizer.json" in errors[2]
    assert not (tmp_path / "made").exists()
    for usage in ((), ("--check", "a", "b"), ("--check", "a", "--dtype", "f32")):
        with pytest.raises(SystemExit) as end:
            run(*usage)
        assert end.value.code == 2


def test_a_converted_base_is_no_text_encoder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 2, "networks": {}}))
    with pytest.raises(ValueError, match="expected a converted text encoder"):
        open_text_encoder(tmp_path)


TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 5,
    "head_dim": 8,
    "query_pre_attn_scalar": 6,
    "sliding_window": 4,
    "max_position_embeddings": 256,
    "layer_types": [
        f"{kind}_attention" for kind in "sliding full sliding sliding full".split()
    ],
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_local_base_freq": 50.0,
}
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def theirs(kind):
    """A random model of transformers, whole or its text alone."""
    import torch
    import transformers

    torch.manual_seed(3)
    text = transformers.Gemma3TextConfig(**TEXT)
    config = text
    if kind in ("Gemma3ForConditionalGeneration", "Gemma3Model"):
        both = {"text_config": text.to_dict(), "vision_config": VISION}
        config = transformers.Gemma3Config(**both, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of torch and transformers, on import
@pytest.mark.parametrize(
    "kind",
    [
        "Gemma3ForConditionalGeneration",
        "Gemma3Model",
        "Gemma3ForCausalLM",
        "Gemma3TextModel",
    ],
)
def test_states_of_a_saved_model_equal_those_of_transformers(kind, tmp_path):
    import torch

    model = theirs(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    ids = np.random.default_rng(0).integers(1, 96, (3, 17))
    mask = np.arange(17)[None] >= np.array([[0], [5], [16]])
    with torch.no_grad():
        inner = getattr(model, "model", model)
        out = getattr(inner, "language_model", inner)(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            output_hidden_states=True,
        )
    want = np.stack([h.numpy() for h in out.hidden_states])
    file = open_text_encoder(tmp_path)
    assert file.cfg.is_global == (False, True, False, False, True)
    assert (file.cfg.global_rope_factor, file.cfg.local_theta) == (8, 50)
    run = jax.jit(text_encoder.hidden_states, static_argnums=0)
    got = np.asarray(run(file.cfg, read(tmp_path), ids, mask))
    assert got.shape == want.shape and np.all(got[:, ~mask] == 0)
    error = np.abs(got - want)[:, mask].max((1, 2)) / np.abs(want[:, mask]).max((1, 2))
    assert error.max() < 1e-4

"""The networks of a checkpoint, loaded together with the text encoder."""

import json

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

from idlora_jax import config, tiny
from idlora_jax.weights import networks, rules


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return tiny.write_gemma(tmp_path_factory.mktemp("gemma"), 0, ["a caption"])


def test_only_the_named_networks_are_read_and_all_are_described(checkpoint, gemma):
    names = ("transformer", "text_encoder")
    nets, params = networks.load(checkpoint, names, text_encoder_path=gemma)
    assert set(params) == set(names)
    assert nets.transformer == config.tiny() and nets.generation == "2.0"
    assert nets.vocoder.factor == 6 and nets.audio_vae.latent_channels == 2
    assert nets.text_encoder is not None and nets.text_encoder.layers == 6
    assert nets.text_connector.text_states == 7
    assert len(nets.base_hash) == 64
    assert hash(nets) == hash(networks.load(checkpoint, (), text_encoder_path=gemma)[0])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_bfloat16_is_for_all_but_the_tables(checkpoint, gemma):
    names = ("transformer", "text_encoder", "vocoder")
    options = {"text_encoder_path": gemma, "dtype": jnp.bfloat16}
    _, params = networks.load(checkpoint, names, **options)
    for path, leaf in rules.flatten(params).items():
        assert (leaf.dtype == jnp.bfloat16) != path.endswith("table")


def test_without_its_folder_there_is_no_text_encoder(checkpoint):
    nets, params = networks.load(checkpoint, ["vocoder"])
    assert nets.text_encoder is None and list(params) == ["vocoder"]
    with pytest.raises(ValueError, match="gemma-3-12b-it"):
        networks.load(checkpoint, ["text_encoder"])


def test_unknown_names_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"\['vea'\].*text_encoder"):
        networks.load(checkpoint, ["vea", "vocoder"])


def test_a_text_encoder_of_another_size_is_refused(checkpoint, gemma, tmp_path):
    shrunk = tiny.gemma_config()
    shrunk["text_config"]["num_hidden_layers"] = 2
    weights = load_file(gemma / "model.safetensors")
    kept = {
        k: v for k, v in weights.items() if not any(f".{n}." in k for n in range(2, 6))
    }
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(shrunk))
    with pytest.raises(ValueError, match=r"got width 48 and 3 states.*48 and 7"):
        networks.load(checkpoint, (), text_encoder_path=tmp_path)


def test_shards_are_read_together_and_a_missing_one_is_named(
    checkpoint, gemma, tmp_path
):
    weights = load_file(gemma / "model.safetensors")
    vision = {"vision_tower.x": weights["language_model.model.norm.weight"]}
    half = dict(list(weights.items())[::2])
    rest = {k: v for k, v in weights.items() if k not in half} | vision
    for name, part in (("a", half), ("b", rest)):
        save_file(part, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_text((gemma / "config.json").read_text())
    index = {k: "a.safetensors" for k in half} | {k: "b.safetensors" for k in rest}
    text = json.dumps({"weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    options = {"text_encoder_path": tmp_path, "dtype": None}
    _, params = networks.load(checkpoint, ["text_encoder"], **options)
    _, want = networks.load(
        checkpoint, ["text_encoder"], **options | {"text_encoder_path": gemma}
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, want))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without \['b\.safetensors'\]"):
        networks.load(checkpoint, (), text_encoder_path=tmp_path)


def test_folders_that_are_no_text_encoder_are_refused(checkpoint, gemma, tmp_path):
    with pytest.raises(ValueError, match=r"without config\.json"):
        networks.load(checkpoint, (), text_encoder_path=tmp_path)
    weights = load_file(gemma / "model.safetensors")
    save_file({f"model.{k}": v for k, v in weights.items()}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text((gemma / "config.json").read_text())
    with pytest.raises(ValueError, match=r"missing: language_model\.model\.embed"):
        networks.load(checkpoint, (), text_encoder_path=tmp_path)

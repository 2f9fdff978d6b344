"""LoRA files: the ComfyUI key format in and out, and refusals."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from idlora_jax import adapters, config
from idlora_jax.weights import adapter_files, io, lora
from idlora_jax.weights.rules import KeyMismatchError

CFG = config.tiny()
LAYERS = CFG.layers
QUERY = "diffusion_model.transformer_blocks.{}.audio_attn1.to_q.lora_{}.weight"


@functools.cache
def base():
    return io.shapes_of("transformer", CFG)


@functools.cache
def tensors(rank=3):
    made = adapters.init(jax.random.key(0), base(), rank)
    rng = np.random.default_rng(0)
    filled = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), made)
    return lora.export(filled)


def query(layer=0, rank=3, wide=32, out=32):
    a, b = np.ones((rank, wide), np.float32), np.ones((out, rank), np.float32)
    return {QUERY.format(layer, "A"): a, QUERY.format(layer, "B"): b}


def test_an_exported_adapter_is_imported_bit_for_bit():
    again = lora.export(lora.import_(tensors(), base()))
    assert again.keys() == tensors().keys()
    for key, tensor in tensors().items():
        np.testing.assert_array_equal(again[key], tensor)


def test_keys_and_axes_are_those_of_the_reference_trainer():
    found = tensors()
    assert len(found) == 2 * 18 * LAYERS
    modules = {k.split(".", 3)[3].rsplit(".lora_", 1)[0] for k in found}
    attentions = ("audio_attn1", "audio_attn2", "audio_to_video_attn")
    attentions += ("video_to_audio_attn",)
    parts = ("to_q", "to_k", "to_v", "to_out.0")
    assert modules == {f"{a}.{p}" for a in attentions for p in parts} | {
        "audio_ff.net.0.proj",
        "audio_ff.net.2",
    }
    key = "diffusion_model.transformer_blocks.2.audio_to_video_attn.to_q.lora_{}.weight"
    assert found[key.format("A")].shape == (3, 64)
    assert found[key.format("B")].shape == (32, 3)


def test_the_change_of_a_kernel_is_the_transpose_of_b_times_a():
    pair = lora.import_(tensors(), base())["blocks"]["audio"]["self_attn"]["q"]
    a, b = (tensors()[QUERY.format(1, side)] for side in "AB")
    ours = pair["kernel"]["a"][1] @ pair["kernel"]["b"][1]
    np.testing.assert_allclose(ours, (b @ a).T, rtol=1e-5)


def test_export_casts_when_asked():
    cast = lora.export(lora.import_(tensors(), base()), np.dtype(ml_dtypes.bfloat16))
    assert {t.dtype.name for t in cast.values()} == {"bfloat16"}


def test_layers_that_a_file_leaves_out_change_nothing():
    adapter = lora.import_(query(layer=2), base())
    pair = adapter["blocks"]["audio"]["self_attn"]["q"]["kernel"]
    assert pair["a"].shape == (LAYERS, 32, 3) and pair["b"].shape == (LAYERS, 3, 32)
    change = np.abs(pair["a"] @ pair["b"]).max((1, 2))
    np.testing.assert_array_equal(change > 0, np.arange(LAYERS) == 2)


def test_unknown_keys_are_named():
    extra = {"diffusion_model.other.lora_A.weight": np.zeros((3, 4), np.float32)}
    with pytest.raises(KeyMismatchError, match=r"diffusion_model\.other\.lora_A"):
        lora.import_(tensors() | extra, base())


def test_a_key_format_that_is_not_comfyui_s_is_refused_with_the_expected_one():
    foreign = {f"base_model.{k}": v for k, v in query().items()}
    with pytest.raises(KeyMismatchError, match=r"diffusion_model\.<module>"):
        lora.import_(foreign, base())


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_lonely_half_of_a_pair_is_named(side):
    lonely = {k: v for k, v in query().items() if k == QUERY.format(0, side)}
    with pytest.raises(ValueError, match=r"only one of lora_A and lora_B.*to_q"):
        lora.import_(query(layer=1) | lonely, base())


def test_another_width_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"got a \[4, 48, 3\].*expected a \[4, 32"):
        lora.import_(query(wide=48), base())


def test_a_layer_beyond_the_depth_is_refused():
    with pytest.raises(ValueError, match="got layer 9"):
        lora.import_(query(layer=9), base())


def test_an_empty_file_is_refused():
    with pytest.raises(ValueError, match="no tensors"):
        lora.import_({}, base())


def test_compare_counts_what_fits():
    odd = query(wide=48) | {"diffusion_model.other.lora_A.weight": np.zeros((3, 4))}
    odd |= query(layer=9)
    report = adapter_files.compare(tensors() | odd, base())
    assert report.wrong_shape == (QUERY.format(0, "A"),)
    assert set(report.unmatched) == {*query(layer=9), *odd} - {*query(layer=0)}
    assert len(report.matched) == len(tensors()) - 1
    assert str(report).startswith(f"{len(tensors()) - 1} keys matched, 3 unmatched, 1")


def test_compare_knows_a_module_that_this_generation_lacks():
    shapes = {"blocks": {"audio": {"ff": base()["blocks"]["audio"]["ff"]}}}
    report = adapter_files.compare(tensors(), shapes)
    assert len(report.matched) == 4 * LAYERS
    assert len(report.unmatched) == len(tensors()) - 4 * LAYERS


def test_folding_scales_each_change_by_strength_and_alpha_over_its_own_rank():
    adapter = {"x": {"a": jnp.ones((5, 2)), "b": jnp.ones((2, 5))}}
    adapter["y"] = {"a": jnp.ones((5, 4)), "b": jnp.ones((4, 5))}
    folded = adapter_files.fold(adapter, 0.5, 8.0)
    assert float(folded["x"]["b"][0, 0]) == 2.0 and float(folded["y"]["b"][0, 0]) == 1.0
    np.testing.assert_array_equal(folded["x"]["a"], adapter["x"]["a"])

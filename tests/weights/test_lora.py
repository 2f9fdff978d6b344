"""LoRA tensors and adapters: stacking, taking apart, and refusals."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from idlora_jax import adapters, config
from idlora_jax.weights import io, lora
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


def test_a_prefix_of_no_tool_is_refused_with_the_nearest_name():
    foreign = {f"base_modal.{k}": v for k, v in query().items()}
    nearest = r"the nearest is base_model\.model\.diffusion_model"
    with pytest.raises(KeyMismatchError, match=nearest):
        lora.import_(foreign, base())


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_lonely_half_of_a_pair_is_named(side):
    lonely = {k: v for k, v in query().items() if k == QUERY.format(0, side)}
    with pytest.raises(ValueError, match=r"only one of lora_A and lora_B.*to_q"):
        lora.import_(query(layer=1) | lonely, base())


def test_another_width_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"got \[3, 48\], expected \[3, 32\]"):
        lora.import_(query(wide=48), base())


def test_a_layer_beyond_the_depth_is_refused():
    with pytest.raises(ValueError, match="layer 9 of a base of 4 layers"):
        lora.import_(query(layer=9), base())


def test_an_empty_file_is_refused():
    with pytest.raises(ValueError, match="no tensors"):
        lora.import_({}, base())


def test_ranks_and_layers_that_a_file_leaves_out_are_left_out_again():
    tensors = query(layer=0, rank=2) | query(layer=2, rank=5)
    adapter = lora.import_(tensors, base())
    pair = adapter["blocks"]["audio"]["self_attn"]["q"]["kernel"]
    assert pair["a"].shape == (LAYERS, 32, 5)
    again = lora.export(adapter)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor)


def test_an_untrained_adapter_keeps_its_zero_half():
    made = adapters.init(jax.random.key(0), base(), 2)
    assert len(lora.export(made)) == 2 * 18 * LAYERS
    nothing = jax.tree.map(np.zeros_like, made)
    assert len(lora.export(nothing)) == 2 * 18 * LAYERS


def test_layers_of_several_dtypes_take_the_widest():
    narrow = {k: v.astype(ml_dtypes.bfloat16) for k, v in query(layer=1).items()}
    for tensors in (query(layer=0) | narrow, narrow | query(layer=0)):
        adapter = lora.import_(tensors, base())
        assert {x.dtype.name for x in jax.tree.leaves(adapter)} == {"float32"}
        assert lora.export(adapter).keys() == tensors.keys()


def test_alpha_over_rank_is_folded_into_b():
    alpha = {QUERY.format(0, "A").replace("lora_A.weight", "alpha"): np.float32(6)}
    pair = lora.import_(query() | alpha, base())["blocks"]["audio"]["self_attn"]["q"]
    np.testing.assert_array_equal(pair["kernel"]["b"][0], np.full((3, 32), 2.0))
    np.testing.assert_array_equal(pair["kernel"]["a"][0], np.ones((32, 3)))


def test_a_pair_of_two_ranks_is_not_written():
    wrong = {"a": np.ones((LAYERS, 32, 2)), "b": np.ones((LAYERS, 3, 32))}
    adapter = {"blocks": {"audio": {"self_attn": {"q": {"kernel": wrong}}}}}
    with pytest.raises(ValueError, match=r"got a \[4, 32, 2\], b \[4, 3, 32\]"):
        lora.export(adapter)
    unknown = {"nose": {"kernel": wrong}}
    with pytest.raises(KeyMismatchError, match="transformer/nose/kernel"):
        lora.export(unknown)

"""Features and connectors of both generations: padding, registers, batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.config_text import text_connector_config
from idlora_jax.model import text_connector
from idlora_jax.types import AV
from idlora_jax.weights import rules, tables

COMMON = {
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 8,
    "connector_num_layers": 2,
    "connector_num_learnable_registers": 4,
    "connector_positional_embedding_max_pos": [64],
    "rope_type": "split",
    "frequencies_precision": "float64",
}
V23 = COMMON | {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "connector_apply_gated_attention": True,
    "audio_connector_attention_head_dim": 4,
    "audio_connector_num_layers": 3,
}
BOTH = {
    section: text_connector_config({"transformer": keys}, text_width=16, text_states=3)
    for section, keys in {"2.0": COMMON, "2.3": V23}.items()
}
HIDDEN = np.random.default_rng(0).normal(size=(3, 3, 8, 16)).astype(np.float32)
COUNTS = np.array([8, 5, 1])
MASK = np.arange(8)[None] >= 8 - COUNTS[:, None]

generations = pytest.mark.parametrize("generation", BOTH)


FEATURES = jax.jit(text_connector.features, static_argnums=0)
CONNECT = jax.jit(
    text_connector.connect, static_argnums=0, static_argnames=("numerics",)
)


@functools.cache
def weights(generation):
    """Random everywhere; `init` itself is slow to compile."""
    cfg = BOTH[generation]
    shapes = jax.eval_shape(lambda k: text_connector.init(cfg, k), jax.random.key(0))
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda s: draw(0, 0.3, s.shape).astype(np.float32), shapes)


def run(generation, hidden=HIDDEN, mask=MASK, params=None):
    cfg = BOTH[generation]
    params = weights(generation) if params is None else params
    found = FEATURES(cfg, params, hidden, mask)
    return found, CONNECT(cfg, params, found, mask)


@generations
def test_every_output_token_is_valid_and_normalised(generation):
    cfg = BOTH[generation]
    _, prompt = run(generation)
    assert prompt.mask is None
    assert prompt.video.shape == (3, 8, cfg.video.width)
    assert prompt.audio.shape == (3, 8, cfg.audio.width)
    np.testing.assert_allclose((prompt.video**2).mean(-1), 1, rtol=1e-4)


def test_registers_fill_exactly_the_padding():
    x = jnp.arange(1.0, 7.0).reshape(1, 6, 1) * jnp.ones((2, 1, 1))
    valid = jnp.array([[0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1]], bool)
    registers = jnp.array([[-1.0], [-2.0], [-3.0]])
    got = text_connector.fill_padding(x, valid, registers)[..., 0]
    assert got.tolist() == [[5, 6, -3, -1, -2, -3], [1, 2, 3, 4, 5, 6]]


@generations
def test_a_prompt_without_padding_ignores_the_registers(generation):
    other = jax.tree.map(lambda w: w, weights(generation))
    for name in AV._fields:
        other[name]["registers"] = other[name]["registers"] + 1.0
    _, before = run(generation)
    _, after = run(generation, params=other)
    np.testing.assert_array_equal(before.video[0], after.video[0])
    assert np.abs(before.audio[1] - after.audio[1]).max() > 1e-3


@generations
def test_a_batch_equals_its_samples_one_by_one(generation):
    found, prompt = run(generation)
    for n in range(3):
        one = slice(n, n + 1)
        own, single = run(generation, HIDDEN[:, one], MASK[one])
        for batch, alone in zip(
            (*found, *prompt[:2]), (*own, *single[:2]), strict=True
        ):
            np.testing.assert_allclose(batch[one], alone, atol=2e-5)


@generations
@pytest.mark.parametrize("content", [7.0, np.nan])
def test_the_content_of_padding_is_irrelevant(generation, content):
    filled = np.where(MASK[None, ..., None], HIDDEN, content).astype(np.float32)
    (found, prompt), (other, same) = run(generation), run(generation, filled)
    for a, b in zip((*found, *prompt[:2]), (*other, *same[:2]), strict=True):
        np.testing.assert_array_equal(a, b)


@generations
def test_stored_features_may_hold_anything_in_their_padding(generation):
    cfg = BOTH[generation]
    found, prompt = run(generation)
    spoilt = AV(*(jnp.where(MASK[..., None], x, jnp.nan) for x in found))
    again = CONNECT(cfg, weights(generation), spoilt, MASK)
    np.testing.assert_array_equal(prompt.video, again.video)
    np.testing.assert_array_equal(prompt.audio, again.audio)


def test_range_features_forget_scale_and_offset_of_each_state():
    change = np.array([3.0, 0.5, 20.0], np.float32)[:, None, None, None]
    found, _ = run("2.0")
    other, _ = run("2.0", HIDDEN * change + 2 * change)
    np.testing.assert_allclose(found.video, other.video, atol=1e-4)
    np.testing.assert_array_equal(found.video, found.audio)


def test_range_normalisation_spans_eight_around_a_zero_mean():
    y = text_connector.normalise_range(jnp.asarray(HIDDEN), jnp.asarray(MASK))
    y = np.asarray(y)
    for n, count in enumerate(COUNTS):
        rows = y[:, n, 8 - count :]
        np.testing.assert_allclose(rows.mean((1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(np.ptp(rows, axis=(1, 2)), 8, rtol=1e-5)


def test_rms_features_forget_the_scale_of_each_token_and_state():
    scale = np.random.default_rng(1).uniform(0.5, 9, (3, 3, 8, 1)).astype(np.float32)
    found, _ = run("2.3")
    other, _ = run("2.3", HIDDEN * scale)
    np.testing.assert_allclose(found.video, other.video, atol=1e-4)
    assert found.audio.shape == (3, 8, 8)


def test_flattened_features_run_over_states_fastest():
    cfg = BOTH["2.0"]
    kernel = np.zeros((16 * 3, 16), np.float32)
    kernel[5 * 3 + 2, 0] = 1.0  # channel 5 of state 2
    params = {"projection": {"shared": {"kernel": kernel}}}
    got = FEATURES(cfg, params, HIDDEN, MASK).video[..., 0]
    want = text_connector.normalise_range(jnp.asarray(HIDDEN), jnp.asarray(MASK))
    np.testing.assert_allclose(got, np.where(MASK, want[2, :, :, 5], 0), rtol=1e-5)


@generations
def test_bfloat16_states_give_a_bfloat16_prompt(generation):
    low = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), weights(generation))
    _, prompt = run(generation, jnp.asarray(HIDDEN, jnp.bfloat16), params=low)
    assert prompt.video.dtype == prompt.audio.dtype == jnp.bfloat16
    _, exact = run(generation)
    assert np.abs(prompt.video.astype(jnp.float32) - exact.video).max() < 0.2


def test_a_missing_modality_stays_missing():
    found, prompt = run("2.3")
    only = CONNECT(BOTH["2.3"], weights("2.3"), AV(found.video, None), MASK)
    assert only.audio is None
    np.testing.assert_array_equal(only.video, prompt.video)


def test_states_of_another_text_encoder_are_refused():
    with pytest.raises(ValueError, match="got 2 states of width 16, expected 3"):
        run("2.0", HIDDEN[:2])


@generations
def test_numerics_modes_agree_where_the_checkpoint_asks_for_float64(generation):
    found, exact = run(generation)
    args = (BOTH[generation], weights(generation), found, MASK)
    same = CONNECT(*args, numerics="reference")
    np.testing.assert_array_equal(exact.video, same.video)


def test_fresh_connectors_start_with_registers_between_minus_one_and_one():
    cfg = BOTH["2.0"]
    params = jax.jit(text_connector.init, static_argnums=0)(cfg, jax.random.key(0))
    _, prompt = run("2.0", params=params)
    assert np.isfinite(prompt.video).all()
    registers = np.abs(params["audio"]["registers"])
    assert 0.5 < registers.max() <= 1.0


@generations
def test_weights_survive_export_and_import(generation):
    params = {"text_connector": weights(generation)}
    exported = rules.export(params, tables.TEXT_CONNECTOR)
    back = rules.import_(exported, tables.TEXT_CONNECTOR)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("section", "parameters"),
    [
        ({}, 722_534_400 + 2 * 354_470_400),
        (
            V23
            | {
                "connector_num_attention_heads": 32,
                "connector_attention_head_dim": 128,
                "connector_num_layers": 8,
                "connector_num_learnable_registers": 128,
                "audio_connector_attention_head_dim": 64,
                "audio_connector_num_layers": 8,
            },
            1_156_061_184 + 1_612_546_304 + 403_620_096,
        ),
    ],
)
def test_the_full_size_has_the_published_number_of_parameters(section, parameters):
    cfg = text_connector_config({"transformer": section})
    params = jax.eval_shape(lambda k: text_connector.init(cfg, k), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters

"""The Gemma tower: what each token can and cannot depend on; agreement; size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.config_text import TextEncoderConfig, text_encoder_config
from idlora_jax.model import text_encoder
from idlora_jax.weights import rules, tables

SECTION = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "query_pre_attn_scalar": 5,
    "rope_local_base_freq": 50.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 3,
    "sliding_window_pattern": 2,
}
CFG = text_encoder_config(SECTION)
IDS = np.random.default_rng(0).integers(1, 40, (2, 9))
MASK = np.arange(9)[None] >= np.array([[0], [4]])


RUN = jax.jit(text_encoder.hidden_states, static_argnums=0)


@functools.cache
def weights(cfg: TextEncoderConfig):
    """Random everywhere, the norms' scales too; `init` itself is slow to compile."""
    shapes = jax.eval_shape(lambda k: text_encoder.init(cfg, k), jax.random.key(0))
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda s: draw(0, 0.3, s.shape).astype(np.float32), shapes)


def states(ids, mask=MASK, cfg: TextEncoderConfig = CFG):
    return np.asarray(RUN(cfg, weights(cfg), ids, mask))


def changed(ids: np.ndarray, column: int) -> np.ndarray:
    ids = ids.copy()
    ids[:, column] = (ids[:, column] + 7) % 40
    return ids


def test_states_are_scaled_embeddings_then_layers_and_padding_is_zero():
    got = states(IDS)
    assert got.shape == (CFG.layers + 1, 2, 9, 16)
    table = weights(CFG)["embed"]["embedding"]
    np.testing.assert_allclose(got[0][MASK], 4 * table[IDS][MASK], rtol=1e-6)
    assert np.all(got[:, ~MASK] == 0) and np.all(np.abs(got[:, MASK]).max(-1) > 0)
    plain = got[-1][MASK] / (1 + weights(CFG)["norm"]["scale"])
    np.testing.assert_allclose((plain**2).mean(-1), 1, rtol=1e-3)


def test_a_fresh_tower_normalises_its_last_state_to_one():
    cfg = dataclasses.replace(CFG, is_global=(True,))
    params = jax.jit(text_encoder.init, static_argnums=0)(cfg, jax.random.key(0))
    got = np.asarray(RUN(cfg, params, IDS, MASK))
    np.testing.assert_allclose((got[-1][MASK] ** 2).mean(-1), 1, rtol=1e-2)


def test_padded_ids_change_nothing():
    other = np.where(MASK, IDS, (IDS + 3) % 40)
    np.testing.assert_array_equal(states(IDS), states(other))


def test_an_integer_mask_equals_a_boolean_one():
    np.testing.assert_array_equal(states(IDS), states(IDS, MASK.astype(np.int64)))


def test_a_later_token_leaves_earlier_states_unchanged():
    before, after = states(IDS), states(changed(IDS, 6))
    np.testing.assert_array_equal(before[:, :, :6], after[:, :, :6])
    assert np.all(np.abs(before - after)[1:, :, 6:].max((0, 3)) > 1e-6)


@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_local_layer_sees_exactly_its_window(window: int):
    cfg = dataclasses.replace(CFG, is_global=(False,), window=window)
    full = np.ones_like(MASK)
    difference = np.abs(states(IDS, full, cfg) - states(changed(IDS, 2), full, cfg))
    touched = difference[1].max((0, 2)) > 1e-7
    np.testing.assert_array_equal(touched, (np.arange(9) - 2) % 9 < window)


def test_a_global_layer_sees_beyond_the_window():
    cfg = dataclasses.replace(CFG, is_global=(True,))
    difference = np.abs(states(IDS, cfg=cfg) - states(changed(IDS, 0), cfg=cfg))
    assert difference[1, 0, 8].max() > 1e-7


def test_local_and_global_layers_rotate_differently():
    far = dataclasses.replace(CFG, window=99, is_global=(True,) * 4)
    near = dataclasses.replace(far, is_global=(False,) * 4)
    assert np.abs(states(IDS, cfg=far) - states(IDS, cfg=near)).max() > 1e-4
    same = dataclasses.replace(
        near, local_theta=far.global_theta, local_rope_factor=far.global_rope_factor
    )
    np.testing.assert_array_equal(states(IDS, cfg=far), states(IDS, cfg=same))


def test_rotations_keep_the_norm_and_depend_on_distance_only():
    table = text_encoder.rope_table(6, 8, 50.0, 2.0)
    np.testing.assert_allclose(table[:, 2, 0], [np.cos(1.0), np.sin(1.0)], rtol=1e-6)
    x = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))
    rows, table = jnp.repeat(x, 6, axis=2), jnp.asarray(table)
    q, k = (text_encoder.rotate(a, table) for a in rows)
    np.testing.assert_allclose((q**2).sum(-1), (rows[0] ** 2).sum(-1), rtol=1e-5)
    score = jnp.einsum("bqnk,bsnk->qs", q, k)
    np.testing.assert_allclose(score[1:, 1:], score[:-1, :-1], rtol=1e-4, atol=1e-5)


def test_a_prompt_does_not_retrace():
    traces = []

    @jax.jit
    def run(params, ids, mask):
        traces.append(ids.shape)
        return text_encoder.hidden_states(CFG, params, ids, mask)

    params = weights(CFG)
    run(params, IDS, MASK)
    run(params, changed(IDS, 3), ~MASK)
    assert len(traces) == 1


def test_bfloat16_weights_give_bfloat16_states_near_the_float32_ones():
    low = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), weights(CFG))
    got, want = RUN(CFG, low, IDS, MASK), states(IDS)
    assert got.dtype == jnp.bfloat16
    assert np.abs(np.asarray(got, np.float32) - want).max() < 0.05 * np.abs(want).max()


def test_the_stack_of_layers_is_not_copied():
    cfg = dataclasses.replace(CFG, is_global=(False, True) * 16, mlp_width=512)
    params = jax.eval_shape(lambda k: text_encoder.init(cfg, k), jax.random.key(0))
    compiled = RUN.lower(cfg, params, IDS[:1], MASK[:1]).compile()
    stack = sum(4 * leaf.size for leaf in jax.tree.leaves(params["layers"]))
    analysis = compiled.memory_analysis()
    if analysis is None:
        pytest.skip("this backend reports no memory use")
    assert analysis.temp_size_in_bytes < stack / 2


def test_the_full_size_tower_has_the_published_number_of_parameters():
    section = {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48}
    section |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    cfg = text_encoder_config(section | {"sliding_window": 1024})
    params = jax.eval_shape(lambda k: text_encoder.init(cfg, k), jax.random.key(0))
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == 11_766_034_176
    ids = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    out = jax.eval_shape(
        lambda p, i: text_encoder.hidden_states(cfg, p, i, i > 0), params, ids
    )
    assert out.shape == (49, 1, 1024, 3840)


def test_weights_survive_export_and_import():
    params = {"text_encoder": weights(CFG)}
    exported = rules.export(params, tables.GEMMA)
    assert "language_model.model.layers.3.mlp.down_proj.weight" in exported
    back = rules.import_(exported, tables.GEMMA)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parity
@pytest.mark.parametrize("seed", [0, 1])
def test_states_equal_those_of_transformers(seed: int):
    import torch
    import transformers

    config = transformers.Gemma3TextConfig(**SECTION, attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.Gemma3TextModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
        ids, mask = torch.tensor(IDS), torch.tensor(MASK.astype(np.int64))
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    want = np.stack([h.numpy() for h in out.hidden_states])
    prefix = "language_model.model."
    weights = {prefix + k: v.detach().numpy() for k, v in model.named_parameters()}
    params = rules.import_(weights, tables.GEMMA)["text_encoder"]
    cfg = text_encoder_config(config.to_dict())
    assert cfg == CFG
    got = np.asarray(RUN(cfg, params, IDS, MASK))
    error = np.abs(got - want)[:, MASK].max() / np.abs(want[:, MASK]).max()
    assert error < 1e-5

"""Rotary embeddings: phases to the last bit, offsets without retracing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.model import rope


def grid(rng, batch=1, axes=1, tokens=64):
    start = rng.uniform(-4, 4, (batch, axes, tokens, 1)).astype(np.float32)
    return np.concatenate([start, start + np.float32(0.04)], -1)


def expected_angles(pos, max_pos, freqs):
    """The documented formula in numpy float32, one rounding per operation."""
    middle = (pos[..., 0] + pos[..., 1]) / np.float32(2)
    extents = np.asarray(max_pos, np.float32)[None, :, None]
    centred = middle / extents * np.float32(2) - np.float32(1)
    angles = centred.transpose(0, 2, 1)[:, :, None, :] * freqs[None, None, :, None]
    return angles.reshape(*angles.shape[:2], -1).astype(np.float64)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("max_pos", [(20.0,), (20.0, 2048.0, 1536.0)])
def test_phases_round_as_the_formula_inside_and_outside_jit(jit, max_pos):
    pos = grid(np.random.default_rng(0), axes=len(max_pos), tokens=500)
    width, heads = 12 * len(max_pos), 2
    make = lambda p: rope.tables(p, max_pos, width=width, heads=heads)
    table = (jax.jit(make) if jit else make)(jnp.asarray(pos))
    angles = expected_angles(pos, max_pos, rope.frequencies(1e4, 6))
    shape = (1, 500, heads, width // 2 // heads)
    np.testing.assert_allclose(table.cos, np.cos(angles).reshape(shape), atol=2e-7)
    np.testing.assert_allclose(table.sin, np.sin(angles).reshape(shape), atol=2e-7)


def test_a_new_offset_does_not_retrace_and_equals_shifted_positions():
    pos = grid(np.random.default_rng(1)).round(2)
    count = chex.assert_max_traces(
        lambda p, t: rope.tables(p, (20.0,), width=8, heads=2, offset_s=t), n=1
    )
    run = jax.jit(count)
    for offset in (0.0, -4.84, -10.0, 3.5):
        got = run(jnp.asarray(pos), offset)
        shifted = jnp.asarray(pos + np.float32(offset))
        want = rope.tables(shifted, (20.0,), width=8, heads=2)
        chex.assert_trees_all_close(got, want, atol=1e-6)


def test_padding_in_front_is_the_identity_rotation():
    # 3 axes of 16 // 6 = 2 frequencies fill 6 of 8 pairs.
    pos = grid(np.random.default_rng(2), axes=3)
    table = rope.tables(jnp.asarray(pos), (20.0, 9.0, 9.0), width=16, heads=1)
    np.testing.assert_array_equal(table.cos[..., :2], 1.0)
    np.testing.assert_array_equal(table.sin[..., :2], 0.0)


@pytest.mark.parametrize("kind", ["split", "interleaved"])
def test_rotation_keeps_norms_and_depends_on_distance_only(kind):
    rng = np.random.default_rng(3)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 8)), jnp.float32) for _ in "qk")

    def score(tq, tk):
        at = lambda t: jnp.full((1, 1, 1, 2), t, jnp.float32)
        make = lambda t: rope.tables(at(t), (20.0,), width=8, heads=2, theta=10.0)
        rq, rk = (rope.rotate(x, make(t), kind) for x, t in ((q, tq), (k, tk)))
        np.testing.assert_allclose(jnp.sum(rq**2), jnp.sum(q**2), rtol=1e-5)
        return float(jnp.sum(rq * rk))

    assert score(1.0, 3.0) == pytest.approx(score(-4.0, -2.0), abs=1e-4)
    assert score(1.0, 3.0) != pytest.approx(score(1.0, 5.0), abs=1e-2)


def test_wrong_number_of_axes_is_refused():
    with pytest.raises(ValueError, match="got positions with 1 axes, expected 3"):
        pos = jnp.zeros((1, 1, 4, 2))
        rope.tables(pos, (20.0, 9.0, 9.0), width=16, heads=1)

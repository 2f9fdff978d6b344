"""Building streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import geometry, streams
from idlora_jax.types import AudioGrid

GRID = geometry.video_grid(17, 64, 64, 25)


def tokens(n: int, seed: int = 0, batch: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, n, 8))


def audio_with_reference(length: jax.Array | None = None) -> streams.Stream:
    s = streams.target(tokens(5), AudioGrid(5))
    pos = geometry.reference_positions(3)
    return streams.add_reference(s, tokens(3, 1), pos, length)


def test_target_denoises_every_token_at_the_grid_positions():
    s = streams.target(None, GRID, batch=2, channels=8)
    assert s.x.shape == (2, 12, 8)
    assert s.denoise.all()
    assert not s.is_ref.any()
    np.testing.assert_array_equal(s.pos[1], geometry.positions(GRID)[0])


def test_target_takes_known_tokens():
    s = streams.target(tokens(12), GRID)
    np.testing.assert_array_equal(s.x, tokens(12))
    np.testing.assert_array_equal(s.clean, tokens(12))
    with pytest.raises(ValueError, match="11 tokens, expected 12"):
        streams.target(tokens(11), GRID)


def test_first_frame_is_given_and_nothing_else():
    frame = tokens(4, 1)
    s = streams.fix_first_frame(streams.target(tokens(12), GRID), frame)
    assert not s.denoise[:, :4].any()
    assert s.denoise[:, 4:].all()
    for x in (s.x, s.clean):
        np.testing.assert_array_equal(x[:, :4], frame)
        np.testing.assert_array_equal(x[:, 4:], tokens(12)[:, 4:])


def test_a_coin_per_sample_decides_who_gets_the_first_frame():
    start = streams.target(tokens(12), GRID)
    coin = jnp.array([True, False])
    s = streams.fix_first_frame(start, tokens(4, 1), where=coin)
    both = streams.fix_first_frame(start, tokens(4, 1))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), s, both)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), s, start)


def test_a_frame_larger_than_the_clip_is_refused():
    with pytest.raises(ValueError, match="the frame has 16 tokens, the stream 12"):
        streams.fix_first_frame(streams.target(tokens(12), GRID), tokens(16))


def test_reference_comes_last_before_zero_seconds_and_is_never_denoised():
    s = audio_with_reference()
    np.testing.assert_array_equal(s.is_ref[0], [False] * 5 + [True] * 3)
    np.testing.assert_array_equal(s.denoise, ~s.is_ref)
    np.testing.assert_array_equal(s.x[:, 5:], tokens(3, 1))
    np.testing.assert_array_equal(s.clean[:, 5:], tokens(3, 1))
    assert (s.pos[:, :, 5:] < 0).all()
    assert (s.pos[:, :, :5] >= 0).all()
    assert s.length is None


def test_padded_reference_counts_valid_keys_and_cannot_be_followed():
    s = audio_with_reference(jnp.array([3, 1]))
    np.testing.assert_array_equal(s.length, [8, 6])
    with pytest.raises(ValueError, match="already ends in a padded reference"):
        streams.add_reference(s, tokens(3), geometry.reference_positions(3))


def test_noise_mixes_where_denoised_and_leaves_the_rest_clean():
    s = audio_with_reference()
    spoiled = tokens(8, 2).at[:, 5:].set(jnp.nan)
    sigma = jnp.array([0.25, 1.0])
    noisy = streams.noise(s, spoiled, sigma)
    want = 0.75 * s.clean[0, :5] + 0.25 * spoiled[0, :5]
    np.testing.assert_allclose(noisy.x[0, :5], want, rtol=1e-6)
    np.testing.assert_array_equal(noisy.x[1, :5], spoiled[1, :5])
    np.testing.assert_array_equal(noisy.x[:, 5:], s.clean[:, 5:])


def test_noise_before_and_after_the_reference_are_the_same():
    sigma, noise = jnp.array([0.3, 0.6]), tokens(5, 3)
    s = streams.target(tokens(5), AudioGrid(5))
    pos = geometry.reference_positions(3)
    before = streams.add_reference(streams.noise(s, noise, sigma), tokens(3, 1), pos)
    longer = jnp.concatenate([noise, tokens(3, 4)], 1)
    after = streams.noise(streams.add_reference(s, tokens(3, 1), pos), longer, sigma)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_split_separates_target_and_reference():
    s = audio_with_reference(jnp.array([3, 1]))
    target, reference = streams.split(s, 5)
    start = streams.target(tokens(5), AudioGrid(5))
    jax.tree.map(np.testing.assert_array_equal, target, start)
    assert target.length is None
    assert reference.is_ref.all()
    np.testing.assert_array_equal(reference.length, [3, 1])


def test_frozen_stream_stays_at_its_clean_tokens():
    s = streams.noise(streams.target(tokens(12), GRID), tokens(12, 1), jnp.ones(2))
    frozen = streams.freeze(s)
    assert not frozen.denoise.any()
    np.testing.assert_array_equal(frozen.x, s.clean)


def test_building_a_stream_can_be_jitted():
    def build(clean: jax.Array, ref: jax.Array, coin: jax.Array) -> streams.Stream:
        s = streams.target(clean, GRID)
        s = streams.fix_first_frame(s, clean[:, :4], where=coin)
        s = streams.noise(s, clean, jnp.full(2, 0.5))
        return streams.add_reference(s, ref, s.pos[:, :, :3] - 1)

    args = tokens(12), tokens(3), jnp.array([True, False])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.jit(build)(*args),
        build(*args),
    )

"""Where reference tokens lie."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from small_transformer import draw

from idlora_jax import geometry, references, streams
from idlora_jax.references import USUAL, Placing
from idlora_jax.types import AudioGrid, VideoGrid

TARGET = VideoGrid(17, 128, 64, 25.0)
"""3 x 4 x 2 latents."""


def video(*shape: int, placing: Placing = USUAL) -> np.ndarray:
    frames, height, width = shape
    return references.video_positions((frames, height, width), TARGET, placing)


def test_a_reference_of_the_targets_size_lies_where_the_target_does():
    np.testing.assert_array_equal(video(3, 4, 2), geometry.positions(TARGET))


def test_a_smaller_reference_covers_the_same_picture_at_the_same_time():
    small = video(3, 2, 1)[0]
    assert small.shape == (3, 6, 2)
    np.testing.assert_array_equal(small[1, :2], [[0, 64], [64, 128]])
    np.testing.assert_array_equal(small[2], [[0, 64]] * 6)
    times = geometry.positions(TARGET)[0, 0, ::8]
    np.testing.assert_array_equal(small[0, ::2], times)


@pytest.mark.parametrize(
    ("target", "reference", "factor"),
    [((4, 2), (4, 2), 1), ((4, 2), (2, 1), 2), ((96, 192), (32, 64), 3)],
)
def test_the_ratio_of_the_sides_is_a_whole_number(target, reference, factor):
    assert references.downscale(target, reference) == factor


@pytest.mark.parametrize("sides", [(4, 1), (2, 2), (8, 4), (3, 2)])
def test_other_ratios_are_refused(sides):
    with pytest.raises(ValueError, match="divided by one whole number"):
        references.downscale((4, 2), sides)


def test_a_video_reference_before_zero_ends_a_gap_before_it():
    before = video(2, 2, 1, placing=Placing(0.5, video_before=True))[0]
    there = video(2, 2, 1)[0]
    np.testing.assert_allclose(before[0, -1, 1], -0.5, atol=1e-6)
    np.testing.assert_allclose(before[0], there[0] - 9 / 25 - 0.5, atol=1e-6)
    np.testing.assert_array_equal(before[1:], there[1:])


def test_an_audio_reference_lies_before_zero_or_on_the_plain_grid():
    before = references.audio_positions(4)
    np.testing.assert_array_equal(before, geometry.reference_positions(4))
    plain = references.audio_positions(4, Placing(audio_before=False))
    np.testing.assert_array_equal(plain, geometry.positions(AudioGrid(4)))


def test_rounding_repeats_the_steps_of_the_published_training():
    rounded = dataclasses.replace(USUAL, rounding="train_bf16")
    pos = np.asarray(references.audio_positions(121, rounded))[0, 0]
    # 4.81 s are read as 4.8125, and the first latent gets no length.
    np.testing.assert_array_equal(pos[0], [-4.84375, -4.84375])
    np.testing.assert_allclose(pos[-1], [-0.0713, -0.0400], atol=1e-4)
    thirds = VideoGrid(17, 288, 192, 24.0)
    args = (3, 3, 2), thirds, rounded
    got = references.video_positions(*args)
    np.testing.assert_array_equal(got, got.astype(ml_dtypes.bfloat16))
    exact = references.video_positions((3, 3, 2), thirds)
    assert (got[:, 0] != exact[:, 0]).any()
    np.testing.assert_allclose(got, exact, rtol=2**-8)


def test_both_kinds_are_given_tokens_behind_the_target():
    s = streams.target(draw(0, 2, 24, 128), TARGET)
    got = references.add_video(s, draw(1, 2, 2, 2, 1, 128), TARGET)
    np.testing.assert_array_equal(got.is_ref.sum(1), [4, 4])
    assert not got.denoise[:, 24:].any() and got.denoise[:, :24].all()
    sound = streams.target(draw(2, 2, 5, 128), AudioGrid(5))
    heard = references.add_audio(sound, draw(3, 2, 3, 16, 8), end_s=-0.2)
    np.testing.assert_allclose(heard.pos[:, 0, -1, 1], -0.24, atol=1e-6)


def test_hiding_a_reference_leaves_the_targets_keys():
    s = streams.target(draw(2, 2, 5, 128), AudioGrid(5))
    s = references.add_audio(s, draw(3, 2, 3, 16, 8))
    hidden = streams.hide_reference(s, 5, jnp.array([True, False]))
    np.testing.assert_array_equal(hidden.length, [5, 8])
    padded = s._replace(length=jnp.array([7, 6]))
    hidden = streams.hide_reference(padded, 5, jnp.array([True, False]))
    np.testing.assert_array_equal(hidden.length, [5, 6])

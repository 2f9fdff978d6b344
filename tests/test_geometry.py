"""Sizes, token order and positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import geometry
from idlora_jax.types import AudioGrid, VideoGrid


def coded(*shape: int) -> jnp.ndarray:
    """Every element differs."""
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


def test_patchify_round_trips_in_frame_row_column_order():
    grid = geometry.video_grid(17, 64, 96, 25.0)
    latent = coded(2, *geometry.latent_shape(grid), 5)
    x = geometry.patchify(latent)
    assert x.shape == (2, geometry.tokens(grid), 5)
    np.testing.assert_array_equal(x[1, 6 * 2 + 3 * 1 + 2], latent[1, 2, 1, 2])
    np.testing.assert_array_equal(geometry.unpatchify(x, grid), latent)


def test_audio_tokens_are_channel_major_and_round_trip():
    latent = coded(2, 3, 16, 8)
    x = geometry.patchify_audio(latent)
    assert x.shape == (2, 3, 128)
    np.testing.assert_array_equal(x[1, 2, 5 * 16 + 7], latent[1, 2, 7, 5])
    np.testing.assert_array_equal(geometry.unpatchify_audio(x), latent)


def test_unpatchify_refuses_a_wrong_number_of_tokens():
    grid = geometry.video_grid(9, 64, 64, 25)
    with pytest.raises(ValueError, match="9 tokens, expected 8"):
        geometry.unpatchify(jnp.zeros((1, 9, 4)), grid)


def test_published_size_has_4096_video_and_121_audio_tokens():
    video = geometry.video_grid(121, 512, 512, 25)
    audio = geometry.audio_grid(121, 25)
    assert video == VideoGrid(121, 512, 512, 25.0)
    assert geometry.latent_shape(video) == (16, 16, 16)
    assert geometry.tokens(video) == 4096
    assert geometry.latent_shape(audio) == (121,)
    assert geometry.seconds(video) == geometry.seconds(audio) == 4.84


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((120, 512, 512, 25), r"frames must be 8k\+1, got 120 \(use 121\)"),
        ((123, 512, 512, 25), r"got 123 \(use 121\)"),
        ((120.5, 512, 512, 25), r"got 120.5 \(use 121\)"),
        ((0, 512, 512, 25), r"got 0 \(use 1\)"),
        ((121, 500, 512, 25), r"height must be a multiple of 32, got 500 \(use 512\)"),
        ((121, 512, 10, 25), r"width must be a multiple of 32, got 10 \(use 32\)"),
        ((121, 512, 512, 0), r"fps must be above 0, got 0"),
        ((121, 512, 512, float("nan")), r"fps must be above 0, got nan"),
    ],
)
def test_wrong_sizes_name_the_nearest_valid_value(size: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        geometry.video_grid(*size)


def test_audio_latents_round_half_to_even():
    assert [geometry.audio_latents(n / 50) for n in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert geometry.audio_latents(4.84) == 121


def test_too_short_audio_is_refused_with_the_shortest_clip_that_works():
    with pytest.raises(ValueError, match="use 9 frames"):
        geometry.audio_grid(1, 60)
    assert geometry.audio_grid(9, 60) == AudioGrid(4)


def test_durations_become_valid_frame_numbers():
    assert geometry.frames_for(4.84, 25) == 121
    assert geometry.frames_for(0, 25) == 1
    assert geometry.frames_for(1.0, 24.0) == 25


def test_video_positions_are_seconds_then_pixels():
    pos = geometry.positions(geometry.video_grid(17, 64, 64, 25))
    assert pos.shape == (1, 3, 12, 2)
    assert pos.dtype == np.float32
    time = np.float32([[0, 1 / 25], [1 / 25, 9 / 25], [9 / 25, 17 / 25]])
    np.testing.assert_array_equal(pos[0, 0, ::4], time)
    np.testing.assert_array_equal(pos[0, 1, :4, 0], [0, 0, 32, 32])
    np.testing.assert_array_equal(pos[0, 2, :4], [[0, 32], [32, 64]] * 2)


def test_audio_positions_follow_the_causal_mel_grid():
    pos = geometry.positions(AudioGrid(3))
    want = np.float32([[0, 0.01], [0.01, 0.05], [0.05, 0.09]])
    np.testing.assert_array_equal(pos, want[None, None])


def test_start_shifts_time_only():
    grid = geometry.video_grid(9, 32, 64, 25)
    moved = geometry.positions(grid, start_s=2) - geometry.positions(grid)
    np.testing.assert_allclose(moved[0, 0], 2, rtol=1e-6)
    np.testing.assert_array_equal(moved[0, 1:], 0)


def test_reference_positions_are_negative_and_end_one_latent_before_zero():
    pos = geometry.reference_positions(3)
    want = np.float32([[-0.13, -0.12], [-0.12, -0.08], [-0.08, -0.04]])
    np.testing.assert_array_equal(pos, want[None, None])
    far = geometry.reference_positions(3, gap_s=1)
    np.testing.assert_allclose(pos - far, 0.96, rtol=1e-6)


def test_numerics_differ_by_rounding_only():
    exact = geometry.reference_positions(250)
    reference = geometry.reference_positions(250, numerics="reference")
    assert 0 < np.abs(exact - reference).max() < 1e-6


def test_bf16_reference_positions_collapse_as_published():
    pos = geometry.reference_positions(121, numerics="reference", rounding="infer_bf16")
    np.testing.assert_array_equal(pos[0, 0, 0], [-4.84375, -4.84375])
    assert len(np.unique(pos[..., 0])) == 120


def test_training_and_inference_round_video_positions_alike_up_to_257_frames():
    def differ(frames: int) -> int:
        grid = geometry.video_grid(frames, 64, 64, 25)
        infer, train = (
            geometry.positions(grid, numerics="reference", rounding=rounding)
            for rounding in ("infer_bf16", "train_bf16")
        )
        return int(np.sum(infer != train))

    assert [differ(n) for n in (121, 257, 265, 505)] == [0, 0, 4, 116]


def test_only_training_rounds_target_audio():
    exact, infer, train = (
        geometry.positions(AudioGrid(121), numerics="reference", rounding=rounding)
        for rounding in (None, "infer_bf16", "train_bf16")
    )
    np.testing.assert_array_equal(exact, infer)
    assert 0.01 < np.abs(exact - train).max() < 0.016


def test_rounding_needs_the_reference_numerics():
    with pytest.raises(ValueError, match="needs numerics='reference'"):
        geometry.positions(AudioGrid(2), rounding="train_bf16")


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((512, 512), (512, 512)),
        ((1080, 1920), (288, 512)),
        ((1920, 1080), (512, 288)),
        ((50, 84), (320, 512)),
        ((3, 4000), (32, 512)),
        ((768, 1024), (384, 512)),
    ],
)
def test_a_clip_takes_the_aspect_of_its_picture(picture, size):
    assert geometry.size_like(*picture) == size
    with pytest.raises(ValueError, match="above 0"):
        geometry.size_like(0, picture[1])


def test_references_lie_apart_by_the_gap():
    counts = [3, 2, 4]
    ends = geometry.reference_ends(counts, end_s=-0.2)
    spans = [
        geometry.reference_positions(n, end_s=end)[0, 0]
        for n, end in zip(counts, ends, strict=True)
    ]
    edges = [-0.2, *(float(s[0, 0]) for s in spans)]
    for span, edge in zip(spans, edges, strict=False):
        np.testing.assert_allclose(span[-1, 1], edge - 0.04, atol=1e-6)
    assert geometry.reference_ends([5]) == [0.0]

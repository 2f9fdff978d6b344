"""Previews: colours of latents, from a map fitted to an encoder."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_bases
from codec_sections import TINY_VIDEO
from PIL import Image

from idlora_jax import config_video_vae, previews
from idlora_jax.data import synthetic
from idlora_jax.pipeline import Seen
from idlora_jax.previews import LinearMap
from idlora_jax.types import AV

TIME, SPACE, CHANNELS = 8, 32, 12
GREY = LinearMap(np.zeros((2, 3)), np.zeros(3), 0.0)


def mixing() -> np.ndarray:
    """Orthogonal [C C]: three directions carry the mean colour, the others detail."""
    normal = np.random.default_rng(5).standard_normal((CHANNELS, CHANNELS))
    return np.linalg.qr(normal)[0]


def toy_encode(pixels: Any) -> np.ndarray:
    """A linear encoder: the colour of each block, and differences inside of it."""
    video = np.asarray(pixels)[0]
    mean = previews.block_means(video, TIME, SPACE)
    left = previews.block_means(video * (np.arange(video.shape[2]) % 2)[:, None], 8, 32)
    count = CHANNELS // 3 - 1
    detail = np.concatenate([left - mean / 2] * count, axis=-1)
    return (np.concatenate([mean, detail], axis=-1) @ mixing())[None]


def toy_decode(latents: np.ndarray) -> np.ndarray:
    """Colours of latents [F h w C] as pixels, eight frames per later latent frame."""
    mean = (latents @ mixing().T)[..., :3]
    large = mean.repeat(SPACE, 1).repeat(SPACE, 2)
    return np.concatenate([large[:1], large[1:].repeat(TIME, 0)])


@pytest.fixture(scope="module")
def toy() -> LinearMap:
    return previews.fit_to(toy_encode, TIME, SPACE, ridge=1e-9)


def test_a_linear_encoder_is_inverted_exactly(toy: LinearMap):
    assert toy.r2 > 1 - 1e-6
    pixels = previews.video(np.random.default_rng(99), 17, 96)
    got = toy_encode(pixels[None])[0] @ toy.weight + toy.bias
    np.testing.assert_allclose(
        got, previews.block_means(pixels, TIME, SPACE), atol=1e-4
    )


def test_flat_colours_come_out_as_they_went_in(toy: LinearMap):
    for levels in itertools.product((0, 100, 255), repeat=3):
        colour = np.asarray(levels, np.uint8)
        flat = np.broadcast_to(colour / 127.5 - 1, (1, 1, 32, 64, 3))
        small = previews.frames(toy, toy_encode(flat)[0])
        np.testing.assert_array_equal(small, np.broadcast_to(colour, (1, 1, 2, 3)))


def test_the_preview_of_a_clip_follows_its_decoded_frames():
    """With the usual penalty, on a face that moves."""
    colours = previews.fit_to(toy_encode, TIME, SPACE)
    made = synthetic.clip(0, 0, 0, frames=17, height=96, width=96)
    latents = toy_encode(made.frames[None] / 127.5 - 1)[0]
    wanted = previews.block_means(toy_decode(latents), TIME, SPACE)
    small = previews.frames(colours, latents) / 127.5 - 1
    assert np.corrcoef(small.ravel(), wanted.ravel())[0, 1] > 0.999


def test_a_random_video_vae_is_fitted_better_than_by_a_constant():
    section = TINY_VIDEO | {"latent_channels": 16}
    cfg = config_video_vae.video_vae_config({"vae": section})
    found = previews.fit(cfg, small_bases.random_params("video_vae", cfg))
    print(f"share of the variance explained in clips held out: {found.r2:.3f}")
    assert found.weight.shape == (16, 3)
    assert 0.1 < found.r2 < 1


def test_the_map_is_that_of_its_seed(toy: LinearMap):
    again = previews.fit_to(toy_encode, TIME, SPACE, ridge=1e-9)
    other = previews.fit_to(toy_encode, TIME, SPACE, ridge=1e-9, seed=1)
    np.testing.assert_array_equal(again.weight, toy.weight)
    assert not np.array_equal(other.weight, toy.weight)


def test_more_penalty_gives_smaller_weights_and_the_same_mean():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, (50, 4)), rng.normal(2, 1, (50, 3))
    for ridge in (1e-9, 0.1, 10.0):
        weight, bias = previews.regress(x, y, ridge)
        np.testing.assert_allclose((x @ weight + bias).mean(0), y.mean(0))
    norms = [np.linalg.norm(previews.regress(x, y, r)[0]) for r in (1e-9, 0.1, 10.0)]
    assert norms[0] > norms[1] > 5 * norms[2]


def test_channels_that_never_vary_get_no_weight():
    x = np.random.default_rng(0).normal(0, 1, (50, 3))
    x[:, 1] = 4.0
    weight, _ = previews.regress(x, x[:, [0, 2, 2]])
    np.testing.assert_allclose(weight[1], 0, atol=1e-12)
    weight, bias = previews.regress(np.ones((5, 2)), np.full((5, 3), 0.5))
    np.testing.assert_allclose(np.ones(2) @ weight + bias, 0.5)


def test_clips_to_fit_to_move_and_stay_in_range():
    pixels = previews.video(np.random.default_rng(3), 9, 64)
    assert pixels.shape == (9, 64, 64, 3) and pixels.dtype == np.float32
    assert pixels.min() >= -1 and pixels.max() <= 1
    assert not np.array_equal(pixels[0], pixels[8])


def test_a_picture_shows_every_frame_in_its_place():
    """Frame n has the colour (10 n, 255, 0); three frames a row, four frames."""
    colours = LinearMap(np.eye(1, 3), np.array([0.0, 1, -1]), 1.0)
    red = 10 * np.arange(1, 5)
    latents = np.broadcast_to((red / 127.5 - 1)[:, None, None, None], (4, 2, 4, 1))
    image = previews.picture(colours, latents, label="x", side=64, columns=3)
    flat = [(image == (level, 255, 0)).all(-1) for level in red]
    assert [int(where.sum()) for where in flat] == [32 * 64] * 4
    tops = [np.argwhere(where).min(0) for where in flat]
    assert tops[0][0] == tops[1][0] == tops[2][0] < tops[3][0]
    assert tops[0][1] == tops[3][1] < tops[1][1] < tops[2][1]


def test_enlarging_is_smooth_and_colours_outside_of_the_range_are_clipped():
    colours = LinearMap(np.ones((1, 3)), np.zeros(3), 1.0)
    ramp = np.array([-9.0, 9.0])[None, None, :, None]
    np.testing.assert_array_equal(previews.frames(colours, ramp)[0, 0, :, 0], [0, 255])
    row = previews.picture(colours, ramp, side=32)[-6, :32, 0].astype(int)
    assert (np.diff(row) >= 0).all() and len(set(row)) > 10


def seen(step: int, steps: int = 5, samples: int = 1, video: bool = True) -> Seen:
    latents = np.full((samples, 2, 2, 2, 2), float(step))
    both = AV(latents if video else None, None)
    return Seen("generate", step, steps, 0.5, both, both)


def test_a_watcher_writes_every_few_steps_and_at_the_end(tmp_path: Path):
    path, written = tmp_path / "new" / "anna.preview.png", []
    watcher = previews.Watcher([path], 2, lambda: GREY)
    for step in range(1, 6):
        watcher(seen(step))
        written.append(path.exists())
        path.unlink(missing_ok=True)
    assert written == [False, True, False, True, True]
    assert not [*path.parent.iterdir()]


def test_a_preview_replaces_the_one_before_and_says_its_step(tmp_path: Path):
    path, pictures = tmp_path / "a.png", []
    watcher = previews.Watcher([path], 1, lambda: GREY)
    for step in (1, 2):
        watcher(seen(step))
        pictures.append(np.asarray(Image.open(path)))
    assert not np.array_equal(*pictures)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_each_sample_of_a_batch_has_its_own_preview(tmp_path: Path):
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    previews.Watcher(paths, 1, lambda: GREY)(seen(1, samples=2))
    assert all(path.exists() for path in paths)
    with pytest.raises(ValueError):
        previews.Watcher(paths[:1], 1, lambda: GREY)(seen(1, samples=2))


def test_nothing_is_fitted_or_written_before_a_preview_is_due(tmp_path: Path):
    def never() -> LinearMap:
        raise AssertionError("fitted too early")

    watcher = previews.Watcher([tmp_path / "a.png"], 3, never)
    watcher(seen(1))
    watcher(seen(3, video=False))
    assert not [*tmp_path.iterdir()]
    with pytest.raises(AssertionError, match="fitted too early"):
        watcher(seen(3))

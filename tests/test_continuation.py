"""Clips that begin as others end: what is encoded, and that sampling keeps it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
from codec_sections import TINY_VIDEO, UPSAMPLER, audio_section
from small_transformer import draw, prompt

from idlora_jax import codecs, continuation, geometry, media, pipeline, plans
from idlora_jax.config_codecs import audio_vae_config
from idlora_jax.config_upsampler import upsampler_config
from idlora_jax.config_video_vae import video_vae_config
from idlora_jax.joining import Clip
from idlora_jax.model import audio_vae, upsampler, video_vae
from idlora_jax.types import AV, Layout

RATE = 24000
SOUND = audio_section(ch=128, mel_bins=64, z_channels=8)
"""As wide as the transformer reads: 8 channels of 16 bins."""
NETS = dataclasses.replace(
    small.networks("2.0"),
    video_vae=video_vae_config({"vae": TINY_VIDEO | {"latent_channels": 128}}),
    audio_vae=audio_vae_config({"audio_vae": SOUND}),
    upsampler=upsampler_config(UPSAMPLER),
)


def params(init: Any, cfg: Any) -> Any:
    return small.random_like(
        jax.eval_shape(lambda k: init(cfg, k), jax.random.key(0)), 1
    )


PARAMS = {
    "transformer": small.base("2.0"),
    "video_vae": params(video_vae.init, NETS.video_vae),
    "audio_vae": params(audio_vae.init, NETS.audio_vae),
    "upsampler": params(upsampler.init, NETS.upsampler),
}
LAYOUT = pipeline.clip(17, 32, 32)
OPTIONS: dict[str, Any] = {
    "steps": 2,
    "identity": 0,
    "stg": 0,
    "bimodal": 1,
    "video_cfg": 1,
    "audio_cfg": 1,
}
PLANS = {
    "one_stage": plans.one_stage(**OPTIONS),
    "two_stage": plans.two_stage(**OPTIONS),
}


def movie(frames: int = 25, fps: float = 25.0) -> Clip:
    """Moving stripes, and a sound that ends as that of made clips does."""
    y, x = np.mgrid[0:32, 0:32] / 32
    times = np.arange(frames)[:, None, None] / 25
    grey = np.uint8(127.5 + 100 * np.sin(6 * (x + y + times)))
    count = int((frames / fps - 0.03) * RATE)
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 3 * RATE))[:, :count]
    swell = np.sin(20 * np.arange(count) / RATE)
    return Clip(np.stack([grey] * 3, -1), (noise * swell).astype(np.float32))


def sizes(plan: str = "two_stage", layout: Layout = LAYOUT) -> tuple[Layout, ...]:
    return pipeline.layouts(PLANS[plan], layout)


def given(clip: Clip | None = None, overlap: int = 9, plan: str = "two_stage") -> Any:
    clip = movie() if clip is None else clip
    args = (NETS, PARAMS, clip, RATE)
    return continuation.from_media(*args, overlap=overlap, layouts=sizes(plan))


# What is encoded


def test_each_stage_gets_the_overlap_at_its_size():
    found = given()
    assert [x.shape for x in found.first_frame] == [
        (1, 2, 1, 1, 128),
        (1, 2, 2, 2, 128),
    ]
    assert found.first_audio.shape == (1, 8, 16, 8)


def test_one_frame_is_the_first_latent_of_more_and_takes_no_sound_along():
    """The encoder is causal: the picture nine frames before the end, or those nine."""
    shorter = movie()._replace(frames=movie().frames[:-8])
    found = given(shorter, overlap=1, plan="one_stage")
    assert found.first_audio is None
    (alone,), first = found.first_frame, given().first_frame[0][:, :1]
    np.testing.assert_allclose(first, alone, atol=1e-5 * float(np.abs(alone).max()))


@pytest.mark.parametrize(
    ("fps", "overlap", "count"),
    [(25.0, 9, 8), (25.0, 17, 16), (25.0, 25, 24), (24.0, 17, 16), (50.0, 17, 7)],
)
def test_sound_goes_to_the_last_latent_that_lies_in_it(fps, overlap, count):
    clip, cfg = movie(49, fps), NETS.audio_vae
    args = {"overlap": overlap, "fps": fps, "cfg": cfg}
    end = continuation.ending(clip, RATE, **args)
    room = end.wave.shape[1] - cfg.n_fft // 2
    assert room // (cfg.factor * cfg.hop) + 1 == count
    assert geometry.audio_latents(overlap / fps) - count in (1, 2)


def test_latents_are_those_of_a_sound_that_goes_on():
    """What follows the sound of the overlap is not read: here, a bang or more of it."""
    clip, cfg = movie(), NETS.audio_vae
    bang = np.pad(clip.wave, ((0, 0), (0, 720)), constant_values=0.9)
    usual, banged, cut = (
        given(clip._replace(wave=wave)).first_audio
        for wave in (clip.wave, bang, movie(33).wave[:, : 25 * 960])
    )
    longer = media.resample(movie(33).wave, RATE, cfg.sample_rate)
    start = 16 * 640  # the first of nine frames before the end of 25
    whole = codecs.encode_reference(cfg, PARAMS["audio_vae"], longer[:, start:])
    atol = 1e-3 * float(np.abs(usual).max())
    for other in (banged, cut, whole[:, :8]):
        np.testing.assert_allclose(other, usual, atol=atol)


def test_a_clip_without_sound_goes_on_where_none_is_wanted():
    silent = movie()._replace(wave=None)
    layouts = (dataclasses.replace(LAYOUT, audio=None),)
    args = (NETS, PARAMS, silent, RATE)
    found = continuation.from_media(*args, overlap=9, layouts=layouts)
    assert found.first_audio is None and len(found.first_frame) == 1
    with pytest.raises(ValueError, match=r"has no sound.*layout without audio"):
        given(silent)


def test_what_cannot_go_on_is_refused():
    with pytest.raises(ValueError, match=r"has 25 frames, expected at least .* 33"):
        given(overlap=33)
    with pytest.raises(ValueError, match=r"8k\+1, got 10 \(use 9\)"):
        given(overlap=10)
    with pytest.raises(ValueError, match=r"17 frames, expected more than .* of 17"):
        given(overlap=17)
    short = movie()._replace(wave=movie().wave[:, : RATE // 2])
    with pytest.raises(ValueError, match=r"1.00 s of pictures and 0.50 s of sound"):
        given(short)
    args = (NETS, PARAMS, movie(), RATE)
    with pytest.raises(ValueError, match="has no video"):
        layouts = (dataclasses.replace(LAYOUT, video=None),)
        continuation.from_media(*args, overlap=9, layouts=layouts)


# Files


@pytest.mark.parametrize("fps", [24.0, 25.0])
def test_the_end_of_a_file_is_that_of_the_clip(tmp_path, fps: float):
    path, clip = tmp_path / "a.mp4", movie(33, fps)
    media.write_video(path, clip.frames, clip.wave, RATE, fps=fps, crf=5)
    options: dict[str, Any] = {"overlap": 17, "fps": fps, "cfg": NETS.audio_vae}
    found = continuation.read(path, **options)
    want = continuation.ending(clip, RATE, **options)
    assert found.frames.shape == want.frames.shape
    assert np.abs(found.frames.astype(float) - want.frames).mean() < 3
    steps = np.abs(np.diff(want.frames.astype(float), axis=0)).mean()
    assert steps > 6  # one frame off would show
    assert found.wave.shape == want.wave.shape
    assert np.corrcoef(found.wave.ravel(), want.wave.ravel())[0, 1] > 0.98


def test_a_file_is_encoded_like_the_clip_at_any_size(tmp_path):
    path, clip = tmp_path / "a.mp4", movie()
    large = clip.frames.repeat(3, axis=1).repeat(2, axis=2)
    media.write_video(path, large, clip.wave, RATE)
    args = (NETS, PARAMS, path)
    found = continuation.from_file(*args, overlap=9, layouts=sizes())
    shapes = [x.shape for x in jax.tree.leaves(given())]
    assert [x.shape for x in jax.tree.leaves(found)] == shapes


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "no such file"),
        ("short", "has 9 frames, expected at least the overlap of 17"),
        ("silent", "no audio stream"),
        ("slow", r"got 12 frames per second, expected 25; set fps to 12"),
        ("sound", "expected a video file with a known length"),
    ],
)
def test_a_file_that_cannot_go_on_is_refused(tmp_path, fault: str, message: str):
    path, clip = tmp_path / "a.mp4", movie(9 if fault == "short" else 25)
    if fault == "sound":
        path = tmp_path / "a.wav"
        media.write_wav(path, clip.wave, RATE)
    elif fault != "missing":
        wave = None if fault == "silent" else clip.wave
        fps = 12 if fault == "slow" else 25
        media.write_video(path, clip.frames, wave, RATE, fps=fps)
    with pytest.raises(ValueError, match=message) as error:
        continuation.read(path, overlap=17, fps=25.0, cfg=NETS.audio_vae)
    assert str(path) in str(error.value)


# Sampling


VOICE = (draw(5, 1, 3, 16, 8), draw(6, 1, 2, 16, 8))
"""Two recordings: the voice stays that of the reference."""


def stages(plan: str, seed: int = 0, **more: Any) -> list[AV]:
    request = pipeline.Request((prompt("2.0", 0),), VOICE, **more)
    args = (PLANS[plan], NETS, PARAMS, {}, request, jax.random.key(seed))
    return [*pipeline.stages(*args, layout=LAYOUT)]


@pytest.fixture(scope="module")
def continued() -> list[AV]:
    return stages("two_stage", **given()._asdict())


def test_every_stage_begins_with_the_given_latents_bit_for_bit(continued: list[AV]):
    found = given()
    for latents, frame in zip(continued, found.first_frame, strict=True):
        np.testing.assert_array_equal(latents.video[:, :2], frame)
        np.testing.assert_array_equal(latents.audio[:, :8], found.first_audio)
        assert all(np.isfinite(x).all() for x in latents)


def test_one_stage_goes_on_too(continued: list[AV]):
    (alone,) = stages("one_stage", **given(plan="one_stage")._asdict())
    np.testing.assert_array_equal(alone.video[:, :2], given().first_frame[0])
    np.testing.assert_array_equal(alone.audio[:, :8], given().first_audio)
    assert alone.video.shape == continued[0].video.shape


def test_a_continued_clip_begins_nearer_to_the_one_before_than_others_do(
    continued: list[AV],
):
    """Both are compared with the end of the clip before; the rest is changed, too."""
    mine, (its,), frame = continued[0], stages("one_stage"), given().first_frame[0]
    assert np.abs(mine.video[:, :2] - frame).max() == 0
    assert np.abs(its.video[:, :2] - frame).max() > 0.1
    assert np.abs(mine.video[:, 2:] - its.video[:, 2:]).max() > 1e-4
    assert np.abs(mine.audio[:, 8:] - its.audio[:, 8:]).max() > 1e-4


# Latents as they are


def test_the_tail_is_the_last_latents_and_can_be_pinned():
    latents = AV(draw(0, 1, 5, 1, 1, 128), draw(1, 1, 33, 16, 8))
    found = continuation.tail(latents, overlap=9, fps=25.0)
    np.testing.assert_array_equal(found.video, latents.video[:, -2:])
    np.testing.assert_array_equal(found.audio, latents.audio[:, -9:])
    more = {"first_frame": found.video, "first_audio": found.audio}
    (got,) = stages("one_stage", **more)
    np.testing.assert_array_equal(got.video[:, :2], found.video)
    np.testing.assert_array_equal(got.audio[:, :9], found.audio)
    only = continuation.tail(latents._replace(video=None), overlap=9, fps=25.0)
    assert only.video is None and only.audio.shape[1] == 9
    assert (
        continuation.tail(latents._replace(audio=None), overlap=9, fps=25.0)[1] is None
    )


def test_too_few_latents_have_no_tail():
    latents = AV(jnp.zeros((1, 2, 1, 1, 128)), jnp.zeros((1, 9, 16, 8)))
    with pytest.raises(ValueError, match=r"tail: the clip has 9 frames.*17"):
        continuation.tail(latents, overlap=17, fps=25.0)
    with pytest.raises(ValueError, match="last 18 audio latents, got 9"):
        continuation.tail(latents._replace(video=None), overlap=9, fps=12.5)

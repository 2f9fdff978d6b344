"""Pictures and sound to latents and back, through the tiny networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
from small_transformer import draw

from idlora_jax import codecs, geometry
from idlora_jax.model import audio_vae, video_vae, vocoder
from idlora_jax.types import AV

NETS = small.networks("2.0")
GRID = geometry.video_grid(9, 32, 64, 25.0)


def params(init, cfg):
    return small.random_like(
        jax.eval_shape(lambda k: init(cfg, k), jax.random.key(0)), 1
    )


PARAMS = {
    "video_vae": params(video_vae.init, NETS.video_vae),
    "audio_vae": params(audio_vae.init, NETS.audio_vae),
    "vocoder": params(vocoder.init, NETS.vocoder),
}


def picture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def wave(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (2, samples)).astype(np.float32)


def test_a_picture_of_the_clips_size_is_only_scaled():
    image = picture(32, 64)
    pixels = codecs.first_frame_pixels(image, GRID)
    np.testing.assert_allclose(pixels[0, 0], image / 127.5 - 1, atol=1e-6)


def test_any_picture_becomes_one_latent_frame():
    cfg, own = NETS.video_vae, PARAMS["video_vae"]
    found = codecs.encode_first_frame(cfg, own, picture(50, 60), GRID)
    assert found.shape == (1, 1, 1, 2, cfg.latent_channels)
    stretched = codecs.encode_first_frame(
        cfg, own, picture(50, 60), GRID, fit="stretch"
    )
    assert not np.allclose(found, stretched)


def test_the_first_frame_is_that_of_the_encoded_clip():
    """The encoder is causal: one frame alone, or as the first of nine."""
    cfg, own = NETS.video_vae, PARAMS["video_vae"]
    image = picture(32, 64)
    alone = codecs.encode_first_frame(cfg, own, image, GRID)
    still = jnp.asarray(np.repeat(codecs.first_frame_pixels(image, GRID), 9, axis=1))
    clip = video_vae.encode(cfg, own, still)
    atol = 1e-5 * float(np.abs(clip).max())
    np.testing.assert_allclose(alone[:, 0], clip[:, 0], atol=atol)


def test_a_recording_becomes_one_latent_per_four_mel_frames():
    cfg = NETS.audio_vae
    latents = codecs.encode_reference(cfg, PARAMS["audio_vae"], wave(8000))
    frames = 1 + 8000 // cfg.hop
    bins = cfg.mel_bins // cfg.factor
    want = (1, -(-frames // cfg.factor), bins, cfg.latent_channels)
    assert latents.shape == want


def test_a_recording_shorter_than_half_a_window_is_refused():
    with pytest.raises(ValueError, match="give a longer recording"):
        codecs.encode_reference(NETS.audio_vae, PARAMS["audio_vae"], wave(100))


def latents(frames: int = 2) -> AV:
    cfg = NETS.audio_vae
    bins = cfg.mel_bins // cfg.factor
    return AV(
        draw(0, 1, frames, 1, 2, NETS.video_vae.latent_channels),
        draw(1, 1, 4, bins, cfg.latent_channels),
    )


def test_decoding_gives_bytes_and_a_bounded_wave():
    video, sound = codecs.decode(NETS, PARAMS, latents())
    assert video.shape == (1, 8 * (2 - 1) + 1, 32, 64, 3)
    assert video.dtype == jnp.uint8
    mel_frames = NETS.audio_vae.factor * (4 - 1) + 1
    assert sound.shape == (1, 2, mel_frames * NETS.vocoder.factor)
    assert np.abs(sound).max() <= 1


def test_decoding_is_float32_whatever_the_latents_are():
    half = AV(*(x.astype(jnp.bfloat16) for x in latents()))
    _, sound = codecs.decode(NETS, PARAMS, half)
    assert sound.dtype == jnp.float32


@pytest.mark.parametrize("missing", ["video", "audio"])
def test_an_absent_modality_stays_absent(missing: str):
    found = codecs.decode(NETS, PARAMS, latents()._replace(**{missing: None}))
    assert [x is None for x in found] == [missing == "video", missing == "audio"]


def test_a_large_clip_is_decoded_in_tiles_to_the_same_bytes(monkeypatch):
    cfg, own = NETS.video_vae, PARAMS["video_vae"]
    latent = draw(5, 1, 2, 1, 2, cfg.latent_channels)
    whole = codecs.decode_video(cfg, own, latent)
    monkeypatch.setattr(codecs, "WHOLE", 0)
    tiled = codecs.decode_video(cfg, own, latent)
    # One tile covers so small a clip; it takes the other way, through the host.
    assert isinstance(tiled, np.ndarray) and tiled.dtype == np.uint8
    np.testing.assert_array_equal(tiled, whole)

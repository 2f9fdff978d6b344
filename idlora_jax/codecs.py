"""Pictures and sound <-> latents: the networks around the transformer, compiled.

    image u8 [H W 3] --fit, video VAE--> first-frame latent [1 1 h w C]
    wave f32 [2 N] --log-mel, audio VAE--> reference latents [1 T M C]
    latents [B F H W C] --video VAE--> u8 [B F H W 3]
    latents [B T M C] --audio VAE--> log-mel --vocoder--> wave f32 [B 2 N]

Everything runs in float32, whatever the parameters are stored in: the vocoder is
audibly worse in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, UInt8

from idlora_jax import geometry, images, mel, programs
from idlora_jax.config_codecs import AudioVAEConfig
from idlora_jax.config_video_vae import VideoVAEConfig
from idlora_jax.model import audio_vae, video_tiles, video_vae, vocoder
from idlora_jax.model.tiling import Tiles
from idlora_jax.types import AV, Tree, VideoGrid, each
from idlora_jax.weights.networks import Networks

WHOLE = 4096
"""Latent pixels that are decoded at once: 121 frames of 512 x 512."""
NOISE_SEED = 0
"""Of the noise that some video decoders use: decoding gives the same picture again."""

_encode_video = programs.jit(video_vae.encode, "encode pictures", static_argnums=0)
_encode_audio = programs.jit(audio_vae.encode, "encode sound", static_argnums=0)
_decode_video = programs.jit(video_vae.decode, "decode video", static_argnums=0)
_decode_audio = programs.jit(audio_vae.decode, "decode sound", static_argnums=0)
_synthesize = programs.jit(vocoder.synthesize, "vocoder", static_argnums=0)


def on_device(params: Any) -> Any:
    """Parameters that are in host memory (NumPy), moved to the device; others as is.

    Done once for all that is encoded or decoded at a time: given to compiled functions
    as they are, they would be moved by each call.
    """
    move = lambda x: jax.device_put(x) if isinstance(x, np.ndarray) else x
    return jax.tree.map(move, params)


def first_frame_pixels(
    image: UInt8[np.ndarray, "H W 3"], grid: VideoGrid, fit: images.Fit = "crop"
) -> Float32[np.ndarray, "1 1 h w 3"]:
    """What the video VAE sees of the picture a clip starts from.

    Source: ltx_pipelines/utils/helpers.py: image_conditionings_by_replacing_latent.
    """
    unit = image.astype(np.float32) / np.float32(255)
    return images.fit_image(unit, grid.height, grid.width, fit)[None, None]


def encode_first_frame(
    cfg: VideoVAEConfig,
    params: Tree,
    image: UInt8[np.ndarray, "H W 3"],
    grid: VideoGrid,
    *,
    fit: images.Fit = "crop",
) -> Float[Array, "1 1 h w C"]:
    """The latent frame a clip starts from.

    Args:
        cfg: the video VAE.
        params: its parameters.
        image: of any size.
        grid: the clip.
        fit: see `images.fit_image`.
    """
    pixels = first_frame_pixels(image, grid, fit)
    return _encode_video(cfg, on_device(params), jnp.asarray(pixels))


def reference_mel(
    cfg: AudioVAEConfig, wave: Float[np.ndarray, "2 N"]
) -> Float32[np.ndarray, "1 T M 2"]:
    """What the audio VAE sees of a recording at `cfg.sample_rate`.

    Raises:
        ValueError: if it is shorter than half a window.
    """
    return mel.log_mel(
        wave, rate=cfg.sample_rate, n_fft=cfg.n_fft, hop=cfg.hop, bins=cfg.mel_bins
    )[None]


def encode_reference(
    cfg: AudioVAEConfig, params: Tree, wave: Float[np.ndarray, "2 N"]
) -> Float[Array, "1 T M C"]:
    """Audio latents of a recording at `cfg.sample_rate`.

    Raises:
        ValueError: if it is shorter than half a window.

    Source: scripts/inference_one_stage.py: _encode_audio.
    """
    seen = jnp.asarray(reference_mel(cfg, wave))
    return _encode_audio(cfg, on_device(params), seen)


def usual_tiles(cells: tuple[int, ...]) -> Tiles | None:
    """How a latent of [f h w] is cut where nothing else is said; None: not at all."""
    return None if math.prod(cells) <= WHOLE else Tiles()


def decode_video(
    cfg: VideoVAEConfig,
    params: Tree,
    latent: Float[Array, "B f h w C"],
    tiles: Tiles | Literal["usual"] | None = "usual",
) -> UInt8[Array, "B F H W 3"] | UInt8[np.ndarray, "B F H W 3"]:
    """Pixels of video latents; large clips tile by tile (see `video_tiles`).

    Of a clip that is cut, finished frames are moved to the host, so that the device
    holds one slab of frames.

    Args:
        cfg: static.
        params: of the video VAE.
        latent: normalised, float32.
        tiles: how it is cut; None: decoded at once. "usual": at once up to `WHOLE`
            latent pixels.

    Source: ltx_core/model/video_vae/video_vae.py: decode_video.
    """
    params = on_device(params)
    draws = video_vae.draw(jax.random.key(NOISE_SEED), cfg, latent.shape)
    if tiles == "usual":
        tiles = usual_tiles(latent.shape[1:4])
    if tiles is None:
        return video_vae.to_uint8(_decode_video(cfg, params, latent, draws=draws))
    options: dict[str, Any] = {"draws": draws, "finish": video_vae.to_uint8}
    chunks = video_tiles.decode_chunks(cfg, params, latent, tiles, **options)
    if isinstance(latent, Tracer):  # no frames yet that could be moved
        return jnp.concatenate([*chunks], 1)
    return np.concatenate([np.asarray(chunk) for chunk in chunks], 1)


def samples_per_latent(nets: Networks) -> int:
    """Samples of decoded sound that each audio latent but the first stands for."""
    mel_frames = geometry.MEL_PER_LATENT * nets.vocoder.sample_rate
    return mel_frames * nets.audio_vae.hop // nets.audio_vae.sample_rate


def decode(
    nets: Networks,
    params: Mapping[str, Tree],
    latents: AV,
    *,
    before: int = 0,
    tiles: Tiles | Literal["usual"] | None = "usual",
) -> tuple[Any, Float32[Array, "B 2 N"] | None]:
    """Pixels and sound of latents.

    Args:
        nets: what the networks are; the sound is at `nets.vocoder.sample_rate`.
        params: by network: "video_vae", "audio_vae", "vocoder".
        latents: `AV` of [B F H W C] and [B T M C], normalised; either may be None.
        before: audio latents before time 0, whose sound is cut off.
        tiles: see `decode_video`.

    Returns:
        uint8 [B F H W 3] (see `decode_video`) and float32 [B 2 N].

    Source: ltx_core/model/audio_vae/audio_vae.py: decode_audio.
    """
    latents = each(lambda x: x.astype(jnp.float32), latents)
    video = wave = None
    if latents.video is not None:
        args = (nets.video_vae, params["video_vae"], latents.video)
        video = decode_video(*args, tiles)
    if latents.audio is not None:
        decoder, synthesizer = on_device((params["audio_vae"], params["vocoder"]))
        log_mel = _decode_audio(nets.audio_vae, decoder, latents.audio)
        wave = _synthesize(nets.vocoder, synthesizer, log_mel)
        wave = wave[..., before * samples_per_latent(nets) :]
    return video, wave

"""What a clip begins with that goes on where another ends (`joining` makes them one).

    Clip --ending--> its last frames and their sound --encode--> Given
    mp4 --read--> the same
    Given.first_frame, Given.first_audio -> Request: pinned at the new clip's start

Clip n + 1 begins with the last `overlap` frames of clip n, so its time 0 is frame
F - overlap of clip n. They are encoded anew, because latents depend on where a clip
begins: the first latent of a clip stands for one frame, every later one for eight
(sound: one mel frame, then four). `encode` gives what a clip that begins there has, at
the size of every stage, from any video: use it unless its losses show.

`tail` takes the last latents of a result as they are. Nothing is decoded and encoded
again, which costs some detail in every clip of a long chain. But the first of them was
made for eight frames and is read as one, so that motion may jump there; it fits one
size only; and sound is in time to 0.04 s (exactly at 25 fps).

The sound of a made clip ends before its pictures: T audio latents are decoded to 4T - 3
mel frames (0.03 s short), and T was rounded (up to 0.02 s, where a frame is not a whole
number of latents). Files are filled up with silence. That end is not used, and of the
rest as many latents are given as have their whole analysis window in it: 16 for 17
frames at 25 fps, which last 17. The model goes on from there, in time with the frames.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from idlora_jax import codecs, geometry, images, joining, media, mel, programs
from idlora_jax.config_codecs import AudioVAEConfig
from idlora_jax.config_video_vae import VideoVAEConfig
from idlora_jax.files import PathLike, problem
from idlora_jax.joining import Clip
from idlora_jax.model import video_tiles, video_vae
from idlora_jax.model.tiling import Tiles
from idlora_jax.types import AV, Layout, Numerics, Tree, VideoGrid
from idlora_jax.weights.networks import Networks

SPARE = 8
"""Frames by which a file may be shorter than it states."""

_encode_video = programs.jit(video_vae.encode, "encode ending", static_argnums=0)


class Ending(NamedTuple):
    """The end of a clip, to be encoded.

    Attributes:
        frames: uint8 [overlap H W 3].
        wave: float32 [2 N] from the first of them on, at the audio VAE's rate; None
            if the clip has no sound.
    """

    frames: Any
    wave: Any


class Given(NamedTuple):
    """What a `Request` takes, under the same names.

    Attributes:
        first_frame: video latents [1 f h w C], one for each stage.
        first_audio: audio latents [1 t M C], or None.
    """

    first_frame: tuple[Any, ...]
    first_audio: Any


def _sound_end(frames: int, fps: geometry.Real, cfg: AudioVAEConfig) -> int:
    """Samples that are sure to be sound in a clip of so many frames."""
    latent = cfg.factor * cfg.hop
    whole = (cfg.sample_rate / latent / fps).is_integer()
    lost = latent - cfg.hop + (0 if whole else latent / 2)
    return math.floor(frames * cfg.sample_rate / fps - lost)


def _ending(
    clip: Clip, frames: int, overlap: int, fps: geometry.Real, cfg: AudioVAEConfig
) -> Ending:
    """The ending of a clip of `frames` frames, of which the last ones are there."""
    pictures = clip.frames[-overlap:]
    if clip.wave is None:
        return Ending(pictures, None)
    start = joining.samples(frames - overlap, cfg.sample_rate, fps)
    stop = max(start, _sound_end(frames, fps, cfg))
    sound, least = clip.wave[:, start:stop], cfg.n_fft // 2
    if sound.shape[1] <= least < stop - start:
        raise ValueError(
            f"continuation: the clip has {frames / fps:.2f} s of pictures and "
            f"{clip.wave.shape[1] / cfg.sample_rate:.2f} s of sound, expected sound in "
            f"its last {overlap} frames; choose a clip that has"
        )
    return Ending(pictures, sound)


def ending(
    clip: Clip,
    rate: int,
    *,
    overlap: int,
    fps: geometry.Real,
    cfg: AudioVAEConfig,
    numerics: Numerics = "exact",
) -> Ending:
    """The end of a clip, its sound at the audio VAE's rate.

    Args:
        clip: F frames and their sound, both from time 0 on.
        rate: samples per second of its sound.
        overlap: how many frames, 8k+1; a single one is too short to take sound along.
        fps: frames per second.
        cfg: the audio VAE.
        numerics: the resampler, see `mel.resample`.

    Raises:
        ValueError: if the clip is shorter than the overlap.
    """
    joining.check_overlap("continuation", overlap, len(clip.frames))
    if clip.wave is not None:
        wave = mel.resample(clip.wave, rate, cfg.sample_rate, numerics)
        clip = clip._replace(wave=wave)
    return _ending(clip, len(clip.frames), overlap, fps, cfg)


def read(
    path: PathLike,
    *,
    overlap: int,
    fps: geometry.Real,
    cfg: AudioVAEConfig,
    numerics: Numerics = "exact",
) -> Ending:
    """The end of a clip in a file; see `ending`.

    Args:
        path: a video file with sound.
        overlap: how many frames, 8k+1.
        fps: frames per second that the new clip will have.
        cfg: the audio VAE.
        numerics: the resampler, see `mel.resample`.

    Raises:
        ValueError: for a file that is missing, damaged, shorter than the overlap,
            without sound, or of another frame rate.
    """
    found = media.probe(path)
    if found.fps is None or found.video_s is None:
        expected = "a video file with a known length"
        raise problem("continuation", path, "none", expected, "convert it to mp4")
    if abs(found.fps - fps) > 1e-3 * fps:
        got, expected = f"{found.fps:g} frames per second", f"{fps:g}"
        do = f"set fps to {found.fps:g}, or convert the clip"
        raise problem("continuation", path, got, expected, do)
    # Some more than needed: not every container states its length to the frame.
    before = max(0, round(found.video_s * fps) - overlap - SPARE)
    frames = media.read_video(path, fps, start_s=before / fps)
    total = before + len(frames)
    joining.check_overlap(f"continuation: {path}", overlap, len(frames))
    wave = media.read_audio(path, cfg.sample_rate, numerics=numerics)
    return _ending(Clip(frames, wave), total, overlap, fps, cfg)


def _pictures(
    cfg: VideoVAEConfig,
    params: Tree,
    frames: UInt8[np.ndarray, "F H W 3"],
    grid: VideoGrid,
    fit: images.Fit,
) -> Float[Array, "1 f h w C"]:
    """Latents of frames at a clip's size; large ones tile by tile."""
    fitted = [codecs.first_frame_pixels(frame, grid, fit) for frame in frames]
    pixels = jnp.asarray(np.concatenate(fitted, axis=1))
    if geometry.tokens(dataclasses.replace(grid, frames=len(frames))) <= codecs.WHOLE:
        return _encode_video(cfg, params, pixels)
    return video_tiles.encode(cfg, codecs.on_device(params), pixels, Tiles())


def _sound(
    cfg: AudioVAEConfig, params: Tree, wave: Float32[np.ndarray, "2 N"]
) -> Float[Array, "1 t M C"] | None:
    """Latents whose analysis windows lie in the sound: none reads beyond its end."""
    room = wave.shape[1] - cfg.n_fft // 2
    if room <= 0:
        return None
    latents = codecs.encode_reference(cfg, params, wave)
    return latents[:, : room // (cfg.factor * cfg.hop) + 1]


def encode(
    nets: Networks,
    params: Mapping[str, Tree],
    end: Ending,
    layouts: Sequence[Layout],
    *,
    fit: images.Fit = "crop",
) -> Given:
    """The latents that a clip begins with if it begins as another ends.

    Args:
        nets: what the networks are.
        params: by network: "video_vae", "audio_vae".
        end: from `ending` or `read`; pictures of another size are fitted.
        layouts: the new clip at the size of each stage (`pipeline.layouts`).
        fit: see `images.fit_image`.

    Raises:
        ValueError: if the new clip would hold nothing new, or is to have sound and the
            old one has none.
    """
    videos = [layout.video for layout in layouts if layout.video is not None]
    if any(grid.frames <= len(end.frames) for grid in videos):
        raise ValueError(
            f"continuation: the new clip has {videos[0].frames} frames, expected more "
            f"than the overlap of {len(end.frames)}; make it longer"
        )
    args = (nets.video_vae, params["video_vae"], end.frames)
    frames = tuple(_pictures(*args, grid, fit) for grid in videos)
    if layouts[0].audio is None:
        return Given(frames, None)
    if end.wave is None:
        raise ValueError(
            "continuation: the clip has no sound, expected what the new clip's sound "
            "goes on with; choose a clip that has, or a layout without audio"
        )
    return Given(frames, _sound(nets.audio_vae, params["audio_vae"], end.wave))


def from_media(
    nets: Networks,
    params: Mapping[str, Tree],
    clip: Clip,
    rate: int,
    *,
    overlap: int,
    layouts: Sequence[Layout],
    fit: images.Fit = "crop",
) -> Given:
    """What the clip after this one begins with; see `ending` and `encode`.

    Example:
        >>> clip = Clip(np.asarray(result.video[0]), np.asarray(result.wave[0]))
        >>> sizes = pipeline.layouts(plan, layout)
        >>> rate = nets.vocoder.sample_rate
        >>> given = from_media(nets, params, clip, rate, overlap=17, layouts=sizes)
        >>> request = request._replace(**given._asdict())
    """
    options = {"overlap": overlap, "fps": _fps(layouts), "cfg": nets.audio_vae}
    return encode(nets, params, ending(clip, rate, **options), layouts, fit=fit)


def from_file(
    nets: Networks,
    params: Mapping[str, Tree],
    path: PathLike,
    *,
    overlap: int,
    layouts: Sequence[Layout],
    fit: images.Fit = "crop",
) -> Given:
    """What the clip after the one in a file begins with; see `read` and `encode`."""
    options = {"overlap": overlap, "fps": _fps(layouts), "cfg": nets.audio_vae}
    return encode(nets, params, read(path, **options), layouts, fit=fit)


def _fps(layouts: Sequence[Layout]) -> float:
    if not layouts or layouts[0].video is None:
        raise ValueError(
            "continuation: the new clip has no video, expected frames to go on with; "
            "give its layouts with video"
        )
    return layouts[0].video.fps


def tail(latents: AV, *, overlap: int, fps: geometry.Real) -> AV:
    """The last latents of a result as they are (the module says when to use them).

    Args:
        latents: `AV` of [B F H W C] and [B T M C]; either may be None.
        overlap: frames at the new clip's start that they stand for, 8k+1.
        fps: frames per second.

    Returns:
        `AV` for `Request.first_frame` (of a stage of that size) and
        `Request.first_audio`.

    Raises:
        ValueError: if there are too few latents.
    """
    step, longest = geometry.FRAMES_PER_LATENT, overlap
    if latents.video is not None:
        longest = step * (latents.video.shape[1] - 1) + 1
    joining.check_overlap("tail", overlap, longest)
    frames = (overlap - 1) // step + 1
    sound = geometry.audio_latents(overlap / fps)
    video = None if latents.video is None else latents.video[:, -frames:]
    if latents.audio is None:
        return AV(video, None)
    if not 1 <= sound <= latents.audio.shape[1]:
        raise ValueError(
            f"tail: {overlap} frames last {sound} audio latents, got "
            f"{latents.audio.shape[1]}; use another overlap"
        )
    return AV(video, latents.audio[:, -sound:])

"""Decoding and encoding of one sample: from files to latents.

    frames u8 [F H W 3] --video VAE--> f32 [f h w C]
    sound f32 [2 N]     --audio VAE--> f32 [T M C]
    caption             --text encoder--> a file of the layout, kept by content

`frames` and `wave` only read files, so that threads may call them; the others compute.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from idlora_jax import codecs, geometry, media, prompts, sound
from idlora_jax.config_codecs import AudioVAEConfig
from idlora_jax.config_video_vae import VideoVAEConfig
from idlora_jax.data import layout
from idlora_jax.data.cuts import Cut
from idlora_jax.data.rejection import Rejection, rejection
from idlora_jax.data.tokenize import TextTokenizer
from idlora_jax.model import video_vae
from idlora_jax.types import AV, Tree, VideoGrid
from idlora_jax.weights import tensorfile
from idlora_jax.weights.networks import Networks

MISSING_SOUND_S = 0.1
"""Sound that ends this much before its video is padded with silence, as containers
often cut it a little shorter; a clip that lacks more is left out."""


class Encoders(NamedTuple):
    """Networks, parameters by name, and the tokenizer."""

    nets: Networks
    params: Mapping[str, Tree]
    tokenizer: TextTokenizer


class Wave(NamedTuple):
    """Sound that is as long as a bucket, and how many latents of it are heard.

    Attributes:
        samples: [2 N], padded with silence.
        latents: that belong to what was recorded.
    """

    samples: np.ndarray
    latents: int


@functools.partial(jax.jit, static_argnums=0)
def _encode_video(
    cfg: VideoVAEConfig, params: Tree, frames: UInt8[Array, "F H W 3"]
) -> Float[Array, "f h w C"]:
    pixels = frames.astype(jnp.float32) / 127.5 - 1
    return video_vae.encode(cfg, params, pixels[None])[0]


def frames(cut: Cut) -> UInt8[np.ndarray, "F H W 3"]:
    """Pictures of a cut, scaled to cover its bucket and centre-cropped.

    Raises:
        Rejection: if the file cannot be read or is too short.
    """
    path, bucket = cut.clip.video, cut.bucket
    try:
        found = media.read_video(path, cut.fps, bucket.frames, start_s=cut.start_s)
        return media.resize_crop(found, bucket.height, bucket.width)
    except (ValueError, OSError) as error:
        raise rejection(path, error) from None


def encode_video(
    cfg: VideoVAEConfig, params: Tree, frames: UInt8[np.ndarray, "F H W 3"]
) -> Float32[np.ndarray, "f h w C"]:
    """Latents of a clip's pictures."""
    return np.asarray(_encode_video(cfg, params, jnp.asarray(frames)))


def recording(path: Path, rate: int) -> Float32[np.ndarray, "2 N"]:
    """The sound of a file.

    Raises:
        Rejection: if it has none, or it is silent, damaged or not finite.
    """
    try:
        return media.read_audio(path, rate)
    except (ValueError, OSError) as error:
        raise rejection(path, error) from None


def wave(
    path: Path,
    recorded: Float[np.ndarray, "2 N"],
    rate: int,
    grid: VideoGrid,
    *,
    start_s: float = 0.0,
    whole: bool = True,
) -> Wave:
    """The stretch of a file's sound that is as long as a video.

    Args:
        path: of the file, for messages.
        recorded: its sound.
        rate: samples per second.
        grid: the video.
        start_s: where in the file it begins.
        whole: whether the sound must last as long as the video.

    Raises:
        Rejection: if it is silent, or ends before the video does.
    """
    seconds, first = geometry.seconds(grid), round(start_s * rate)
    wanted = round(seconds * rate)
    samples = recorded[:, first : first + wanted]
    missing, heard_s = wanted - samples.shape[1], samples.shape[1] / rate
    if whole and missing > MISSING_SOUND_S * rate:
        raise Rejection(
            "too short",
            f"{path}: got {heard_s:.2f} s of sound, expected {seconds:.2f} s; ask for "
            "fewer frames",
        )
    if samples.size == 0 or np.abs(samples).max() < sound.SILENCE:
        where = f"its first {seconds:.2f} s"
        if start_s:
            where = f"{start_s:.2f} s to {start_s + seconds:.2f} s"
        do = "cut the clip to where someone speaks"
        raise Rejection("silent", f"{path}: silent in {where}; {do}")
    latents = geometry.audio_grid(grid.frames, grid.fps).frames
    if not whole:
        latents = max(1, min(latents, geometry.audio_latents(heard_s)))
    return Wave(np.pad(samples, ((0, 0), (0, max(0, missing)))), latents)


def encode_wave(
    cfg: AudioVAEConfig, params: Tree, wave: Wave
) -> Float32[np.ndarray, "T M C"]:
    """Audio latents of sound; the encoder is causal, so padding changes none."""
    latents = codecs.encode_reference(cfg, params, wave.samples)[0]
    return np.asarray(latents)[: wave.latents]


def caption_file(folder: Path, key: str) -> Path:
    """Where the features of a caption are kept until a clip takes them."""
    return folder / f"{key}.safetensors"


def lacking(folder: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """Captions by key that a folder does not keep yet."""
    return {k: t for k, t in wanted.items() if not caption_file(folder, k).is_file()}


def captions(
    folder: Path,
    wanted: Mapping[str, str],
    load: Callable[[], Encoders],
    seen: Callable[[], object] = lambda: None,
) -> None:
    """Encode captions, each once, and keep them.

    Args:
        folder: of the files.
        wanted: captions by key, see `samples.Marks`.
        load: reads the text encoder; not called if nothing is wanted.
        seen: called after every caption; an error of it ends the work.

    Raises:
        OSError: if a file cannot be written.
    """
    if not wanted:
        return
    nets, params, tokenizer = load()
    shared = nets.text_connector.features == "range"
    for key, text in wanted.items():
        found, mask = prompts.features(nets, params, tokenizer, [text])
        features = AV(*(np.asarray(x[0]) for x in found))
        arrays = layout.condition_file(features, np.asarray(mask[0]), shared=shared)
        write(caption_file(folder, key), arrays, {"caption": key})
        seen()


def write(path: Path, arrays: layout.Arrays, about: Mapping[str, str]) -> None:
    """Write a file of the layout with what it was made from.

    Raises:
        OSError: if it cannot be written; nothing is left behind.
    """
    entries = [tensorfile.entry(name, array) for name, array in arrays.items()]
    tensorfile.write(path, entries, about)


def linked(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the disk cannot do that.

    Raises:
        OSError: if it cannot be copied.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

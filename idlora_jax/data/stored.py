"""One clip as data sets store it, and the same in this library's form.

    folder                   keys, shapes                              read as
    latents                  latents [C F H W], or [F*H*W C] with      video [F H W C]
                             num_frames, height, width; fps
    audio_latents            latents [C T M]                           audio [T M C]
    reference_audio_latents  latents [C T M]                           reference
    reference_latents        as in latents                             video_reference
    conditions               prompt_embeds [S D] (generation 2.0), or  features, mask
                             video_ and audio_prompt_embeds (2.3);
                             prompt_attention_mask [S]

`Files` is the left side: what the files of one clip hold, by folder and key. Features
are those before the connectors, padded on the left.

Source: ltx_trainer/datasets.py: PrecomputedDataset.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped

from idlora_jax.types import AV

VIDEO, AUDIO, TEXT = "latents", "audio_latents", "conditions"
REFERENCE, VIDEO_REFERENCE = "reference_audio_latents", "reference_latents"
_LARGEST = 1e15
FOLDERS = (VIDEO, TEXT, AUDIO, REFERENCE)
"""What ID-LoRA reads; `VIDEO_REFERENCE` is for other training modes."""

File = Mapping[str, Any]
"""What one file holds: arrays and numbers by key."""
Files = Mapping[str, File]
"""What the files of one clip hold, by folder."""


@dataclass(frozen=True)
class Clip:
    """One clip's name and sizes.

    Attributes:
        name: relative path without suffix, the same in every folder.
        video: latent (F, H, W).
        fps: frames per second.
        audio: latent frames of its own sound; 0: not read.
        reference: latent frames of the reference; 0: not read.
        video_reference: latent (F, H, W) of the video reference; (): not read.
    """

    name: str
    video: tuple[int, ...]
    fps: float
    audio: int = 0
    reference: int = 0
    video_reference: tuple[int, ...] = ()


class Stored(NamedTuple):
    """One clip on the host: channel-last latents, features before the connectors.

    Attributes:
        video: [F H W C].
        audio: [T M C] or None.
        reference: [Tr M C] or None.
        features: AV of [S D] and [S Da]; one array twice in generation 2.0.
        mask: [S], True for tokens.
        video_reference: [f h w C] or None.
    """

    video: Shaped[np.ndarray, "F H W C"]
    audio: Shaped[np.ndarray, "T M C"] | None
    reference: Shaped[np.ndarray, "Tr M C"] | None
    features: AV
    mask: Bool[np.ndarray, " S"]
    video_reference: Shaped[np.ndarray, "f h w C"] | None = None


def number(file: File, key: str) -> float:
    """A number, which may be stored as a tensor of one element.

    Raises:
        ValueError: if it is missing or is something else.
    """
    found = file.get(key)
    if isinstance(found, np.ndarray) and found.size == 1:
        found = found.reshape(()).item()
    if isinstance(found, int | float) and not isinstance(found, bool):
        if abs(found) < _LARGEST:  # not so for NaN
            return float(found)
    raise ValueError(f"got {key} {found!r:.40}, expected a number")


def _latents(file: File, dims: tuple[int, ...], form: str) -> Any:
    """The latents, or what stands for them: anything with a shape."""
    latents = file.get("latents")
    shape = getattr(latents, "shape", None)
    if shape is None or len(shape) not in dims or 0 in shape:
        got = "no tensor" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"got latents of {got}, expected {form}")
    return latents


def video_size(file: File) -> tuple[tuple[int, ...], float]:
    """Latent (F, H, W) and frames per second; tensors may be given as specs.

    Raises:
        ValueError: if something is missing or does not fit together.
    """
    shape = _latents(file, (2, 4), "[C F H W] or [F*H*W C]").shape
    fps = number(file, "fps")
    if not 0 < fps < 1e4:
        raise ValueError(f"got {fps} frames per second, expected a positive number")
    if len(shape) == 4:
        return tuple(shape[1:]), fps
    sizes = tuple(int(number(file, k)) for k in ("num_frames", "height", "width"))
    if min(sizes) < 1 or math.prod(sizes) != shape[0]:
        raise ValueError(f"got {shape[0]} tokens, expected F, H, W = {sizes} of them")
    return sizes, fps


def sound_length(file: File) -> int:
    """Number of latent frames; tensors may be given as specs.

    Raises:
        ValueError: if there are no latents, or of another shape.
    """
    return int(_latents(file, (3,), "[C T M]").shape[1])


def video(file: File) -> Shaped[np.ndarray, "F H W C"]:
    """Video latents, channel-last.

    Raises:
        ValueError: if something is missing or does not fit together.
    """
    size, _ = video_size(file)
    latents = file["latents"]
    if latents.ndim == 2:
        return latents.reshape(*size, -1)
    return np.moveaxis(latents, 0, -1)


def sound(file: File) -> Shaped[np.ndarray, "T M C"]:
    """Audio latents, channel-last.

    Raises:
        ValueError: if there are no latents, or of another shape.
    """
    sound_length(file)
    return np.moveaxis(file["latents"], 0, -1)


def text(file: File) -> tuple[AV, Bool[np.ndarray, " S"]]:
    """Features (AV of [S D], [S Da]) and the mask of tokens.

    Raises:
        ValueError: if something is missing or of another length.
    """
    both = file.get("prompt_embeds")
    features = AV(
        file.get("video_prompt_embeds", both), file.get("audio_prompt_embeds", both)
    )
    mask = file.get("prompt_attention_mask")
    shapes: list[Any] = [getattr(x, "shape", ()) for x in (*features, mask)]
    if [len(s) for s in shapes] != [2, 2, 1] or len({s[0] for s in shapes}) != 1:
        raise ValueError(
            f"got {_described(file)}, expected prompt_embeds [S D] (or "
            "video_prompt_embeds and audio_prompt_embeds) and prompt_attention_mask [S]"
        )
    return features, np.asarray(mask) > 0


def _described(file: File) -> str:
    shapes = {key: getattr(value, "shape", None) for key, value in file.items()}
    shown = (k if s is None else f"{k} {list(s)}" for k, s in sorted(shapes.items()))
    return ", ".join(shown) or "nothing"


def stored(files: Files) -> Stored:
    """The files of one clip in this library's form; some may be left out.

    Raises:
        ValueError: naming the folder, if a file lacks something.
    """
    read: dict[str, Any] = {}
    for folder, convert in ((VIDEO, video), (TEXT, text), (AUDIO, sound)):
        read |= _converted(files, folder, convert)
    read |= _converted(files, REFERENCE, sound)
    read |= _converted(files, VIDEO_REFERENCE, video)
    features, mask = read[TEXT]
    return Stored(
        read[VIDEO],
        read.get(AUDIO),
        read.get(REFERENCE),
        features,
        mask,
        read.get(VIDEO_REFERENCE),
    )


def _converted(files: Files, folder: str, convert: Any) -> dict[str, Any]:
    if folder not in files:
        return {}
    try:
        return {folder: convert(files[folder])}
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def finite(file: File) -> bool:
    """Whether every value of every tensor is finite."""
    floats = (v for v in file.values() if isinstance(v, np.ndarray) and v.dtype != bool)
    return all(bool(np.isfinite(v).all()) for v in floats)

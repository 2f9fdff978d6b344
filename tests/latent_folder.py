"""Folders of the published latent layout with random contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from idlora_jax.data import latents, layout
from idlora_jax.types import AV


def names(count: int) -> list[str]:
    return [f"speaker{n % 2}/clip{n}" for n in range(count)]


def tensors(
    seed: int,
    *,
    size: tuple[int, int, int] = (3, 2, 2),
    fps: float = 25.0,
    audio: int = 9,
    reference: int = 5,
    text: tuple[int, int] = (4, 20),
    shared: bool = True,
    seen: tuple[int, int, int] | None = None,
) -> dict[str, dict[str, Any]]:
    """What one clip's files hold, by folder. Sounds share one pattern.

    `seen` is the size of a video reference.
    """
    rng = np.random.default_rng(seed)

    def sound(frames: int) -> np.ndarray:
        pattern = np.random.default_rng(0).normal(0, 1, (16, 8))
        noisy = pattern + 0.1 * rng.normal(0, 1, (frames, 16, 8))
        return noisy.astype(np.float32)

    video = rng.normal(0, 1, (*size, 128)).astype(np.float32)
    features = AV(*(rng.normal(0, 1, text).astype(np.float32) for _ in range(2)))
    mask = np.arange(text[0]) >= 1
    files = {
        latents.VIDEO: layout.video_file(video, fps),
        latents.AUDIO: layout.sound_file(sound(audio)),
        latents.REFERENCE: layout.sound_file(sound(reference)),
        latents.TEXT: layout.condition_file(features, mask, shared=shared),
    }
    if seen is not None:
        clip = rng.normal(0, 1, (*seen, 128)).astype(np.float32)
        files[latents.VIDEO_REFERENCE] = layout.video_file(clip, fps)
    return files


def write_clip(folder: Path, name: str, files: dict[str, dict[str, Any]]) -> None:
    for kind, arrays in files.items():
        path = layout.file_of(folder, kind, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors writes the bytes of views in the order of their memory.
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)


def write(folder: Path, count: int = 4, **options: Any) -> Path:
    for n, name in enumerate(names(count)):
        write_clip(folder, name, tensors(n, **options))
    return folder

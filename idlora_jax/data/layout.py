"""Writing the published layout of a data set: four folders, one file a clip in each.

    latents/                  latents [C f h w], num_frames, height, width, fps
    audio_latents/            latents [C T M], num_time_steps, frequency_bins, duration
    reference_audio_latents/  the same, of another clip of the same speaker
    conditions/               prompt_embeds [S D], prompt_attention_mask [S]

Channels stand first, sizes count latents, `duration` is in seconds. Generation 2.3 has
`video_prompt_embeds` and `audio_prompt_embeds` instead of the one. Features are those
before the connectors, padded on the left. Files are safetensors, under the same
relative name in every folder; `data.latents` reads them.

Source: ltx_trainer scripts/process_videos.py, process_captions.py.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

from idlora_jax import geometry
from idlora_jax.data import latents
from idlora_jax.types import AV, AudioGrid

FOLDERS = (latents.TEXT, latents.REFERENCE, latents.AUDIO, latents.VIDEO)
"""In the order of writing: a clip is complete when its file in `latents` is there."""

Arrays = dict[str, Shaped[np.ndarray, "..."]]


def video_file(video: Float[np.ndarray, "f h w C"], fps: float) -> Arrays:
    """What a file in `latents/` holds: channels first, sizes in latents."""
    sizes = zip(("num_frames", "height", "width"), video.shape[:3], strict=True)
    return {
        "latents": np.moveaxis(video, -1, 0).astype(ml_dtypes.bfloat16),
        **{name: np.array(size, np.int64) for name, size in sizes},
        "fps": np.array(fps, np.float32),
    }


def sound_file(sound: Float[np.ndarray, "T M C"]) -> Arrays:
    """What a file in `audio_latents/` or `reference_audio_latents/` holds."""
    frames, bins = sound.shape[:2]
    seconds = geometry.seconds(AudioGrid(frames))
    return {
        "latents": np.moveaxis(sound, -1, 0).astype(np.float32),
        "num_time_steps": np.array(frames, np.int64),
        "frequency_bins": np.array(bins, np.int64),
        "duration": np.array(seconds, np.float32),
    }


def condition_file(
    features: AV, mask: Shaped[np.ndarray, " S"], *, shared: bool
) -> Arrays:
    """What a file in `conditions/` holds: features before the connectors.

    Args:
        features: `AV` of [S D].
        mask: True for tokens.
        shared: whether both modalities have the same features (generation 2.0).
    """
    names = AV("prompt_embeds", None)
    if not shared:
        names = AV("video_prompt_embeds", "audio_prompt_embeds")
    named = zip(names, features, strict=True)
    arrays = {n: np.asarray(x, ml_dtypes.bfloat16) for n, x in named if n is not None}
    return {**arrays, "prompt_attention_mask": np.asarray(mask, np.int64)}


def file_of(folder: Path, kind: str, name: str) -> Path:
    """Where a clip's file of one kind lies."""
    return folder / kind / f"{name}.safetensors"

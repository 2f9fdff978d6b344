"""Reference tokens: where they lie, and how they join a stream.

    audio   before the first second, ending `gap_s` before it, or on the plain grid from
            zero
    video   at the target's own time and place, or likewise before the first second. It
            may be smaller: pixel positions are multiplied by the ratio of the sides, so
            that a token lies where the target shows the same

Training and sampling call these same functions. `Placing` is what a training run may
set otherwise than the published one did, and sampling with its adapter must repeat.

Source: ltx_trainer/training_strategies/: video_to_video.py, audio_ref_only_ic.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from idlora_jax import geometry, streams
from idlora_jax.types import AudioGrid, Numerics, Stream, VideoGrid


@dataclass(frozen=True)
class Placing:
    """Where references lie, and how positions are rounded; static.

    Attributes:
        gap_s: seconds between a reference before zero and what follows it.
        audio_before: audio references lie before zero, else on the grid from zero.
        video_before: the same of video references.
        rounding: bfloat16 steps of all positions, see `geometry.positions`; with them
            positions are made in the reference's order, whatever `numerics` says.
    """

    gap_s: geometry.Real = geometry.GAP_S
    audio_before: bool = True
    video_before: bool = False
    rounding: geometry.Rounding | None = None

    def how(self, numerics: Numerics) -> dict[str, Any]:
        """The keyword arguments of functions that make positions."""
        exact = self.rounding is None
        how = numerics if exact else "reference"
        return {"numerics": how, "rounding": self.rounding}


USUAL = Placing()
"""As published: audio before zero, one latent step apart."""


def downscale(target: Sequence[int], reference: Sequence[int]) -> int:
    """How many times smaller a video reference's sides are than the target's.

    Args:
        target: its (height, width), in pixels or latents.
        reference: likewise.

    Raises:
        ValueError: if it is not one whole number for both sides.
    """
    (height, width), (h, w) = target, reference
    factor = height // h
    if factor < 1 or (factor * h, factor * w) != (height, width):
        raise ValueError(
            f"video reference: its sides are {h} x {w}, the target's {height} x "
            f"{width}; expected the same sides, or both divided by one whole number"
        )
    return factor


def audio_positions(
    frames: int,
    placing: Placing = USUAL,
    *,
    length: Int[Array, " B"] | None = None,
    end_s: geometry.Real = 0.0,
    numerics: Numerics = "exact",
) -> Float[Any, "_ 1 Tr 2"]:
    """Positions of an audio reference: [1 1 Tr 2], or [B 1 Tr 2] for padded ones.

    Args:
        frames: number Tr of latents, padding included.
        placing: where it lies.
        length: valid latents of each sample. The end of each, not of its padding, lies
            before zero; padding is at 0.
        end_s: seconds at which what follows begins.
        numerics: see `geometry.positions`.
    """
    how = placing.how(numerics)
    if not placing.audio_before:
        return geometry.positions(AudioGrid(frames), **how)

    def of(n: int) -> np.ndarray:
        gap = {"gap_s": placing.gap_s, "end_s": end_s}
        return geometry.reference_positions(n, **gap, **how)

    if length is None:
        return of(frames)
    table = np.zeros((frames + 1, 1, frames, 2), np.float32)
    for n in range(1, frames + 1):
        table[n, :, :n] = of(n)[0]
    return jnp.asarray(table)[length]


def video_positions(
    shape: tuple[int, int, int],
    target: VideoGrid,
    placing: Placing = USUAL,
    *,
    numerics: Numerics = "exact",
) -> Float[np.ndarray, "1 3 Tr 2"]:
    """Positions of a video reference in the target's seconds and pixels.

    Args:
        shape: its latent (F, H, W).
        target: the clip; the reference has its frame rate.
        placing: where it lies.
        numerics: see `geometry.positions`.

    Raises:
        ValueError: if the sides are not the target's, divided by a whole number.

    Source: ltx_core/conditioning/types/reference_video_cond.py.
    """
    frames, *sides = shape
    height, width = (side * geometry.PIXELS_PER_LATENT for side in sides)
    pictures = (frames - 1) * geometry.FRAMES_PER_LATENT + 1
    grid = VideoGrid(pictures, height, width, target.fps)
    factor = downscale((target.height, target.width), (height, width))
    start_s = -(geometry.seconds(grid) + placing.gap_s) if placing.video_before else 0.0
    how = placing.how(numerics)
    x = geometry.positions(grid, start_s=start_s, **how)
    scaled = x[:, 1:] * factor
    if how["rounding"] == "train_bf16":
        scaled = scaled.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.concatenate([x[:, :1], scaled], axis=1)


def add_audio(
    s: Stream,
    ref: Float[Array, "B Tr M C"],
    placing: Placing = USUAL,
    *,
    length: Int[Array, " B"] | None = None,
    end_s: geometry.Real = 0.0,
    numerics: Numerics = "exact",
) -> Stream:
    """Append an audio reference; arguments as of `audio_positions`."""
    where = {"length": length, "end_s": end_s, "numerics": numerics}
    pos = audio_positions(ref.shape[1], placing, **where)
    tokens = geometry.patchify_audio(ref)
    return streams.add_reference(s, tokens, jnp.asarray(pos), length)


def add_video(
    s: Stream,
    ref: Float[Array, "B F H W C"],
    target: VideoGrid,
    placing: Placing = USUAL,
    *,
    numerics: Numerics = "exact",
) -> Stream:
    """Append a video reference; arguments as of `video_positions`."""
    _, frames, height, width, _ = ref.shape
    shape = (frames, height, width)
    pos = video_positions(shape, target, placing, numerics=numerics)
    return streams.add_reference(s, geometry.patchify(ref), jnp.asarray(pos))

"""Sizes, token order and positions: pixels <-> latents, frames <-> seconds.

The video network compresses 8x in time and 32x in space, and encodes the first frame
alone: 8k+1 frames become k+1 latent frames. The audio network turns 16 kHz sound (one
mel frame every 160 samples, 4 mel frames a latent) into 25 latents a second. A token's
position is the half-open interval [start, end) it covers: seconds on the first axis,
then pixels (height, width). Both networks are causal, so latent i of the time axis
covers `max(0, r*i + 1 - r) .. max(0, r*(i+1) + 1 - r)` units with r = 8 frames or
4 mel frames.

Positions are computed on the host: in float64 and rounded once to float32 ("exact"),
or in the reference's float32 order ("reference"), optionally with its bfloat16 steps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Int

from idlora_jax.types import AudioGrid, Numerics, VideoGrid

FRAMES_PER_LATENT = 8
PIXELS_PER_LATENT = 32
MEL_PER_LATENT = 4
HOP = 160
SAMPLE_RATE = 16000
AUDIO_LATENTS_PER_S = SAMPLE_RATE / HOP / MEL_PER_LATENT
VIDEO_CHANNELS = 128
AUDIO_CHANNELS = 8
AUDIO_BINS = 16
GAP_S = 1 / AUDIO_LATENTS_PER_S

Rounding = Literal["infer_bf16", "train_bf16"]
Real = float | int


def video_grid(frames: Real, height: Real, width: Real, fps: Real) -> VideoGrid:
    """Check a clip's pixel size.

    Args:
        frames: 8k+1.
        height: multiple of 32, pixels.
        width: multiple of 32, pixels.
        fps: frames per second, above 0.

    Raises:
        ValueError: naming the argument and the nearest valid value.
    """
    nearest = nearest_frames(frames)
    if frames != nearest:
        raise ValueError(
            f"video_grid: frames must be 8k+1, got {frames} (use {nearest})"
        )
    for name, side in (("height", height), ("width", width)):
        nearest = max(1, math.floor(side / PIXELS_PER_LATENT + 0.5)) * PIXELS_PER_LATENT
        if side != nearest:
            raise ValueError(
                f"video_grid: {name} must be a multiple of 32, got {side} "
                f"(use {nearest})"
            )
    if not 0 < fps < math.inf:
        raise ValueError(f"video_grid: fps must be above 0, got {fps} (use 25)")
    return VideoGrid(int(frames), int(height), int(width), float(fps))


LONG_SIDE, MOST_PIXELS = 512, 576 * 1024


def size_like(height: int, width: int) -> tuple[int, int]:
    """The sides of a clip that has the aspect of a picture.

    Args:
        height: of the picture, pixels.
        width: of the picture, pixels.

    Returns:
        Height and width, multiples of 32: the longer side is 512, or shorter where the
        clip would have more than 576 x 1024 pixels.

    Raises:
        ValueError: if a side is not above 0.

    Source: scripts/inference_one_stage.py: compute_resolution_match_aspect.
    """
    if min(height, width) < 1:
        raise ValueError(f"size_like: sides must be above 0, got {height} x {width}")
    scale = min(
        LONG_SIDE / max(height, width), math.sqrt(MOST_PIXELS / (height * width))
    )

    def whole(side: int) -> int:
        # Python rounds halves to even, twice, as the source does.
        cells = round(round(side * scale) / PIXELS_PER_LATENT)
        return max(1, cells) * PIXELS_PER_LATENT

    return whole(height), whole(width)


def nearest_frames(frames: Real) -> int:
    """The number of the form 8k+1 nearest to `frames`, at least 1."""
    return max(0, math.floor((frames - 1) / FRAMES_PER_LATENT + 0.5)) * 8 + 1


def frames_for(seconds: Real, fps: Real) -> int:
    """The number of video frames (8k+1) nearest to a duration."""
    return nearest_frames(seconds * fps)


def seconds(grid: VideoGrid | AudioGrid) -> float:
    """Duration from time 0 on: video frames over fps, audio latents over 25."""
    if isinstance(grid, VideoGrid):
        return grid.frames / grid.fps
    return (grid.frames - grid.before) / AUDIO_LATENTS_PER_S


def audio_latents(seconds: Real) -> int:
    """Number of audio latents of a duration, halves rounded to even.

    Source: ltx_core/types.py: AudioLatentShape.from_duration.
    """
    return round(seconds * AUDIO_LATENTS_PER_S)


def audio_grid(frames: int, fps: Real, *, pre_roll: Real = 0.0) -> AudioGrid:
    """The audio that accompanies `frames` video frames at `fps`.

    Args:
        frames: of the video.
        fps: frames per second.
        pre_roll: seconds of sound before the video begins, rounded to latents.

    Raises:
        ValueError: if the clip is too short for one audio latent (0.02 s).
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"audio_grid: fps must be above 0, got {fps} (use 25)")
    latents = audio_latents(frames / fps)
    if latents < 1:
        longer = itertools.count(1, FRAMES_PER_LATENT)
        need = next(n for n in longer if audio_latents(n / fps) >= 1)
        raise ValueError(
            f"audio_grid: {frames} frames at {fps} fps are shorter than one audio "
            f"latent (0.04 s); use {need} frames or more"
        )
    before = audio_latents(pre_roll)
    return AudioGrid(before + latents, before)


def latent_shape(grid: VideoGrid | AudioGrid) -> tuple[int, ...]:
    """(F, H, W) of a video's latents, (T,) of an audio's."""
    if isinstance(grid, AudioGrid):
        return (grid.frames,)
    return (
        (grid.frames - 1) // FRAMES_PER_LATENT + 1,
        grid.height // PIXELS_PER_LATENT,
        grid.width // PIXELS_PER_LATENT,
    )


def tokens(grid: VideoGrid | AudioGrid) -> int:
    """Number of tokens T."""
    return math.prod(latent_shape(grid))


def latent_bounds(grid: VideoGrid | AudioGrid) -> Int[np.ndarray, "A T 2"]:
    """[start, end) of each token in latent units, tokens in (f, h, w) order."""
    start = np.stack(np.meshgrid(*map(np.arange, latent_shape(grid)), indexing="ij"))
    start = start.reshape(len(start), -1)
    return np.stack([start, start + 1], axis=-1)


def pixel_bounds(grid: VideoGrid | AudioGrid) -> Int[np.ndarray, "A T 2"]:
    """[start, end) of each token in frames and pixels, or in mel frames.

    Source: ltx_core/components/patchifiers.py: get_pixel_coords (causal fix on).
    """
    scale = [MEL_PER_LATENT]
    if isinstance(grid, VideoGrid):
        scale = [FRAMES_PER_LATENT, PIXELS_PER_LATENT, PIXELS_PER_LATENT]
    bounds = latent_bounds(grid) * np.array(scale)[:, None, None]
    bounds[0] = np.maximum(0, bounds[0] + 1 - scale[0])
    return bounds


def _bf16(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16, keeping the dtype."""
    return x.astype(ml_dtypes.bfloat16).astype(x.dtype)


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _check_rounding(numerics: Numerics, rounding: Rounding | None) -> None:
    if rounding is not None and numerics != "reference":
        raise ValueError(
            f"positions: rounding={rounding!r} repeats the reference's bfloat16 steps "
            f"and needs numerics='reference', got numerics={numerics!r}"
        )


def positions(
    grid: VideoGrid | AudioGrid,
    *,
    start_s: Real = 0.0,
    numerics: Numerics = "exact",
    rounding: Rounding | None = None,
) -> Float[np.ndarray, "1 A T 2"]:
    """[start, end) of each token: seconds, then (for video) pixels.

    Args:
        grid: what to cover.
        start_s: seconds added to the time axis.
        numerics: "exact" rounds once from float64; "reference" computes in float32.
        rounding: the reference's bfloat16 steps: "infer_bf16" rounds the finished
            video positions and leaves audio alone; "train_bf16" rounds video before
            the division by fps and after it, and the finished audio positions.

    Returns:
        float32 [1 A T 2], A = 3 for video and 1 for audio, tokens in (f, h, w) order.

    Raises:
        ValueError: if `rounding` is given with numerics "exact".

    Source: ltx_core/tools.py: VideoLatentTools.create_initial_state;
        ltx_core/components/patchifiers.py: AudioPatchifier;
        ltx_trainer/training_strategies/base_strategy.py: _get_video_positions.
    """
    _check_rounding(numerics, rounding)
    real = np.float32 if numerics == "reference" else np.float64
    x = pixel_bounds(grid).astype(real)
    before = _bf16 if rounding == "train_bf16" else _same
    if isinstance(grid, VideoGrid):
        x = before(x)
        x[0] /= real(grid.fps)
        after = _bf16 if rounding else _same
    else:
        x = x * real(HOP) / real(SAMPLE_RATE)
        after = before
        start_s -= grid.before / AUDIO_LATENTS_PER_S
    x[0] += real(start_s)
    return after(x).astype(np.float32)[None]


def reference_positions(
    frames: int,
    *,
    gap_s: Real = GAP_S,
    end_s: Real = 0.0,
    numerics: Numerics = "exact",
    rounding: Rounding | None = None,
) -> Float[np.ndarray, "1 1 T 2"]:
    """Positions of reference audio: negative seconds, ending `gap_s` before `end_s`.

    Args:
        frames: number T of reference latents.
        gap_s: distance from the last end; one latent step in the reference.
        end_s: seconds at which what follows begins; 0 in the reference.
        numerics: as in `positions`.
        rounding: either value rounds to bfloat16 first and after each subtraction,
            as the reference does both in training and at inference.

    Returns:
        float32 [1 1 T 2].

    Source: scripts/inference_one_stage.py: _create_audio_state;
        ltx_trainer/training_strategies/audio_ref_only_ic.py:
        _get_negative_audio_positions.
    """
    _check_rounding(numerics, rounding)
    if frames < 1:
        raise ValueError(
            f"reference_positions: frames must be at least 1, got {frames}"
        )
    real = np.float32 if numerics == "reference" else np.float64
    cast = _bf16 if rounding else _same
    x = cast(pixel_bounds(AudioGrid(frames)).astype(real) * real(HOP) / SAMPLE_RATE)
    x = cast(cast(x - x[0, -1, 1]) - cast(np.asarray(gap_s, real)))
    return (x + real(end_s)).astype(np.float32)[None]


def reference_ends(
    frames: Sequence[int], *, gap_s: Real = GAP_S, end_s: Real = 0.0
) -> list[float]:
    """Where what follows each of several references begins: `end_s` for each.

    They lie one before the other, `gap_s` apart, the first nearest to `end_s`.

    Args:
        frames: number of latents of each.
        gap_s: distance between them, and to `end_s`.
        end_s: seconds at which the target begins.
    """
    lengths = [(MEL_PER_LATENT * n + 1 - MEL_PER_LATENT) * HOP for n in frames]
    steps = [0.0, *(gap_s + length / SAMPLE_RATE for length in lengths)]
    return [end_s - before for before in itertools.accumulate(steps)][: len(frames)]


def patchify(latent: Float[Array, "B F H W C"]) -> Float[Array, "B T C"]:
    """Video latent to tokens in (f, h, w) order."""
    return latent.reshape(latent.shape[0], -1, latent.shape[-1])


def unpatchify(x: Float[Array, "B T C"], grid: VideoGrid) -> Float[Array, "B F H W C"]:
    """Invert `patchify`.

    Raises:
        ValueError: if the number of tokens is not the grid's.
    """
    if x.shape[1] != tokens(grid):
        raise ValueError(
            f"unpatchify: {x.shape[1]} tokens, expected {tokens(grid)} for {grid}; "
            "drop reference tokens first (streams.split)"
        )
    return x.reshape(x.shape[0], *latent_shape(grid), x.shape[-1])


def patchify_audio(latent: Float[Array, "B T M C"]) -> Float[Array, "B T D"]:
    """Audio latent (M mel bins, C channels) to tokens of D = C*M, channel-major."""
    return latent.swapaxes(2, 3).reshape(*latent.shape[:2], -1)


def unpatchify_audio(
    x: Float[Array, "B T D"], channels: int = AUDIO_CHANNELS
) -> Float[Array, "B T M C"]:
    """Invert `patchify_audio`."""
    return x.reshape(*x.shape[:2], channels, -1).swapaxes(2, 3)

"""Clips one after the other: the part that is new, and several as one.

    new clip --fresh--> its part after the overlap
    clip, new clip --joined--> one clip, the frames that they share once

Frame n of a clip is shown from n / fps on and its sound starts at sample
round(n rate / fps), always counted from time 0, so that nothing drifts however many
clips follow.

The sound of a made clip ends up to 0.05 s before its pictures (see `continuation`).
`joined` changes from one clip's sound to the other's in the middle of the overlap,
where both hold the same sound, and so never meets that end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from idlora_jax import geometry

FADE_S = 0.02
"""Length of the change from one clip's sound to the other's."""


class Clip(NamedTuple):
    """A finished clip.

    Attributes:
        frames: uint8 [F H W 3].
        wave: float32 [2 N], or None.
    """

    frames: Any
    wave: Any


def samples(frames: int, rate: int, fps: geometry.Real) -> int:
    """The first sample of a frame, which is how many there are before it."""
    return round(frames * rate / fps)


def check_overlap(name: str, overlap: int, frames: int) -> None:
    """Raise unless a clip of so many frames has the overlap, and it is 8k+1.

    Raises:
        ValueError: naming the nearest valid overlap.
    """
    near = geometry.nearest_frames(overlap)
    if overlap != near:
        raise ValueError(f"{name}: overlap must be 8k+1, got {overlap} (use {near})")
    if frames < overlap:
        raise ValueError(
            f"{name}: the clip has {frames} frames, expected at least the overlap of "
            f"{overlap}; use a longer clip, or a smaller overlap (8k+1)"
        )


def _fit(wave: np.ndarray, length: int) -> np.ndarray:
    """Cut, or filled up with silence."""
    return np.pad(wave[:, :length], ((0, 0), (0, max(0, length - wave.shape[1]))))


def fresh(clip: Clip, rate: int, *, overlap: int, fps: geometry.Real) -> Clip:
    """A continued clip without the overlap: to be written or played after the other.

    Args:
        clip: F frames and their sound, from time 0 on.
        rate: samples per second of its sound.
        overlap: frames it shares with the clip before.
        fps: frames per second.

    Returns:
        F - overlap frames, and samples from that of frame `overlap` to that of F.

    Raises:
        ValueError: if nothing is left.
    """
    count = len(clip.frames)
    check_overlap("fresh", overlap, count - 1)
    if clip.wave is None:
        return Clip(clip.frames[overlap:], None)
    wave = _fit(clip.wave, samples(count, rate, fps))
    return Clip(clip.frames[overlap:], wave[:, samples(overlap, rate, fps) :])


def _mixed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """From a to b at constant power, whether they are alike or not."""
    rise = (np.arange(a.shape[1], dtype=np.float32) + 0.5) / max(1, a.shape[1])
    alike = float((a * b).sum() / max(1e-12, np.sqrt((a**2).sum() * (b**2).sum())))
    power = (1 - rise) ** 2 + rise**2 + 2 * rise * (1 - rise) * max(0.0, alike)
    return ((1 - rise) * a + rise * b) / np.sqrt(power)


def joined(
    before: Clip, after: Clip, rate: int, *, overlap: int, fps: geometry.Real
) -> Clip:
    """Two clips as one, the frames that they share once.

    Pictures are those of `before` to its end. The sound changes over 20 ms in the
    middle of the overlap. May be repeated: the result is a `before` again.

    Args:
        before: a clip.
        after: its continuation, with the overlap.
        rate: samples per second of both.
        overlap: frames that they share, 8k+1.
        fps: frames per second.

    Returns:
        F frames and round(F rate / fps) samples.

    Raises:
        ValueError: if a clip is shorter than the overlap, sizes differ, or one has
            sound and the other has none.
    """
    for clip in (before, after):
        check_overlap("joined", overlap, len(clip.frames))
    alike = before.frames.shape[1:] == after.frames.shape[1:]
    if not alike or (before.wave is None) != (after.wave is None):
        sizes = [[*clip.frames.shape[1:3]] for clip in (before, after)]
        sounds = ["no" if clip.wave is None else "with" for clip in (before, after)]
        raise ValueError(
            f"joined: got clips of {sizes} pixels, {' and '.join(sounds)} sound, "
            "expected both alike; make the second at the size of the first"
        )
    frames = np.concatenate([before.frames, after.frames[overlap:]])
    if before.wave is None:
        return Clip(frames, None)
    own, other = (
        _fit(clip.wave, samples(len(clip.frames), rate, fps))
        for clip in (before, after)
    )
    start = samples(len(before.frames) - overlap, rate, fps)
    middle = start + samples(overlap, rate, fps) // 2
    stop = max(start, min(middle, before.wave.shape[1]))
    begin = max(start, stop - round(FADE_S * rate))
    other = other[:, begin - start :]
    seam = _mixed(own[:, begin:stop], other[:, : stop - begin])
    parts = [own[:, :begin], seam, other[:, stop - begin :]]
    wave = np.concatenate(parts, axis=1)
    return Clip(frames, _fit(wave, samples(len(frames), rate, fps)))

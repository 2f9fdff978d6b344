"""Sizes that clips are brought to, and which of them a clip gets.

    "512x512x121,576x320x89" -> Bucket(height, width, frames) each

A clip goes to a bucket whose length it can fill: the one with the nearest aspect (by
its logarithm, so that 1:2 is as far from 1:1 as 2:1), of those the longest, of those
the largest that does not enlarge the picture. One batch holds clips of one bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from idlora_jax import geometry
from idlora_jax.types import VideoGrid

_FORM = "HEIGHTxWIDTHxFRAMES, for example 512x512x121,576x320x89"


@dataclass(frozen=True)
class Bucket:
    """A size: pixels, and frames (8k+1)."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    def grid(self, fps: float | int) -> VideoGrid:
        """The same as a video at a rate.

        Raises:
            ValueError: for sides that are no multiples of 32, or frames not 8k+1.
        """
        return geometry.video_grid(self.frames, self.height, self.width, fps)


def _one(text: str) -> Bucket:
    parts = text.strip().lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"buckets: got {text.strip()!r}, expected {_FORM}")
    return Bucket(*map(int, parts))


def parse(text: str, fps: float | int) -> tuple[Bucket, ...]:
    """Read a list of buckets.

    Raises:
        ValueError: for another form, impossible sizes, or a size given twice.
    """
    found = tuple(map(_one, text.split(",")))
    if len(set(found)) < len(found):
        raise ValueError(f"buckets: got a size twice in {text}, expected each once")
    for bucket in found:
        geometry.audio_grid(bucket.grid(fps).frames, fps)
    return found


def choose(
    buckets: Sequence[Bucket], size: tuple[int, int], frames: int
) -> Bucket | None:
    """The bucket of a clip; None if it is too short for all.

    Args:
        buckets: to choose from.
        size: its height and width in pixels.
        frames: that it has.
    """
    height, width = size

    def badness(bucket: Bucket) -> tuple[float, int, bool, int, int]:
        aspect = math.log(bucket.width / bucket.height) - math.log(width / height)
        area = bucket.height * bucket.width
        larger = bucket.height > height or bucket.width > width
        # Of those that enlarge, the smallest; of those that do not, the largest.
        extent = area if larger else -area
        return round(abs(aspect), 6), -bucket.frames, larger, extent, bucket.height

    fitting = [bucket for bucket in buckets if bucket.frames <= frames]
    return min(fitting, key=badness, default=None)

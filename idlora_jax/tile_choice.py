"""How a clip is cut for decoding: into the largest tiles that there is room for.

A clip that is decoded at once is exact; tiles are blended where they overlap, and the
larger they are, the less of a clip they blend. So `CHOICES` are tried from the first
on, and settings of one's own win (`--tile-size`, `--tile-frames`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from idlora_jax.model.tiling import Tiles
from idlora_jax.sample_config import SampleConfig

Cut = Tiles | None | Literal["usual"]
"""None: not at all; "usual": by its size alone, see `codecs.usual_tiles`."""

CHOICES: tuple[Tiles | None, ...] = (
    None,
    Tiles(size=None),
    Tiles(size=768),
    Tiles(),
    Tiles(size=256),
    Tiles(size=256, frames=24, frames_overlap=8),
)
"""From what needs most memory to what needs least."""
SPARE = 0.05
"""Share of a device that is left free: estimates are no measurements."""


def explicit(config: SampleConfig) -> Cut:
    """What the settings say; "usual" if nothing.

    Raises:
        ValueError: for sizes that are no multiples of 32 pixels or 8 frames.
    """
    size, frames = config.tile_size, config.tile_frames
    if size is None and frames is None:
        return "usual"
    size = Tiles.size if size is None else size or None
    frames = Tiles.frames if frames is None else frames or None
    if size is None and frames is None:
        return None
    overlap = Tiles.overlap if size is None else min(Tiles.overlap, size - 32)
    shared = Tiles.frames_overlap
    shared = shared if frames is None else min(shared, frames - 8)
    return Tiles(size, overlap, frames, shared)


def largest(work: Callable[[Tiles | None], int], room: int) -> tuple[Tiles | None, int]:
    """The first of `CHOICES` that fits, or the last one, and what it needs.

    Args:
        work: bytes that decoding in such tiles needs.
        room: bytes that there are.
    """
    need = 0
    for tiles in CHOICES:
        need = work(tiles)
        if need <= room:
            return tiles, need
    return CHOICES[-1], need


def told(tiles: Cut) -> str:
    """The choice in words."""
    if tiles == "usual":
        return ""
    if tiles is None:
        return ", decoded at once"
    side = "whole frames" if tiles.size is None else f"{tiles.size} pixels"
    time = "its whole length" if tiles.frames is None else f"{tiles.frames + 1} frames"
    return f", decoded in tiles of {side}, {time}"

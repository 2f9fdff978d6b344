"""Cutting a clip into overlapping tiles: which, and what they count for.

A tile is a product of three spans, over time, rows and columns. Where tiles overlap,
what a network makes of them is averaged with weights that fade from one to the next:

    y = sum_n w_n y_n / sum_n w_n

The tiles are all products of the spans, so the weights and their sum are products too:
each axis is normalised by itself, here on the host.

A network sees padding at the edge of a tile instead of the neighbours. Decoding fades
that out, and drops the first frame of a later tile, which the network takes for the
first of a clip. Encoding drops whole latent cells instead.

Source: `ltx_core/model/video_vae/tiling.py`; `video_vae.py: tiled_decode, tiled_encode`
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

Layout = Literal["even", "reference"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Tiles:
    """How clips are cut.

    Attributes:
        size: pixels along a side of a tile, at most; None does not cut frames.
        overlap: pixels that neighbours share, at least.
        frames: of a tile, at most, less one: 64 means 65; None does not cut time.
        frames_overlap: frames that neighbours share, at least, less one.
        layout: "even" cuts an axis into the fewest spans of one length, evenly spread,
            so that a network is compiled for one shape of tile. "reference" repeats the
            reference's cutting, which leaves shorter tiles at the ends (up to twelve
            shapes) and cuts the shorter side of a frame finer.
    """

    size: int | None = 512
    overlap: int = 64
    frames: int | None = 64
    frames_overlap: int = 24
    layout: Layout = "even"


@dataclass(frozen=True)
class Tile:
    """A tile along one axis.

    It reads `size` cells from `start` and gives `length` cells from `at`, of which it
    drops some and fades some at either end.
    """

    start: int
    size: int
    at: int
    length: int
    drop: tuple[int, int] = (0, 0)
    fade: tuple[int, int] = (0, 0)

    @property
    def end(self) -> int:
        """One past the last cell it gives."""
        return self.at + self.length


Axis = tuple[Tile, ...]


@dataclass(frozen=True)
class Plan:
    """The tiles of a clip along each axis."""

    time: Axis
    rows: Axis
    columns: Axis

    @property
    def chunks(self) -> tuple[int, ...]:
        """How many frames (or latent frames) are finished after each tile in time."""
        stops = [*(tile.at for tile in self.time[1:]), self.time[-1].end]
        return tuple(
            stop - tile.at for tile, stop in zip(self.time, stops, strict=True)
        )


def _check(name: str, got: int, unit: int, low: int, high: int | None = None) -> None:
    """Raise unless `got` is a multiple of `unit` in [low, high]."""
    nearest = max(low, unit * round(got / unit))
    if high is not None:
        nearest = min(nearest, high)
    if got != nearest:
        most = "" if high is None else f" and at most {high}"
        raise ValueError(
            f"tiles: {name} must be a multiple of {unit}, at least {low}{most}, "
            f"got {got} (use {nearest})"
        )


def _cells(tiles: Tiles, axis: str, unit: int, least: int = 0) -> tuple[int, int]:
    """Size and overlap in latent cells; the overlap is at least `least` of them."""
    names = ("size", "overlap") if axis == "side" else ("frames", "frames_overlap")
    size, overlap = (getattr(tiles, name) for name in names)
    _check(names[0], size, unit, unit * max(2, least + 1))
    _check(names[1], overlap, unit, 0, size - unit)
    return size // unit, max(overlap // unit, least)


def _fewest(length: int, size: int, overlap: int) -> int:
    """How many spans of `size` that share `overlap` cover `length`."""
    return 1 if length <= size else -(-(length - overlap) // (size - overlap))


def _spread(length: int, size: int, overlap: int) -> list[Span]:
    """The fewest spans of `size` cells that share `overlap`, with equal gaps."""
    if length <= size:
        return [(0, length)]
    last = _fewest(length, size, overlap) - 1
    starts = (n * (length - size) // last for n in range(last + 1))
    return [(start, start + size) for start in starts]


def _fitted(length: int, size: int, overlap: int) -> list[Span]:
    """As `_spread`, with the smallest size that needs no more spans."""
    count = _fewest(length, size, overlap)
    return _spread(length, -(-(length + (count - 1) * overlap) // count), overlap)


def _stepped(length: int, count: int, size: int, overlap: int) -> list[Span]:
    """Spans of `size` cells that share `overlap`; the last ends with the axis."""
    starts = [n * (size - overlap) for n in range(count)]
    return [(s, length if s == starts[-1] else s + size) for s in starts]


def _shared(spans: list[Span]) -> list[int]:
    """Cells that each span shares with the one before it, and 0 at both ends."""
    pairs = itertools.pairwise(spans)
    return [0, *(before[1] - after[0] for before, after in pairs), 0]


def _decode_sides(tiles: Tiles, sides: Span, factor: int) -> tuple[Axis, Axis]:
    spans = [[(0, side)] for side in sides]
    if tiles.size is not None:
        size, o = _cells(tiles, "side", factor)
        if tiles.layout == "even":
            spans = [_fitted(side, size, o) for side in sides]
        else:
            finer = [max(2, o + 1, round(size * n / max(sides))) for n in sides]
            pairs = zip(sides, finer, strict=True)
            spans = [_stepped(n, _fewest(n, s, o), s, o) for n, s in pairs]

    def axis(spans: list[Span]) -> Axis:
        fades = [factor * s for s in _shared(spans)]
        return tuple(
            Tile(a, b - a, a * factor, (b - a) * factor, fade=(fades[n], fades[n + 1]))
            for n, (a, b) in enumerate(spans)
        )

    return axis(spans[0]), axis(spans[1])


def _decode_time(tiles: Tiles, length: int, factor: int) -> Axis:
    spans = [(0, length)]
    if tiles.frames is not None:
        size, o = _cells(tiles, "time", factor)
        if tiles.layout == "even":
            spans = _spread(length, size + 1, o + 1)
        else:
            spans = _stepped(length, _fewest(length, size, o), size, o)
            spans = [(max(a - 1, 0), b) for a, b in spans]
    fades = [factor * max(s - 1, 0) for s in _shared(spans)]
    return tuple(
        Tile(
            start=a,
            size=b - a,
            at=a * factor,
            length=(b - a - 1) * factor + 1,
            drop=(min(n, 1), 0),
            fade=(fades[n], fades[n + 1]),
        )
        for n, (a, b) in enumerate(spans)
    )


def decode_plan(
    tiles: Tiles, size: tuple[int, int, int], factors: tuple[int, int]
) -> Plan:
    """The tiles for decoding.

    Args:
        tiles: how to cut.
        size: latent frames, rows and columns.
        factors: frames and pixels per latent cell.

    Raises:
        ValueError: naming the nearest valid size or overlap.

    Source: `ltx_core/model/video_vae/video_vae.py: VideoDecoder._prepare_tiles`.
    """
    rows, columns = _decode_sides(tiles, size[1:], factors[1])
    return Plan(_decode_time(tiles, size[0], factors[0]), rows, columns)


def _encode_sides(tiles: Tiles, sides: Span, factor: int) -> tuple[Axis, Axis]:
    even = tiles.layout == "even"
    spans = [[(0, side)] for side in sides]
    if tiles.size is not None:
        size, o = _cells(tiles, "side", factor, least=2)
        if even:
            spans = [_fitted(side, size, o) for side in sides]
        else:
            counts = [_fewest(side, size, o) for side in sides]
            pairs = zip(sides, counts, strict=True)
            spans = [_stepped(side, count, size, o) for side, count in pairs]

    def axis(spans: list[Span]) -> Axis:
        # Change over in the middle of what two share, or as the reference near its end.
        shared = _shared(spans)
        ends = [s // 2 if even else min(s, 1) for s in shared]
        return tuple(
            Tile(
                start=a * factor,
                size=(b - a) * factor,
                at=a,
                length=b - a,
                drop=(shared[n] - ends[n], ends[n + 1]),
            )
            for n, (a, b) in enumerate(spans)
        )

    return axis(spans[0]), axis(spans[1])


def _encode_time(tiles: Tiles, length: int, factor: int) -> Axis:
    even = tiles.layout == "even"
    spans = [(0, length)]
    if tiles.frames is not None:
        size, o = _cells(tiles, "time", factor, least=2)
        if even:
            spans = _spread(length, size + 1, o + 1)
        elif length > size:
            count = (length - 1 - o) // (size - o) + 1
            spans = _stepped(length, count, size + 1, o + 1)
    # No frame changes what is before it, so a tile is good up to its end. The reference
    # lets the next one begin a cell earlier, and averages that cell.
    drops = [max(s - (not even), 0) for s in _shared(spans)]
    return tuple(
        Tile(
            start=a * factor,
            size=(b - a - 1) * factor + 1,
            at=a,
            length=b - a,
            drop=(drops[n], 0),
        )
        for n, (a, b) in enumerate(spans)
    )


def encode_plan(
    tiles: Tiles, size: tuple[int, int, int], factors: tuple[int, int]
) -> Plan:
    """The tiles for encoding; neighbours share at least two latent cells.

    Args:
        tiles: how to cut.
        size: latent frames, rows and columns.
        factors: frames and pixels per latent cell.

    Raises:
        ValueError: naming the nearest valid size or overlap.

    Source: `ltx_core/model/video_vae/video_vae.py: prepare_tiles_for_encoding`.
    """
    rows, columns = _encode_sides(tiles, size[1:], factors[1])
    return Plan(_encode_time(tiles, size[0], factors[0]), rows, columns)


def weights(axis: Axis) -> list[Float32[np.ndarray, " N"]]:
    """What each tile counts for at each cell it gives; they add up to one.

    A fade over n cells takes the values 1/(n+1) .. n/(n+1), before normalising.

    Source: `ltx_core/model/video_vae/tiling.py: compute_trapezoidal_mask_1d`.
    """
    total = np.zeros(max(tile.end for tile in axis))
    raw = []
    for tile in axis:
        w = np.ones(tile.length)
        (first, last), (fade_in, fade_out) = tile.drop, tile.fade
        stop = tile.length - last
        w[:first] = w[stop:] = 0
        w[first : first + fade_in] *= np.arange(1, fade_in + 1) / (fade_in + 1)
        w[stop - fade_out : stop] *= np.arange(fade_out, 0, -1) / (fade_out + 1)
        total[tile.at : tile.end] += w
        raw.append(w)
    pairs = zip(axis, raw, strict=True)
    return [(w / total[tile.at : tile.end]).astype(np.float32) for tile, w in pairs]

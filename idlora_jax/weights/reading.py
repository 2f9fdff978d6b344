"""Parts of an array in a file, by position, into new memory.

Exactly the rows that are needed are read, and nothing is memory-mapped: resident memory
is what the caller holds, and a file cut short behind its back is an error, not a bus
error that kills the process.
"""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from idlora_jax.files import PathLike, problem
from idlora_jax.weights.header import Header, state

Shape = tuple[int, ...]

_LONG_ROW = 1 << 18
"""Bytes from which on a row is worth a system call of its own."""

_BLOCK = 1 << 20
"""Bytes of short rows read together; they stay in a core's cache."""

_AT_ONCE = 1 << 26
"""Bytes of a system call at most, so that ^C gets through on a slow disk."""


class File:
    """An opened file: a descriptor on first use, closed when nobody refers to it."""

    def __init__(self, path: PathLike, found: Header) -> None:
        self.path = os.path.abspath(path)
        self.starts = found.starts
        self._state = found.state

    @functools.cached_property
    def descriptor(self) -> int:
        """Of the very file whose header was read."""
        found = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, found)
        if state(os.fstat(found)) != self._state:
            got, do = "a file that was changed", "open it again"
            raise problem("weights", self.path, got, "the one that was opened", do)
        return found

    def fill(self, out: np.ndarray, start: int) -> None:
        """Fill a contiguous array with the bytes from `start` on."""
        view: Any = out.reshape(-1).view(np.uint8).data
        while view:
            # A system may read less than asked.
            count = os.preadv(self.descriptor, [view[:_AT_ONCE]], start)
            if count == 0:
                got, do = f"a file that ends at byte {start:,}", "copy it again"
                raise problem("weights", self.path, got, "a longer one", do)
            view, start = view[count:], start + count


def range_of(cut: slice, size: int, name: str) -> range:
    """The indices that a slice takes of an axis; raises if they go backwards."""
    found = range(*cut.indices(size))
    if found.step < 0:
        raise ValueError(f"{name}: got a step of {found.step}, expected one from 1 up")
    return found


def take(
    file: File, out: np.ndarray, ranges: Sequence[range], shape: Shape, start: int
) -> None:
    """Fill `out` with a part of a tensor of `shape` at byte `start` of the file.

    Rows outside a leading axis' range are skipped. Long rows are taken one by one,
    short ones by the block, as many system calls would cost more than the bytes.
    """
    if not out.size:
        return
    inner = shape[1:]
    row = math.prod(inner) * out.itemsize
    whole = out.shape[1:] == inner
    if not shape or (whole and ranges[0].step == 1):
        file.fill(out, start + (ranges[0].start * row if shape else 0))
    elif inner and row > _LONG_ROW:
        for index, part in zip(ranges[0], out, strict=True):
            take(file, part, ranges[1:], inner, start + index * row)
    else:
        cuts = tuple(slice(r.start, r.stop, r.step) for r in ranges[1:])
        _take_blocks(file, out, ranges[0], cuts, inner, start)


def _take_blocks(
    file: File,
    out: np.ndarray,
    rows: range,
    cuts: tuple[slice, ...],
    inner: Shape,
    start: int,
) -> None:
    """Fill `out` with parts of short rows, whole rows being read."""
    row = math.prod(inner) * out.itemsize
    at_once = max(1, _BLOCK // (row * rows.step))
    for first in range(0, len(rows), at_once):
        some = rows[first : first + at_once]
        block = np.empty((some[-1] + 1 - some[0], *inner), out.dtype)
        file.fill(block, start + some[0] * row)
        out[first : first + at_once] = block[(slice(None, None, rows.step), *cuts)]

"""Where each parameter of a network lies in a file, before anything is read.

A `Leaf` knows the shape of one parameter and hands out its pieces: the layers of a
stack one by one, in our axis order, or the whole of anything else. Reading, converting
and exporting all consume leaves, so memory holds one piece beside what is being made.

`from_original` and `from_converted` find the leaves a network needs, given its
parameters' shapes, and refuse a file that lacks some, has others, or other shapes: all
offenders in one message, by the names the file uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from idlora_jax.types import Tree
from idlora_jax.weights import rules
from idlora_jax.weights.rules import Rule
from idlora_jax.weights.tensorfile import Entry, Spec, Tensors

SHOWN = 12
STRIP = 128
AS_STORED = ("_fp8", "_scale", "_row", "_int8", "_scales")
"""Ends of the paths of parts that are never cast; see `fp8` and `int8`."""
Shape = tuple[int, ...]


class Source(NamedTuple):
    """A parameter in the file's terms: our shape, its keys in layer order, the rule."""

    shape: Shape
    keys: tuple[str, ...]
    rule: Rule

    @property
    def stacked(self) -> bool:
        """Whether the keys are layers."""
        return "{L}" in self.rule.torch

    @property
    def order(self) -> Shape:
        """The permutation from the file's axes to ours."""
        return rules.to_ours(self.rule.layout, len(self.shape) - self.stacked)

    @property
    def torch_shape(self) -> Shape:
        """The shape of one key's tensor in the file."""
        piece = self.shape[1:] if self.stacked else self.shape
        return tuple(piece[axis] for axis in np.argsort(self.order))


class Narrow(NamedTuple):
    """Which pieces of a parameter are stored in 8 bits, and what scales them.

    Attributes:
        dtype: of these pieces.
        at: their numbers, ascending.
        stacked: whether pieces are layers; otherwise the parameter is one piece.
        scales: by the end of our paths, e.g. "_scale": one number for each of them, or
            one for each of their output channels.
    """

    dtype: np.dtype
    at: tuple[int, ...]
    stacked: bool
    scales: Mapping[str, Leaf]


class Leaf(NamedTuple):
    """One parameter: shape and stored dtype, and its pieces by number.

    Where some pieces are stored in 8 bits (`narrow`), they come as they are, and the
    dtype is that of the others; see `fp8`.
    """

    spec: Spec
    count: int
    piece: Callable[[int], np.ndarray]
    narrow: Narrow | None = None

    def dtype_of(self, index: int) -> np.dtype:
        """The stored dtype of one piece."""
        narrow = self.narrow is not None and index in self.narrow.at
        return self.narrow.dtype if narrow else self.spec.dtype  # pyright: ignore


class Where(NamedTuple):
    """For errors: the file and network, and what to do about a mismatch."""

    what: str
    todo: str


def kept_dtype(path: str, stored: np.dtype, wanted: Any | None) -> np.dtype:
    """The dtype of a parameter when `wanted` is asked for (None: as stored).

    Scale and shift tables that a file holds in float32 stay so, and so does what a
    parameter in 8 bits is made of.
    """
    table = path.endswith("table") and stored == np.float32
    if wanted is None or table or path.endswith(AS_STORED):
        return stored
    return np.dtype(wanted)


def widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that holds the values of all of them: of a stack of several."""
    found = sorted(set(dtypes), key=lambda dtype: dtype.itemsize)
    if len(found) > 1 and found[-1].itemsize == found[-2].itemsize == 2:
        return np.dtype(np.float32)  # float16 and bfloat16: neither holds the other
    return found[-1]


def copy(out: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """Fill contiguous `out` with a permuted array, casting; returns `out`.

    In strips of the last axis, the file's first: three times as fast as at once, which
    misses the cache at every element (measured, bfloat16 [16384 4096]).
    """
    if piece.ndim < 2 or piece.flags.c_contiguous:
        out[...] = piece
        return out
    for start in range(0, piece.shape[-1], STRIP):
        out[..., start : start + STRIP] = piece[..., start : start + STRIP]
    return out


def read(leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    """The whole parameter; holds one piece beside the result."""
    assert leaf.narrow is None, "widen it, or take its parts: see fp8"
    out = np.empty(leaf.spec.shape, dtype)
    flat, start = out.reshape(-1), 0
    for index in range(leaf.count):
        piece = leaf.piece(index)
        copy(flat[start : start + piece.size].reshape(piece.shape), piece)
        start += piece.size
    return out


def read_part(leaf: Leaf, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    """The part of a parameter that `index` cuts out; holds one piece beside it.

    Args:
        leaf: the parameter.
        index: one slice per axis, without steps.
        dtype: of the result.
    """
    ranges = [range(*s.indices(n)) for s, n in zip(index, leaf.spec.shape, strict=True)]
    out = np.empty([len(r) for r in ranges], dtype)
    # With an ellipsis, so that numbers too stay arrays.
    inside = (*(slice(r.start, r.stop) for r in ranges), ...)
    if leaf.count == 1:
        return copy(out, leaf.piece(0).reshape(leaf.spec.shape)[inside])
    for row, layer in enumerate(ranges[0]):
        copy(out[row, ...], leaf.piece(layer)[inside[1:]])
    return out


def sources(name: str, shapes: Tree, table: Iterable[Rule]) -> dict[str, Source]:
    """The keys of each parameter in a file of original names, by path.

    Args:
        name: of the network.
        shapes: its tree of things with a shape.
        table: its rules.

    Raises:
        KeyMismatchError: if a parameter fits no rule or several.
    """
    match = rules.matcher(tuple(table), "flax")
    out: dict[str, Source] = {}
    for path, like in rules.flatten(shapes).items():
        shape = tuple(like.shape)
        named = rules.keys_of(f"{name}/{path}", shape[0] if shape else 0, match)
        out[path] = Source(shape, tuple(key for key, _ in named), named[0][1])
    return out


def _compare(
    got: Mapping[str, Shape], expected: Mapping[str, Shape], where: Where
) -> None:
    missing = [f"missing: {k} {list(s)}" for k, s in expected.items() if k not in got]
    foreign = [f"unexpected: {k}" for k in got if k not in expected]
    wrong = [
        f"wrong shape: {k}: got {list(got[k])}, expected {list(s)}"
        for k, s in expected.items()
        if k in got and got[k] != s
    ]
    lines = missing + wrong + foreign
    if not lines:
        return
    more = f"\n  ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    listing = "".join(f"\n  {line}" for line in lines[:SHOWN]) + more
    raise ValueError(
        f"{where.what}: got {len(got)} tensors, expected {len(expected)}; "
        f"{len(missing)} missing, {len(wrong)} of a wrong shape, {len(foreign)} "
        f"unexpected:{listing}\n{where.todo}"
    )


def from_original(
    tensors: Tensors,
    keys: Iterable[str],
    needed: Mapping[str, Source],
    where: Where,
    also: Mapping[str, Shape] | None = None,
) -> dict[str, Leaf]:
    """Leaves of a network in a file of original key names.

    Args:
        tensors: the open file.
        keys: those of its keys that belong to the network.
        needed: from `sources`.
        where: for the error.
        also: further keys that must be there, and their shapes.

    Raises:
        ValueError: listing missing keys, wrong shapes and unexpected keys.
    """
    expected = {key: s.torch_shape for s in needed.values() for key in s.keys}
    expected |= dict(also or {})
    _compare({key: tensors.specs[key].shape for key in keys}, expected, where)

    def leaf(source: Source) -> Leaf:
        stored = [tensors.specs[key].dtype for key in source.keys]
        wide = widest(stored)

        def piece(index: int) -> np.ndarray:
            return tensors.tensor(source.keys[index]).transpose(source.order)

        return Leaf(Spec(source.shape, wide), len(source.keys), piece)

    return {path: leaf(source) for path, source in needed.items()}


def from_converted(
    tensors: Tensors,
    needed: Mapping[str, Source],
    where: Where,
    also: Mapping[str, Shape] | None = None,
) -> dict[str, Leaf]:
    """Leaves of a network in a converted file, whose names are our paths.

    Args:
        tensors: the open file.
        needed: from `sources`.
        where: for the error.
        also: further paths that must be there, and their shapes.

    Raises:
        ValueError: listing missing paths, wrong shapes and unexpected paths.
    """
    got = {path: spec.shape for path, spec in tensors.specs.items()}
    expected = {path: source.shape for path, source in needed.items()}
    _compare(got, expected | dict(also or {}), where)

    def leaf(path: str, source: Source) -> Leaf:
        def piece(index: int) -> np.ndarray:
            stacked = source.stacked
            return tensors.layer(path, index) if stacked else tensors.tensor(path)

        return Leaf(tensors.specs[path], len(source.keys), piece)

    return {path: leaf(path, source) for path, source in needed.items()}


def from_arrays(tree: Tree, needed: Mapping[str, Source]) -> dict[str, Leaf]:
    """Leaves of a network's parameters in memory."""

    def leaf(array: np.ndarray, source: Source) -> Leaf:
        def piece(index: int) -> np.ndarray:
            return array[index] if source.stacked else array

        return Leaf(Spec(array.shape, array.dtype), len(source.keys), piece)

    flat = rules.flatten(tree)
    return {path: leaf(np.asarray(flat[path]), s) for path, s in needed.items()}


def original_entries(
    leaves: Mapping[str, Leaf], needed: Mapping[str, Source]
) -> list[Entry]:
    """The tensors under original names that leaves stand for, to be written."""

    def entry(leaf: Leaf, source: Source, index: int) -> Entry:
        spec = Spec(source.torch_shape, leaf.dtype_of(index))
        back = np.argsort(source.order)

        def pieces() -> Iterator[np.ndarray]:
            out = np.empty(spec.shape, spec.dtype)
            yield copy(out, leaf.piece(index).transpose(back))

        return Entry(source.keys[index], spec, pieces)

    return [
        entry(leaves[path], source, index)
        for path, source in needed.items()
        for index in range(len(source.keys))
    ]


def our_entries(leaves: Mapping[str, Leaf], dtype: Any | None) -> list[Entry]:
    """The stacked tensors under our paths that leaves stand for, to be written."""

    def entry(path: str, leaf: Leaf) -> Entry:
        assert leaf.narrow is None, "widen it, or take its parts: see fp8"
        target = kept_dtype(path, leaf.spec.dtype, dtype)

        def pieces() -> Iterator[np.ndarray]:
            for n in range(leaf.count):
                piece = leaf.piece(n)
                yield copy(np.empty(piece.shape, target), piece)

        return Entry(path, Spec(leaf.spec.shape, target), pieces)

    return [entry(path, leaf) for path, leaf in leaves.items()]

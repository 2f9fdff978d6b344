"""Safetensors files: reading parts of tensors, and writing piece by piece.

What is checked before anything is read is said in `header`, how parts are read in
`reading`.

`write` puts the header first and then asks for one piece of a tensor at a time, so that
memory holds one piece, and a file appears whole or not at all. What we write carries
the sha256 of itself under the metadata key "base_hash": of the file's bytes with that
value replaced by 64 zeros.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from idlora_jax.files import PathLike, problem, replacing
from idlora_jax.weights.header import DTYPES, Header, Spec, header, shown
from idlora_jax.weights.reading import File, range_of, take

__all__ = [
    "DTYPES",
    "HASH",
    "NAMES",
    "Entry",
    "Header",
    "Spec",
    "Tensors",
    "entry",
    "header",
    "joined",
    "tensors_of",
    "verify",
    "write",
]

NAMES = {dtype: name for name, dtype in DTYPES.items()}
HASH = "base_hash"
_ZEROS = "0" * 64
_BLOCK = 1 << 24
Index = tuple[slice, ...]


class Entry(NamedTuple):
    """A tensor to be written: its pieces, one after the other, make it up."""

    name: str
    spec: Spec
    pieces: Callable[[], Iterable[np.ndarray]]


def entry(name: str, array: np.ndarray) -> Entry:
    """An entry of one piece that is in memory."""
    return Entry(name, Spec(array.shape, array.dtype), lambda: (array,))


def _field(value: str) -> bytes:
    """The hash as it stands in a header."""
    return f'"{HASH}":"{value}"'.encode()


def _ordered(entries: Iterable[Entry]) -> list[Entry]:
    # Wide dtypes first, so that every tensor is aligned to its item size.
    return sorted(entries, key=lambda e: (-e.spec.dtype.itemsize, e.name))


def _header_bytes(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    out: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, spec, _ in entries:
        end = start + spec.nbytes
        dtype = NAMES[spec.dtype]
        out[name] = {"dtype": dtype, "shape": spec.shape, "data_offsets": [start, end]}
        start = end
    if len(out) <= len(entries):
        raise ValueError("weights: a tensor is named twice, or '__metadata__'")
    text = json.dumps(out, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _data(e: Entry) -> Iterator[memoryview]:
    """The pieces as contiguous bytes, checked to make up the tensor."""
    done = 0
    for piece in e.pieces():
        if piece.dtype != e.spec.dtype:
            raise ValueError(
                f"{e.name}: got a piece of {piece.dtype}, expected {e.spec.dtype}"
            )
        done += piece.nbytes
        yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    if done != e.spec.nbytes:
        raise ValueError(f"{e.name}: got {done} bytes, expected {e.spec.nbytes}")


def write(
    path: PathLike, entries: Iterable[Entry], metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors piece by piece under a temporary name, then rename.

    Args:
        path: the .safetensors file; replaced if it is there.
        entries: tensors in any order; the same ones give the same bytes.
        metadata: text by key; "base_hash" is added.

    Returns:
        The recorded hash, see the module's text.

    Raises:
        ValueError: if the pieces of a tensor do not make it up.
        OSError: if it cannot be written; nothing is left behind.
    """
    ordered = _ordered(entries)
    text = _header_bytes(ordered, {**(metadata or {}), HASH: _ZEROS})
    length = len(text).to_bytes(8, "little")
    place = 8 + text.index(_field(_ZEROS)) + _field("").index(b'""') + 1
    digest = hashlib.sha256(length + text)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(length + text)
        for e in ordered:
            for data in _data(e):
                file.write(data)
                digest.update(data)
        file.seek(place)
        file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def verify(path: PathLike, *, progress: Callable[[int], Any] | None = None) -> bool:
    """Whether a file that `write` made still has the contents of its recorded hash.

    Args:
        path: the .safetensors file.
        progress: takes the number of bytes that were read since its last call; they sum
            up to the file's size.

    Raises:
        ValueError: if the file is truncated, not safetensors, or records no hash.
    """
    recorded = header(path).metadata.get(HASH, "")
    if len(recorded) != len(_ZEROS):
        got, do = "a file without a recorded hash", "convert it, which records one"
        raise problem("verify", path, got, f"{HASH!r} in its metadata", do)
    with open(path, "rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
        digest = hashlib.sha256(length + text.replace(_field(recorded), _field(_ZEROS)))
        block = length + text
        while block:
            if progress is not None:
                progress(len(block))
            block = file.read(_BLOCK)
            digest.update(block)
    return digest.hexdigest() == recorded


class Tensors(NamedTuple):
    """Tensors of several files by name, read one at a time or in parts.

    Every method returns a new array, and raises a ValueError if the file was changed or
    cut short after it was opened.
    """

    specs: dict[str, Spec]
    files: dict[str, File]
    stored: Mapping[str, str] = MappingProxyType({})
    """The name in the file, of tensors that `renamed` gave another."""

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The same tensors under other names.

        Args:
            names: present name by new name; tensors that it lacks are left out.
        """
        specs = {new: self.specs[old] for new, old in names.items()}
        files = {new: self.files[old] for new, old in names.items()}
        stored = {new: self.stored.get(old, old) for new, old in names.items()}
        return Tensors(specs, files, stored)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.slice(name, ())

    def layer(self, name: str, index: int) -> np.ndarray:
        """One layer of a stacked tensor; the others are not read."""
        shape = self.specs[name].shape
        if not shape or not 0 <= index < shape[0]:
            raise ValueError(f"{name}: got layer {index} of a tensor {[*shape]}")
        return self.slice(name, (slice(index, index + 1),)).reshape(shape[1:])

    def slice(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor, as indexing the whole would give it.

        Args:
            name: of the tensor.
            index: a slice for each leading axis; the others are taken whole. Steps are
                positive.

        Raises:
            ValueError: if there are more slices than axes, or a step is negative.
        """
        spec, file = self.specs[name], self.files[name]
        if len(index) > len(spec.shape):
            got = f"{len(index)} slices of a tensor {[*spec.shape]}"
            raise ValueError(f"{name}: got {got}")
        cuts = (*index, *(slice(None) for _ in spec.shape[len(index) :]))
        ranges = [range_of(c, n, name) for c, n in zip(cuts, spec.shape, strict=True)]
        # As integers: numpy copies strided bfloat16 value by value, which takes longer.
        out = np.empty([len(r) for r in ranges], f"u{spec.dtype.itemsize}")
        start = file.starts[self.stored.get(name, name)]
        take(file, out, ranges, spec.shape, start)
        return out.view(spec.dtype)


def tensors_of(*paths: PathLike) -> Tensors:
    """Open files for reading; nothing is read but their headers.

    Raises:
        ValueError: if a file is missing, truncated, or not safetensors, or two of them
            hold a tensor of the same name.
    """
    specs: dict[str, Spec] = {}
    files: dict[str, File] = {}
    for path in paths:
        found = header(path)
        file = File(path, found)
        twice = next((name for name in found.tensors if name in files), None)
        if twice is not None:
            got = f"tensor {shown(twice)}, which {files[twice].path} has, too"
            do = "give each file once, and the files of one checkpoint only"
            raise problem("weights", file.path, got, "every name once", do)
        specs |= found.tensors
        files |= dict.fromkeys(found.tensors, file)
    return Tensors(specs, files)


def joined(parts: Iterable[Tensors]) -> Tensors:
    """The tensors of several views, which have no name in common."""
    specs: dict[str, Spec] = {}
    files: dict[str, File] = {}
    stored: dict[str, str] = {}
    for part in parts:
        assert not specs.keys() & part.specs.keys(), "a name twice"
        specs |= part.specs
        files |= part.files
        stored |= part.stored
    return Tensors(specs, files, stored)

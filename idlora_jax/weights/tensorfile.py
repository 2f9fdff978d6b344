"""Safetensors files: a checked look at the header, and writing piece by piece.

A file is 8 bytes (length of the header), the header (JSON: dtype, shape and place of
every tensor, and text metadata), the data. `header` reads the first two and compares
the announced size with the real one, so that a truncated file is refused before any
tensor is read. `write` puts the header first and then asks for one piece of a tensor at
a time, so that memory holds one piece, and a file appears whole or not at all.

What we write carries the sha256 of itself under the metadata key "base_hash": of the
file's bytes with that value replaced by 64 zeros.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import safe_open

from idlora_jax.files import PathLike, existing, problem, replacing

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HASH = "base_hash"
_ZEROS = "0" * 64
_LONGEST_HEADER = 100_000_000
_EXPECTED = "a .safetensors file"


class Spec(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """What a file says about itself: tensors, metadata, and a digest of saying so."""

    tensors: dict[str, Spec]
    metadata: dict[str, str]
    fingerprint: str


def _raw_header(path: PathLike, file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) == 8 and 2 <= length <= _LONGEST_HEADER:
        text = file.read(length)
        if len(text) < length and text[:1] == b"{":
            got = f"a header cut off after {len(text):,} of {length:,} bytes"
            raise problem("weights", path, got, "a whole file", "download it again")
        try:
            return text, json.loads(text)
        except ValueError:
            pass
    got = f"a file that starts with {start!r}"
    hint = "a git-lfs pointer, a web page or a .pt file is not one; download it again"
    raise problem("weights", path, got, _EXPECTED, hint)


def header(path: PathLike) -> Header:
    """Read and check the header of a safetensors file.

    Returns:
        Tensors by name, metadata, and the fingerprint: a sha256 of header and size,
        which tells foreign files apart without reading their gigabytes.

    Raises:
        ValueError: if the file is missing, truncated, or not safetensors.
    """
    with open(existing("weights", path, _EXPECTED), "rb") as file:
        raw, entries = _raw_header(path, file)
    size = os.path.getsize(path)
    metadata = entries.pop("__metadata__", None) or {}
    end = max((e["data_offsets"][1] for e in entries.values()), default=0)
    announced = 8 + len(raw) + end
    if size != announced:
        got = f"{size:,} bytes"
        expected = f"{announced:,} bytes as its header says"
        raise problem("weights", path, got, expected, "copy or download it again")
    unknown = {e["dtype"] for e in entries.values()} - DTYPES.keys()
    if unknown:
        got, hint = f"dtypes {sorted(unknown)}", "use another form of the checkpoint"
        raise problem("weights", path, got, f"some of {sorted(DTYPES)}", hint)
    tensors = {
        name: Spec(tuple(e["shape"]), DTYPES[e["dtype"]]) for name, e in entries.items()
    }
    digest = hashlib.sha256(raw + b"%d" % size).hexdigest()
    return Header(tensors, metadata, digest)


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


def verify(path: PathLike) -> bool:
    """Whether a file that `write` made still has the contents of its recorded hash."""
    recorded = header(path).metadata.get(HASH, "")
    with open(path, "rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
        blank = text.replace(_field(recorded), _field(_ZEROS))
        digest = hashlib.sha256(length + blank)
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest() == recorded


class Tensors(NamedTuple):
    """Tensors of several files by name, memory-mapped, read one at a time."""

    specs: dict[str, Spec]
    files: dict[str, Any]

    def tensor(self, name: str) -> np.ndarray:
        """One tensor."""
        return self.files[name].get_tensor(name)

    def layer(self, name: str, index: int) -> np.ndarray:
        """One layer of a stacked tensor; the others are not read."""
        return self.files[name].get_slice(name)[index]


def tensors_of(*paths: PathLike) -> Tensors:
    """Open files for reading; nothing is read but their headers.

    Raises:
        ValueError: if a file is missing, truncated, or not safetensors.
    """
    specs: dict[str, Spec] = {}
    files: dict[str, Any] = {}
    for path in paths:
        found = header(path).tensors
        specs |= found
        files |= dict.fromkeys(found, safe_open(path, framework="numpy"))
    return Tensors(specs, files)

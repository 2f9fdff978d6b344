"""What a safetensors file says about itself, believed only after it was checked.

    8 bytes   length of the header
    header    JSON: dtype, shape and place [start, end) of every tensor, text metadata
    data      the tensors, without a gap, up to the end of the file

`header` reads the first two. Whatever it returns is consistent: every tensor lies
within the file, apart from the others, and has as many bytes as its shape and dtype
say, so that reading one needs no further check. Anything else is one ValueError that
says what was found, what was expected, and what to do.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from idlora_jax.files import PathLike, existing, problem

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Without F4 and F6, which pack several values into a byte: numpy has no such array."""

LONGEST = 1 << 25
"""Bytes of a header. Real ones have 1 MB; 32 MiB of brackets cost 0.85 GB."""

_AXES = 32
_LIMIT = 1 << 63
_FIELDS = ("dtype", "shape", "data_offsets")
_EXPECTED = "a .safetensors file"
_AGAIN = "copy or download it again"

_SIGNS = (
    (b"version https://git-lfs", "a git-lfs pointer", "fetch the file: git lfs pull"),
    (b"<", "a web page (HTML or XML)", "accept the licence, then download it again"),
    (b"PK\x03\x04", "a zip archive (.pt, .npz)", "use the .safetensors form of it"),
    (b"\x80", "a pickle (.pt, .ckpt)", "use the .safetensors form of it"),
    (b"GGUF", "a GGUF file", "use the .safetensors form of it"),
    (b"\x28\xb5\x2f\xfd", "a .zst archive", "unpack it first"),
    (b"\x1f\x8b", "a .gz archive", "unpack it first"),
    (b"{", "JSON text", "give the .safetensors file that it describes"),
)


class Spec(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """What a file says about itself.

    Attributes:
        tensors: by name, in the file's order of names.
        metadata: text by key.
        fingerprint: sha256 of header and size, which tells files apart without reading
            their gigabytes.
        starts: byte in the file where each tensor begins.
        state: changes when the file does.
    """

    tensors: dict[str, Spec]
    metadata: dict[str, str]
    fingerprint: str
    starts: dict[str, int]
    state: tuple[int, ...]


def state(stat: os.stat_result) -> tuple[int, ...]:
    """What tells that a file is still the one it was: place, size, time of change."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: object) -> str:
    """A value from a file for an error message: on one line, and cut if it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."


def recognise(start: bytes) -> tuple[str, str] | None:
    """What a file that is not safetensors looks like, by its first bytes.

    Returns:
        What it is and what to do, or None if its beginning is not known.
    """
    if not start:
        return "an empty file (0 bytes)", "download it again"
    bare = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    hits = [(what, do) for sign, what, do in _SIGNS if bare.startswith(sign)]
    return hits[0] if hits else None


def _foreign(path: PathLike, start: bytes) -> ValueError:
    unknown = f"a file that starts with {start[:8]!r}", "download it again"
    got, do = recognise(start) or unknown
    return problem("weights", path, got, _EXPECTED, do)


def _raw(path: PathLike, file: BinaryIO, size: int) -> bytes:
    """The header's bytes; refuses what cannot be one before reading it."""
    start = file.read(64)
    length, first = int.from_bytes(start[:8], "little"), start[8:9]
    if first != b"{" or length < 2 or (length > LONGEST and recognise(start[:8])):
        raise _foreign(path, start)
    if length > LONGEST:
        got, expected = f"a header of {length:,} bytes", f"at most {LONGEST:,}"
        raise problem("weights", path, got, expected, _AGAIN)
    if length + 8 > size:
        got = f"a header cut off after {size - 8:,} of {length:,} bytes"
        raise problem("weights", path, got, "a whole file", "download it again")
    file.seek(8)
    return file.read(length)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; which of two values of a name counts, no reader must guess."""
    out = dict(pairs)
    if len(out) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shown(twice)} twice")
    return out


def _parsed(path: PathLike, raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if isinstance(found, dict):
            "".join(found).encode("utf-8")
            return found
        got = f"a header that is a JSON {type(found).__name__}"
    except RecursionError:
        got = "a header of deeply nested JSON"
    except UnicodeError:
        got = "a header that is not UTF-8"
    except json.JSONDecodeError as error:
        got = f"a header that is no JSON ({error})"
    except ValueError as error:
        got = f"a header that cannot be read: it has {error}"
    raise problem("weights", path, got, "a JSON object", _AGAIN)


def _text(path: PathLike, found: object) -> dict[str, str]:
    """The metadata, if it is text by key."""
    if found is None:
        return {}
    got = f"metadata {shown(found)}"
    if isinstance(found, dict):
        try:
            "".join((*found, *found.values())).encode("utf-8")
            return found
        except UnicodeError:
            got = "metadata that is not UTF-8"
        except TypeError:
            odd = next(k for k, value in found.items() if not isinstance(value, str))
            got = f"metadata whose {shown(odd)} is {shown(found[odd])}"
    raise problem("weights", path, got, "text by key", _AGAIN)


def _sizes(value: object, longest: int) -> bool:
    """Whether a JSON value is a list of numbers that can be sizes (True is none)."""
    return (
        isinstance(value, list)
        and len(value) <= longest
        and all(type(x) is int and 0 <= x < _LIMIT for x in value)
    )


def _defect(entry: object) -> tuple[str, str, str] | None:
    """None, or what is wrong with a tensor's entry, what was expected, what to do."""
    if not isinstance(entry, dict) or entry.keys() != {*_FIELDS}:
        return f"entry {shown(entry)}", f"one of {', '.join(_FIELDS)}", _AGAIN
    dtype, shape, offsets = (entry[field] for field in _FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        do = "use another form of the checkpoint"
        return f"dtype {shown(dtype)}", f"one of {', '.join(DTYPES)}", do
    if not _sizes(shape, _AXES):
        return f"shape {shown(shape)}", f"at most {_AXES} sizes from 0 up", _AGAIN
    if not _sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {shown(offsets)}", "[start, end] in bytes", _AGAIN
    # numpy refuses an empty array, too, if its other axes make it too large.
    if math.prod(n for n in shape if n) >= _LIMIT >> 4:
        return f"shape {shown(shape)}", "one that can be addressed", _AGAIN
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        expected = f"{nbytes:,} for {dtype} {shown(shape)}"
        return f"{offsets[1] - offsets[0]:,} bytes", expected, _AGAIN
    return None


def _require_entries(path: PathLike, entries: Mapping[str, Any]) -> None:
    for name, entry in entries.items():
        defect = _defect(entry)
        if defect is not None:
            got, expected, do = defect
            got = f"tensor {shown(name)} with {got}"
            raise problem("weights", path, got, expected, do)


def _require_layout(
    path: PathLike, entries: Mapping[str, Any], start: int, size: int
) -> None:
    """Tensors one after the other, from the header's end to the file's."""
    end, before = 0, "the header"
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        first, last = entries[name]["data_offsets"]
        if first != end:
            what = "overlaps" if first < end else "leaves a gap after"
            got = f"tensor {shown(name)} at byte {first:,}, which {what} {before}"
            raise problem("weights", path, got, f"byte {end:,}", _AGAIN)
        end, before = last, shown(name)
    if size != start + end:
        expected = f"{start + end:,} bytes as its header says"
        raise problem("weights", path, f"{size:,} bytes", expected, _AGAIN)


_KNOWN: dict[str, Header] = {}
"""Headers by path: of the files that were read last."""
_MOST, _SETTLED_NS = 64, 10**9
"""How many of them are kept, and how long a file must not have changed before: two
changes at once have one time, so that nothing would tell them apart."""


def header(path: PathLike) -> Header:
    """Read and check the header of a safetensors file; of one that is known, look only.

    Raises:
        ValueError: if the file is missing, truncated, not safetensors, or its header
            contradicts itself or the file.
    """
    full = existing("weights", path, _EXPECTED)
    with open(full, "rb") as file:
        stat = os.fstat(file.fileno())
        known = _KNOWN.get(full)
        if known is not None and known.state == state(stat):
            return known
        raw = _raw(path, file, stat.st_size)
    found = _checked(path, raw, stat)
    _KNOWN.pop(full, None)
    if time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
        _KNOWN[full] = found
        for old in [*_KNOWN][:-_MOST]:
            _KNOWN.pop(old, None)
    return found


def _checked(path: PathLike, raw: bytes, stat: os.stat_result) -> Header:
    start = 8 + len(raw)
    entries = _parsed(path, raw)
    metadata = _text(path, entries.pop("__metadata__", None))
    _require_entries(path, entries)
    _require_layout(path, entries, start, stat.st_size)
    tensors = {
        name: Spec(tuple(e["shape"]), DTYPES[e["dtype"]]) for name, e in entries.items()
    }
    starts = {name: start + e["data_offsets"][0] for name, e in entries.items()}
    digest = hashlib.sha256(raw + b"%d" % stat.st_size).hexdigest()
    return Header(tensors, metadata, digest, starts, state(stat))

"""Files of `torch.save` (.pt, .pth, .bin) read without torch and without running them.

    archive/data.pkl    a pickle: the structure; a tensor is (storage, offset, sizes,
                        strides)
    archive/byteorder   "little" or "big"
    archive/data/<key>  the bytes of one storage, stored, not compressed

Such a pickle may name any function to be called on loading. Here it is data: see
`weights.pickles`. Everything it says of sizes is checked: a storage against its bytes,
a view against its storage, the sum of all entries against the file, so that reading
takes little more memory than the file. The form before torch 1.6 (five pickles and the
storages, one after the other) is read as well.

Source: torch/serialization.py: _save, _legacy_save; torch/_utils.py.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from idlora_jax.files import PathLike, existing, problem
from idlora_jax.weights import torch_views
from idlora_jax.weights.torch_views import View

_EXPECTED = "a file of torch.save with tensors, numbers, texts, dicts and lists"
_LARGEST_PICKLE, _TAIL = 1 << 22, 1 << 17
_EXPANSION, _ANY_EXPANSION = 4, 1 << 26
"""All tensors together may be this many times the file, plus this many bytes."""
Buffer = bytes | memoryview
File = BinaryIO | io.BytesIO
_MAGIC = 0x1950A86A20F9469CFC6C
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    LookupError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
)


def _filled(value: Any, leaf: Callable[[View], Any]) -> Any:
    """The structure with its tensors turned into something."""
    if isinstance(value, dict):
        return {key: _filled(v, leaf) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(v, leaf) for v in value)
    return leaf(value) if isinstance(value, View) else value


def _array(view: View, data: Buffer, order: str) -> np.ndarray:
    """The elements of a view, in the memory of `data`."""
    size = view.dtype.itemsize
    held = memoryview(data).nbytes
    if held != view.storage.nbytes:
        raise ValueError(f"{held:,} bytes for a storage of {view.storage.nbytes:,}")
    if 0 in view.shape:
        return np.zeros(view.shape, view.dtype)
    strides = [step * size for step in view.strides]
    array = np.ndarray(view.shape, view.dtype, data, view.start * size, strides)
    return array if order == "little" or size == 1 else array.byteswap()


def _arrays(
    structure: Any, read: Callable[[str], Buffer], order: str, size: int
) -> Any:
    """The structure with arrays; each storage is read once.

    A view may repeat elements (stride 0), and many views may share a storage: this
    costs nothing here, but all of them copied must not be far more than the file.
    """
    held: dict[str, Buffer] = {}
    left = _EXPANSION * size + _ANY_EXPANSION

    def array(view: View) -> np.ndarray:
        nonlocal left
        left -= view.spec.nbytes
        if left < 0:
            raise ValueError("tensors that expand to far more than is stored")
        key = view.storage.key
        if key not in held:
            held[key] = read(key)
        return _array(view, held[key], order)

    return _filled(structure, array)


def _check_directory(file: File, size: int) -> None:
    """Refuse truncated zip files, and lists of entries far larger than torch's.

    The archive ends with a record of 22 bytes; in the 64-bit form it is preceded by a
    pointer of 20 and another record of 56, which then counts.
    """
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or len(tail) < end + 22:
        raise ValueError("a truncated zip file")
    length = int.from_bytes(tail[end + 12 : end + 16], "little")
    pointer, large = end - 20, end - 20 - 56
    if large >= 0 and tail.startswith(b"PK\6\7", pointer):
        length = int.from_bytes(tail[large + 40 : large + 48], "little")
    if length > _LARGEST_PICKLE:
        raise ValueError(f"a list of entries of {length:,} bytes")


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The entries of the zip form, by name without the archive's own."""
    every = archive.infolist()
    if any(i.compress_type or i.file_size != i.compress_size for i in every):
        raise ValueError("compressed entries")
    if sum(i.file_size for i in every) > size:
        raise ValueError("entries that are larger together than the file")
    entries = {i.filename.partition("/")[2]: i for i in every}
    if "data.pkl" not in entries:
        raise ValueError("a zip file without data.pkl")
    if entries["data.pkl"].file_size > _LARGEST_PICKLE:
        raise ValueError(f"a structure of more than {_LARGEST_PICKLE:,} bytes")
    return entries


def _zip_form(file: File, size: int, tensors: bool) -> Any:
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = _entries(archive, size)

        def read(name: str) -> bytes:
            return archive.read(entries[name])

        structure = torch_views.structure(io.BytesIO(read("data.pkl")))
        if not tensors:
            return _filled(structure, lambda view: view.spec)
        order = read("byteorder") if "byteorder" in entries else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"the byte order {order[:20]!r}")
        return _arrays(structure, lambda k: read(f"data/{k}"), order.decode(), size)


def _old_form(file: File, size: int, tensors: bool) -> Any:
    """Magic number, version, facts of the machine, structure, keys; then storages."""
    whole = file.read()
    head, data = io.BytesIO(whole), memoryview(whole)  # neither copies
    magic, _, facts, structure, keys = (torch_views.structure(head) for _ in range(5))
    if magic != _MAGIC or not isinstance(facts, dict) or not isinstance(keys, list):
        raise ValueError("pickles that are not those of torch.save")
    if not tensors:
        return _filled(structure, lambda view: view.spec)
    units: dict[str, int] = {}
    _filled(structure, lambda v: units.update({v.storage.key: v.storage.unit}))
    held: dict[str, memoryview] = {}
    at = head.tell()
    for key in keys:
        start = at + 8
        at = start + int.from_bytes(data[at:start], "little") * units[key]
        held[key] = data[start:at]
    if at > len(data):
        raise ValueError("a truncated file")
    order = "little" if facts.get("little_endian", True) else "big"
    return _arrays(structure, held.__getitem__, order, size)


def _parsed(file: File, tensors: bool) -> Any:
    start = file.read(8)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if start[:4] == b"PK\3\4":
        return _zip_form(file, size, tensors)
    if start[:1] == b"\x80":
        return _old_form(file, size, tensors)
    raise ValueError(f"a file that starts with {start!r}" if start else "an empty file")


def parse(file: File, name: PathLike, *, tensors: bool = True) -> Any:
    """Read an open file.

    Args:
        file: seekable, at its start.
        name: what errors call it.
        tensors: False: give `Spec(shape, dtype)` for tensors and leave storages alone.

    Raises:
        ValueError: see `read_pt`.
    """
    try:
        return _parsed(file, tensors)
    except (ValueError, *_DAMAGED) as error:
        got = str(error) or type(error).__name__
        hint = "if you trust it, load it with torch and save what it holds as tensors"
        raise problem("read_pt", name, got, _EXPECTED, hint) from None


def read_pt(path: PathLike) -> Any:
    """Read a file of `torch.save` without running anything in it.

    Returns:
        Nested dicts, lists and tuples of numbers, texts, bytes, None and read-only
        arrays (bfloat16 and float8 as in `ml_dtypes`). Arrays share memory where
        tensors did and need not be contiguous.

    Raises:
        ValueError: if it is missing, damaged or truncated, or holds anything else.
    """
    with open(existing("read_pt", path, _EXPECTED), "rb") as file:
        return parse(file, path)


def specs(path: PathLike) -> Any:
    """`read_pt` with `Spec(shape, dtype)` in place of arrays, which are not read."""
    with open(existing("read_pt", path, _EXPECTED), "rb") as file:
        return parse(file, path, tensors=False)

"""Files in the form of `torch.save`, written without torch: opcode by opcode."""

from __future__ import annotations

import pathlib
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
BF16 = ml_dtypes.bfloat16


class Raw(bytes):
    """Opcodes that stand for a value."""


@dataclass(frozen=True)
class View:
    """A tensor that is part of a storage; start and strides count elements."""

    storage: np.ndarray
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    count: int | None = None


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sequence(values: Any, storages: list[np.ndarray]) -> bytes:
    return b"".join(emit(v, storages) for v in values)


def tensor(view: View, storages: list[np.ndarray]) -> bytes:
    """What `_rebuild_tensor_v2` is given."""
    same = [n for n, s in enumerate(storages) if s is view.storage]
    if not same:
        storages.append(view.storage)
    key = same[0] if same else len(storages) - 1
    kind = STORAGES[view.storage.dtype.name]
    count = view.storage.size if view.count is None else view.count
    storage = text("storage") + b"ctorch\n%s\n" % kind.encode()
    storage += text(str(key)) + text("cpu") + integer(count)
    sizes = [emit(tuple(t), storages) for t in (view.shape, view.strides)]
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = [b"(" + storage + b"tQ", integer(view.start), *sizes, b"\x89", hooks]
    name = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return name + b"(" + b"".join(arguments) + b"tR"


def emit(value: Any, storages: list[np.ndarray]) -> bytes:
    """Opcodes that leave `value` on the stack."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, dict):
        pairs = [x for pair in value.items() for x in pair]
        return b"}(" + sequence(pairs, storages) + b"u"
    if isinstance(value, list):
        return b"](" + sequence(value, storages) + b"e"
    if isinstance(value, tuple):
        return b"(" + sequence(value, storages) + b"t"
    if isinstance(value, bool) or value is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, int):
        return integer(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, bytes):
        return (
            b"c_codecs\nencode\n" + emit((value.decode("latin1"), "latin1"), []) + b"R"
        )
    if isinstance(value, View):
        return tensor(value, storages)
    if isinstance(value, np.ndarray):
        strides = tuple(s // value.itemsize for s in value.strides)
        flat = np.ascontiguousarray(value).reshape(-1)
        return tensor(View(flat, 0, value.shape, strides), storages)
    return text(value)


def program(value: Any, storages: list[np.ndarray]) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + emit(value, storages) + b"."


def save(
    path: pathlib.Path,
    value: Any,
    *,
    order: str = "little",
    compression: int = zipfile.ZIP_STORED,
    pickle: bytes | None = None,
) -> pathlib.Path:
    """Write the zip form; `pickle` replaces the structure."""
    storages: list[np.ndarray] = []
    structure = program(value, storages)
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", structure if pickle is None else pickle)
        archive.writestr("archive/byteorder", order)
        for n, storage in enumerate(storages):
            swap = order == "big" and storage.itemsize > 1
            archive.writestr(
                f"archive/data/{n}", (storage.byteswap() if swap else storage).tobytes()
            )
        archive.writestr("archive/version", "3\n")
    return path


def save_old(path: pathlib.Path, value: Any) -> pathlib.Path:
    """Write the form before torch 1.6."""
    storages: list[np.ndarray] = []
    facts = {"protocol_version": 1001, "little_endian": True}
    parts = [0x1950A86A20F9469CFC6C, 1001, facts]
    data = b"".join(program(part, []) for part in parts)
    data += program(value, storages)
    data += program([str(n) for n in range(len(storages))], [])
    for storage in storages:
        data += struct.pack("<q", storage.size) + storage.tobytes()
    path.write_bytes(data)
    return path

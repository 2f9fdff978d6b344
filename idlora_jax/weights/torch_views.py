"""Tensors in the pickles of `torch.save`: storages, and views that lie inside them.

A tensor is (storage, offset, sizes, strides), counted in elements; a storage is named
by a persistent id, its bytes lie elsewhere. This module says which globals such a
pickle may name, and makes inert descriptions of what they stand for.

Source: torch/_utils.py: _rebuild_tensor_v2, _rebuild_tensor_v3.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from idlora_jax.weights import pickles
from idlora_jax.weights.pickles import Call
from idlora_jax.weights.tensorfile import Spec

_DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_MOST_BYTES = 1 << 24


@dataclass(frozen=True)
class _Dtype:
    dtype: np.dtype


@dataclass(frozen=True)
class Storage:
    """Memory of `count` units of `unit` bytes; untyped memory has no dtype."""

    dtype: np.dtype | None
    key: str = ""
    count: int = 0

    @property
    def unit(self) -> int:
        """Bytes of what `count` counts."""
        return 1 if self.dtype is None else self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes it must have."""
        return self.count * self.unit


@dataclass(frozen=True)
class View:
    """A tensor as the pickle gives it; start and strides count elements."""

    storage: Storage
    dtype: np.dtype
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        """Shape and dtype."""
        return Spec(self.shape, self.dtype)

    @property
    def end(self) -> int:
        """Where its last element ends in the storage, in bytes."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        last = self.start + sum((n - 1) * step for n, step in steps)
        return (last + 1) * self.dtype.itemsize


def _dtype(name: str) -> np.dtype:
    return np.dtype(_DTYPES[name])


def _persistent(what: Any) -> Storage:
    """("storage", class, key, location, count), in the old form also a view."""
    if type(what) is not tuple or len(what) not in (5, 6) or what[0] != "storage":
        raise ValueError("a persistent id that is no storage")
    _, kind, key, _, count, *view = what
    if view not in ([], [None]):
        raise ValueError("a storage that is part of another; save a .clone()")
    known = isinstance(kind, Storage) and type(key) is str
    if not known or type(count) is not int or not 0 <= count < 1 << 48:
        raise ValueError("a storage without class, key or size")
    return Storage(kind.dtype, key, count)


def _sizes(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > 32:
        raise ValueError("sizes that are no short tuple")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in values):
        raise ValueError("sizes or strides that are negative, huge or no integers")
    return values


def _view_of(dtype: Any, storage: Any, start: Any, shape: Any, strides: Any) -> View:
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
        raise ValueError("a tensor without a storage or a dtype")
    (start,) = _sizes((start,))
    view = View(storage, dtype, start, _sizes(shape), _sizes(strides))
    if len(view.shape) != len(view.strides):
        raise ValueError("a tensor with another number of strides than of sizes")
    if view.end > storage.nbytes:
        raise ValueError("a tensor that reaches out of its storage")
    return view


def _view(storage: Any, *rest: Any) -> View:
    """A tensor; what follows (gradients, hooks, notes) has no meaning here."""
    return _view_of(getattr(storage, "dtype", None), storage, *rest[:3])


def _view_with_dtype(*args: Any) -> View:
    """A tensor whose storage is untyped; its dtype is the seventh argument."""
    return _view_of(getattr(args[6], "dtype", None), *args[:4])


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    if len(pairs):
        raise ValueError("an OrderedDict with contents given twice")
    return {}


def _encoder() -> Call:
    """How pickles of the second protocol write bytes: as a text, encoded."""
    left = _MOST_BYTES

    def encode(text: Any, encoding: Any) -> bytes:
        nonlocal left
        if type(text) is not str or encoding != "latin1":
            raise ValueError("bytes in another encoding than latin1")
        left -= len(text)  # one text can be encoded again and again
        if left < 0:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes in the structure")
        return text.encode("latin1")

    return Call(encode)


def _size(values: Any) -> tuple[int, ...]:
    return _sizes(values)


_TABLE: dict[str, Any] = {
    "torch._utils _rebuild_tensor_v2": Call(_view),
    "torch._utils _rebuild_tensor": Call(_view),
    "torch._utils _rebuild_tensor_v3": Call(_view_with_dtype),
    "torch._utils _rebuild_parameter": Call(_parameter),
    "torch Size": Call(_size),
    "collections OrderedDict": Call(_ordered),
    "torch.storage UntypedStorage": Storage(None),
    **{f"torch {n}": _Dtype(_dtype(n)) for n in _DTYPES},
    **{f"torch {n}": Storage(_dtype(d)) for n, d in _STORAGES.items()},
}


def structure(file: io.BytesIO) -> Any:
    """Read one pickle of `torch.save`; tensors become `View`s.

    Args:
        file: in memory; it is left behind the pickle.

    Raises:
        ValueError: if it is damaged or names anything but tensors.
    """
    table = {**_TABLE, "_codecs encode": _encoder()}
    return pickles.load(file, table, persistent=_persistent, leaves=(View,))

"""8-bit checkpoints: kernels in float8, read as such, widened, or made int8 (`int8`).

    weight = float8 value * weight_scale         one float32 scale per Linear, or none

Only some layers of a stack are in 8 bits: which ones, the file's dtypes say, and
`fp8_files` marks them. Under our paths a parameter that has such layers becomes parts:

    PATH               the other layers [Lw ...]
    PATH_fp8           the layers in 8 bits, as they are [L8 ...]
    PATH_scale         [L8] float32, where the file has scales
    PATH_input_scale   [L8] float32, likewise; only kept for export
    PATH_row           which layer stands where, see `quantized`

Source: ltx_core/quantization/fp8_scaled_mm.py; fp8_cast.py (without scales).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from idlora_jax import quantized
from idlora_jax.quantized import Int8, Quantized
from idlora_jax.weights import int8, leaves
from idlora_jax.weights.leaves import Leaf
from idlora_jax.weights.tensorfile import Spec

Choice = Literal["upcast", "keep", "int8"]
"""float8 times its scales; or kept as it is; or all blocks' kernels in int8."""
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
NARROW, SCALE, INPUT_SCALE, ROW = "_fp8", "_scale", "_input_scale", "_row"
"""Ends of the parts' paths."""
LIKE = "_like"
"""End of what has no numbers and is only in memory."""
_FIELDS = {
    "wide": "",
    "values": NARROW,
    "like": LIKE,
    "scale": SCALE,
    "input_scale": INPUT_SCALE,
    "row": ROW,
}
"""Parts by their names in a `Quantized`."""


def require_choice(choice: str) -> None:
    """Refuse a choice that is none.

    Raises:
        ValueError: if it is none of "upcast", "keep" and "int8".
    """
    if choice not in get_args(Choice):
        raise ValueError(f"weights: got {choice!r}, expected one of {get_args(Choice)}")


def widened(values: np.ndarray, scale: Any | None, dtype: np.dtype) -> np.ndarray:
    """float8 values times their scale in float32, then cast; axes and order stay.

    By a table of all 256 values: six times as fast as casting twice (measured,
    [4096 4096] to bfloat16: 0.023 s against 0.154 s), with equal results.
    """
    table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)
    if scale is not None:
        table = table * np.float32(scale)
    return table.astype(dtype)[values.view(np.uint8)]


def upcast(path: str, leaf: Leaf, dtype: Any | None) -> Leaf:
    """A leaf without pieces in 8 bits, in `dtype` (default: that of the others)."""
    narrow = leaf.narrow
    if narrow is None:
        return leaf
    target = leaves.kept_dtype(path, leaf.spec.dtype, dtype)
    kept = int8.is_int8(leaf)
    numbers = narrow.scales.get(int8.SCALES if kept else SCALE)

    def piece(index: int) -> np.ndarray:
        raw = leaf.piece(index)
        if index not in narrow.at:
            return raw
        scale = None if numbers is None else numbers.piece(narrow.at.index(index))
        if kept:
            return int8.widened(raw, np.asarray(scale), target)
        return widened(raw, scale, target)

    return Leaf(leaf.spec._replace(dtype=target), leaf.count, piece)


def _some(leaf: Leaf, at: Sequence[int], dtype: np.dtype) -> Leaf:
    """Some pieces of a leaf, on a leading axis."""
    piece = leaf.spec.shape[leaf.narrow is None or leaf.narrow.stacked :]
    return Leaf(Spec((len(at), *piece), dtype), len(at), lambda n: leaf.piece(at[n]))


def parts(leaf: Leaf) -> dict[str, Leaf]:
    """What a leaf is stored as, by the end of the path; a plain one as itself."""
    narrow = leaf.narrow
    if narrow is None:
        return {"": leaf}
    if int8.is_int8(leaf):
        values = Leaf(Spec(leaf.spec.shape, narrow.dtype), leaf.count, leaf.piece)
        return {int8.VALUES: values, **narrow.scales}
    flags = np.isin(np.arange(leaf.count), narrow.at)
    row = quantized.rows(flags)
    row = row if narrow.stacked else row.reshape(())
    rest = np.flatnonzero(~flags).tolist()
    return {
        **({"": _some(leaf, rest, leaf.spec.dtype)} if rest else {}),
        NARROW: _some(leaf, narrow.at, narrow.dtype),
        **narrow.scales,
        ROW: Leaf(Spec(row.shape, row.dtype), 1, lambda _: row),
    }


def as_asked(path: str, leaf: Leaf, dtype: Any | None, choice: Choice) -> Leaf:
    """A parameter of the transformer with or without pieces in 8 bits.

    What a file holds in int8 was made so because memory is short, and stays so.
    """
    if int8.is_int8(leaf) or choice == "keep":
        return leaf
    if choice == "int8" and int8.chosen(path, leaf):
        plain = upcast(path, leaf, np.float32)
        return int8.quantised(path, plain)._replace(spec=leaf.spec)
    return upcast(path, leaf, dtype)


def stored(
    found: Mapping[str, Leaf], choice: Choice, dtype: Any | None
) -> dict[str, Leaf]:
    """Leaves to be written under our paths, none of them with pieces in 8 bits."""
    asked = {path: as_asked(path, leaf, dtype, choice) for path, leaf in found.items()}
    named = ((path, parts(leaf)) for path, leaf in asked.items())
    return {path + end: part for path, made in named for end, part in made.items()}


def _as_bytes(leaf: Leaf) -> Leaf:
    spec = leaf.spec._replace(dtype=np.dtype(np.uint8))
    return Leaf(spec, leaf.count, lambda n: leaf.piece(n).view(np.uint8))


Put = Callable[[str, Leaf, np.dtype], Any]
"""A path, what to read, its dtype -> an array on the devices where the path belongs."""


def _empty(leaf: Leaf, dtype: np.dtype) -> Leaf:
    return Leaf(Spec((0,), dtype), 0, leaf.piece)


def read(
    path: str, leaf: Leaf, dtype: Any | None, choice: Choice, put: Put
) -> Any | Quantized | Int8:
    """A parameter as it is asked for, one part at a time.

    Args:
        path: of the parameter.
        leaf: as it is stored.
        dtype: what it is, or what its layers in 8 bits widen to (default: as stored).
        choice: what becomes of 8 bits.
        put: reads a part and places it. Parts have the paths that they have in a tree,
            such as "PATH/values": those as wide as the parameter belong where it does.
    """
    leaf = as_asked(path, leaf, dtype, choice)
    target = leaves.kept_dtype(path, leaf.spec.dtype, dtype)
    if leaf.narrow is None:
        return put(path, leaf, target)
    made = parts(leaf)
    kind: type[Quantized | Int8] = Int8
    names = {int8.VALUES: "values", int8.SCALES: "scales", LIKE: "like"}
    if int8.is_int8(leaf):
        made[LIKE] = _empty(leaf, target)
    else:
        kind = Quantized
        names = {end: name for name, end in _FIELDS.items()}
        made = {"": _some(leaf, (), target), **made}
        made[NARROW] = _as_bytes(made[NARROW])
        made[LIKE] = _empty(leaf, leaf.dtype_of(leaf.narrow.at[0]))

    def one(end: str, part: Leaf) -> Any:
        return put(f"{path}/{names[end]}", part, part.spec.dtype if end else target)

    done = {names[end]: one(end, part) for end, part in made.items()}
    return kind(**dict.fromkeys(kind._fields) | done)

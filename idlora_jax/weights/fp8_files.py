"""Finding 8-bit parameters in files of either kind, and in memory.

A file of original names has a scale beside each weight in 8 bits, or no scale at all; a
converted file has parts (see `fp8`). Which layers are in 8 bits is read from the file:
it differs between checkpoints. What is found are leaves whose `narrow` says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from idlora_jax import quantized
from idlora_jax.files import PathLike, problem
from idlora_jax.quantized import Int8, Quantized
from idlora_jax.types import Tree
from idlora_jax.weights import fp8, int8, leaves, rules
from idlora_jax.weights.fp8 import FLOAT8, INPUT_SCALE, NARROW, ROW, SCALE
from idlora_jax.weights.leaves import Leaf, Narrow, Shape, Source, Where
from idlora_jax.weights.tensorfile import Entry, Spec, Tensors

METADATA = "_quantization_metadata"
_FORMATS = tuple(dtype.name for dtype in FLOAT8)
_FLOAT32 = np.dtype(np.float32)
_WIDE = np.dtype(ml_dtypes.bfloat16)
"""What a parameter widens to if nothing else says it."""
_OTHER = "use the bf16 or another fp8 form of the checkpoint"


def lists_layers(path: PathLike, metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata lists layers that have scales.

    Raises:
        ValueError: if the list is damaged, or a layer is in a format not supported.
    """
    if METADATA not in metadata:
        return False
    expected = f"layers in {' or '.join(_FORMATS)}"
    try:
        layers = json.loads(metadata[METADATA])["layers"]
        formats = {str(about["format"]) for about in layers.values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        got, do = f"a damaged {METADATA!r}", "download it again"
        raise problem("weights", path, got, expected, do) from None
    odd = sorted(formats - {*_FORMATS})
    if odd:
        raise problem("weights", path, f"layers in {odd[:6]}", expected, _OTHER)
    return bool(formats)


def _in_8_bits(tensors: Tensors, source: Source) -> tuple[int, ...]:
    """Numbers of a parameter's keys that are in 8 bits, so far as they are there."""
    held = [tensors.specs.get(key) for key in source.keys]
    return tuple(n for n, s in enumerate(held) if s is not None and s.dtype in FLOAT8)


def _scale_keys(source: Source, at: Iterable[int], name: str) -> list[str]:
    if source.rule.layout != "linear":
        return []
    return [rules.scale_key(source.keys[n], name) for n in at]


def _checked(value: np.ndarray, name: str) -> np.ndarray:
    if value.dtype != _FLOAT32:
        got = f"a scale in {value.dtype.name}"
        raise problem("weights", name, got, "float32", _OTHER)
    if not (np.isfinite(value).all() and (value >= 0).all()):
        odd = value[~(np.isfinite(value) & (value >= 0))].flat[0]
        got, do = f"a scale of {odd}", "the file is damaged, download it again"
        raise problem("weights", name, got, "finite numbers from 0 up", do)
    return value


def _numbers(count: int, piece: Callable[[int], np.ndarray]) -> Leaf:
    return Leaf(Spec((count,), _FLOAT32), count, piece)


def _marked(tensors: Tensors, source: Source, leaf: Leaf, names: list[str]) -> Leaf:
    """The leaf of a file of original names, told which pieces are in 8 bits."""
    at = _in_8_bits(tensors, source)
    if not at:
        return leaf
    dtypes = {tensors.specs[source.keys[n]].dtype for n in at}
    if len(dtypes) > 1:
        got = f"layers in {sorted(dtype.name for dtype in dtypes)}"
        raise problem("weights", source.keys[at[0]], got, "one of these", _OTHER)
    scales = {}
    for name in names:
        keys = _scale_keys(source, at, name)
        read = lambda n, keys=keys: _checked(tensors.tensor(keys[n]), keys[n])
        if keys:
            scales[rules.SCALES[name]] = _numbers(len(keys), read)
    others = [tensors.specs[k].dtype for n, k in enumerate(source.keys) if n not in at]
    wide = leaves.widest(others or [_WIDE])
    narrow = Narrow(dtypes.pop(), at, source.stacked, scales)
    return leaf._replace(spec=leaf.spec._replace(dtype=wide), narrow=narrow)


def from_original(
    tensors: Tensors,
    keys: Iterable[str],
    needed: Mapping[str, Source],
    where: Where,
    *,
    scaled: bool = False,
) -> dict[str, Leaf]:
    """Leaves of a network in a file of original key names; see `leaves.from_original`.

    Args:
        tensors: the open file.
        keys: those of its keys that belong to the network.
        needed: from `leaves.sources`.
        where: for the error.
        scaled: whether weights in 8 bits must have scales even if none has one.

    Raises:
        ValueError: listing missing keys, wrong shapes and unexpected keys, scales among
            them; or naming a stack in several 8-bit formats.
    """
    keys = [*keys]
    names = [n for n in rules.SCALES if any(key.endswith(f".{n}") for key in keys)]
    if scaled and "weight_scale" not in names:
        names.insert(0, "weight_scale")
    also: dict[str, Shape] = {}
    for source in needed.values():
        at = _in_8_bits(tensors, source)
        for name in names:
            also |= dict.fromkeys(_scale_keys(source, at, name), ())
    found = leaves.from_original(tensors, keys, needed, where, also)
    return {p: _marked(tensors, s, found[p], names) for p, s in needed.items()}


def _part_shapes(tensors: Tensors, path: str, source: Source) -> dict[str, Shape]:
    """Shapes of a parameter's parts; the file says how many layers are in 8 bits."""
    if path + int8.VALUES in tensors.specs:
        layers, _, wide = source.shape
        shapes = source.shape, (layers, 1, wide)
        return dict(zip((path + int8.VALUES, path + int8.SCALES), shapes, strict=True))
    piece = source.shape[1:] if source.stacked else source.shape
    held = tensors.specs[path + NARROW].shape[:1]
    count = min(*held, len(source.keys)) if held else 0
    rest = len(source.keys) - count
    scales = [path + s for s in (SCALE, INPUT_SCALE) if path + s in tensors.specs]
    return {
        path + NARROW: (count, *piece),
        path + ROW: source.shape[:1] if source.stacked else (),
        **({path: (rest, *piece)} if rest else {}),
        **dict.fromkeys(scales, (count,)),
    }


def _joined_int8(tensors: Tensors, path: str, source: Source) -> Leaf:
    scales = path + int8.SCALES
    return int8.packed(
        Spec(source.shape, _WIDE),
        lambda n: tensors.layer(path + int8.VALUES, n),
        lambda n: _checked(tensors.layer(scales, n), f"{scales}, layer {n}"),
    )


def _joined(tensors: Tensors, path: str, source: Source) -> Leaf:
    """The leaf of a parameter whose parts are in a converted file."""
    if path + int8.VALUES in tensors.specs:
        return _joined_int8(tensors, path, source)
    row = tensors.tensor(path + ROW).reshape(-1)
    at = np.flatnonzero(row >= 0)
    narrow = tensors.specs[path + NARROW]
    if len(at) != narrow.shape[0] or (row != quantized.rows(row >= 0)).any():
        got = f"the layers' rows {row[:8].tolist()}"
        expected = f"a table of {narrow.shape[0]} rows in 8 bits, in order"
        raise problem("weights", path, got, expected, "convert again")

    def piece(index: int) -> np.ndarray:
        place = int(row[index])
        if place < 0:
            return tensors.layer(path, -1 - place)
        return tensors.layer(path + NARROW, place)

    def numbers(name: str) -> Leaf:
        one = lambda n: tensors.slice(name, (slice(n, n + 1),)).reshape(())
        return _numbers(len(at), lambda n: _checked(one(n), name))

    ends = [end for end in (SCALE, INPUT_SCALE) if path + end in tensors.specs]
    scales = {end: numbers(path + end) for end in ends}
    wide = tensors.specs[path].dtype if path in tensors.specs else _WIDE
    told = Narrow(narrow.dtype, tuple(at.tolist()), source.stacked, scales)
    return Leaf(Spec(source.shape, wide), len(source.keys), piece, told)


def _is_packed(tensors: Tensors, path: str, source: Source) -> bool:
    kernel = path + int8.VALUES in tensors.specs and len(source.shape) == 3
    return kernel or path + NARROW in tensors.specs


def from_converted(
    tensors: Tensors, needed: Mapping[str, Source], where: Where
) -> dict[str, Leaf]:
    """Leaves of a network in a converted file; see `leaves.from_converted`.

    Raises:
        ValueError: listing missing paths, wrong shapes and unexpected paths, parts
            among them; or naming a damaged part.
    """
    packed = {p: s for p, s in needed.items() if _is_packed(tensors, p, s)}
    rest = {path: source for path, source in needed.items() if path not in packed}
    also: dict[str, Shape] = {}
    for path, source in packed.items():
        also |= _part_shapes(tensors, path, source)
    found = leaves.from_converted(tensors, rest, where, also)
    found |= {path: _joined(tensors, path, s) for path, s in packed.items()}
    return {path: found[path] for path in needed}


def _of_int8(q: Int8) -> Leaf:
    values, scales = np.asarray(q.values), np.asarray(q.scales)
    spec = Spec(q.shape, np.dtype(q.dtype))
    return int8.packed(spec, lambda n: values[n], lambda n: scales[n])


def _of_quantized(q: Quantized, source: Source) -> Leaf:
    values, wide = np.asarray(q.values).view(q.like.dtype), np.asarray(q.wide)
    row = np.asarray(q.row).reshape(-1)

    def piece(index: int) -> np.ndarray:
        place = int(row[index])
        return wide[-1 - place] if place < 0 else values[place]

    def numbers(scale: Any) -> Leaf:
        array = np.asarray(scale)
        return _numbers(len(array), lambda n: array[n])

    held = {SCALE: q.scale, INPUT_SCALE: q.input_scale}
    scales = {end: numbers(scale) for end, scale in held.items() if scale is not None}
    at = tuple(np.flatnonzero(row >= 0).tolist())
    narrow = Narrow(values.dtype, at, source.stacked, scales)
    return Leaf(Spec(q.shape, wide.dtype), row.size, piece, narrow)


def from_arrays(tree: Tree, needed: Mapping[str, Source]) -> dict[str, Leaf]:
    """Leaves of a network's parameters in memory, some of them in 8 bits."""
    flat = rules.flatten(tree)
    packed = {p: q for p, q in flat.items() if quantized.is_quantized(q)}
    rest = {path: source for path, source in needed.items() if path not in packed}
    found = leaves.from_arrays(tree, rest)
    for path, q in packed.items():
        own = isinstance(q, Int8)
        found[path] = _of_int8(q) if own else _of_quantized(q, needed[path])
    return {path: found[path] for path in needed}


def check_scales(found: Mapping[str, Leaf]) -> None:
    """Read all scales, so that a damaged one is found before anything long is begun.

    Raises:
        ValueError: naming a scale that is not float32, not finite, or negative.
    """
    for leaf in found.values():
        for numbers in leaf.narrow.scales.values() if leaf.narrow else ():
            for n in range(numbers.count):
                numbers.piece(n)


def original_entries(
    found: Mapping[str, Leaf], needed: Mapping[str, Source]
) -> list[Entry]:
    """The tensors under original names that leaves stand for, scales among them.

    Original files have no int8: what is kept so is written as it widens.
    """
    found = {
        path: fp8.upcast(path, leaf, None) if int8.is_int8(leaf) else leaf
        for path, leaf in found.items()
    }
    out = leaves.original_entries(found, needed)
    for path, leaf in found.items():
        for name, end in rules.SCALES.items():
            numbers = leaf.narrow.scales.get(end) if leaf.narrow else None
            if leaf.narrow is None or numbers is None:
                continue
            keys = _scale_keys(needed[path], leaf.narrow.at, name)
            for n, key in enumerate(keys):
                one = lambda n=n, numbers=numbers: (numbers.piece(n),)
                out.append(Entry(key, Spec((), _FLOAT32), one))
    return out

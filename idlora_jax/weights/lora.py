"""LoRA tensors <-> adapters: stacking the layers of a file, and taking them apart.

A file holds a pair [R I], [O R] for each module it adapts; an adapter holds for each
kernel {a [L I R], b [L R O]}. Layers that a file leaves out, and ranks below the
largest of a stack, are zeros in both a and b: they change nothing, training leaves them
so, and on the way out they are left out again.

Source: ltx_trainer/trainer.py: _save_checkpoint; ltx_core/loader/sd_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from idlora_jax import adapters
from idlora_jax.types import Adapter, Tree
from idlora_jax.weights import lora_match, lora_names, rules
from idlora_jax.weights.header import Spec
from idlora_jax.weights.lora_match import Pair, Report
from idlora_jax.weights.lora_names import Module
from idlora_jax.weights.rules import KeyMismatchError

Read = Callable[[Pair], tuple[np.ndarray, np.ndarray]]
"""Gives a pair as lora_A [R I] and lora_B [O R], scaled."""

_MODULES = {(m.network, m.path): m for m in lora_names.MODULES}


class Item(NamedTuple):
    """A pair to be written: where it belongs, its shapes, and how to get its tensors.

    `a` gives lora_A [R I], `b` gives lora_B [O R] with every factor folded in.
    """

    module: Module
    layer: int | None
    specs: tuple[Spec, Spec]
    a: Callable[[], np.ndarray]
    b: Callable[[], np.ndarray]

    @property
    def rank(self) -> int:
        """Of the pair."""
        return self.specs[0].shape[0]


def require(report: Report, allow_partial: bool = False) -> None:
    """Refuse a file of which something fits nothing.

    Args:
        report: of the file.
        allow_partial: accept it if anything fits at all.

    Raises:
        KeyMismatchError: with the counts, examples, and what may be the matter.
    """
    if allow_partial and report.pairs:
        return
    if not report.bad:
        return
    hint = "is it a LoRA file of LTX-2, and of this size of model?"
    if report.generation and report.pairs:
        hint = f"its modules are those of generation {report.generation}; is the base?"
    if any("not asked for" in why for why in report.unmatched.values()):
        hint = "load that network's part too (checkpoints.load_adapters)"
    if report.pairs:
        hint += " Allowing a partial match (--allow-partial) leaves these keys out"
    raise KeyMismatchError(
        f"adapter does not fit the base: {report}:"
        f"{lora_match.examples(report.bad)}\n{hint}"
    )


def _stack(pairs: list[Pair], shape: tuple[int, ...], read: Read) -> dict[str, Any]:
    """The pairs of one kernel, stacked and padded with zeros."""
    *layers, wide, out = shape
    rank = max(pair.rank for pair in pairs)
    first = read(pairs[0])
    if not layers:
        return {"a": first[0].T.copy(), "b": first[1].T.copy()}
    dtype = first[0].dtype
    made = {
        "a": np.zeros((*layers, wide, rank), dtype),
        "b": np.zeros((*layers, rank, out), dtype),
    }
    for n, pair in enumerate(pairs):
        a, b = read(pair) if n else first
        if dtype != np.promote_types(dtype, a.dtype):
            dtype = np.promote_types(dtype, a.dtype)
            made = {side: x.astype(dtype) for side, x in made.items()}
        made["a"][pair.slot.layer, :, : pair.rank] = a.T
        made["b"][pair.slot.layer, : pair.rank] = b.T
    return made


def stacked(
    pairs: Iterable[Pair], read: Read, bases: Mapping[str, Tree]
) -> dict[str, Adapter]:
    """Pairs -> adapters by network, each with the networks' names that have any.

    Memory holds the adapters and one pair.

    Args:
        pairs: from a report.
        read: see `Read`.
        bases: parameters, or their shapes, by network name.
    """
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        place = (pair.slot.module.network, pair.slot.module.path)
        groups.setdefault(place, []).append(pair)
    out: dict[str, dict[str, Any]] = {}
    for (network, path), group in groups.items():
        shape = _at(bases[network], path).shape
        out.setdefault(network, {})[path] = _stack(group, shape, read)
    made: dict[str, Adapter] = {n: rules.nest(flat) for n, flat in out.items()}
    for network, adapter in made.items():
        adapters.check(adapter, bases[network])
    return made


def _at(tree: Tree, path: str) -> Any:
    node: Any = tree
    for name in path.split("/"):
        node = node[name]
    return node


def import_(tensors: Mapping[str, np.ndarray], base: Tree) -> Adapter:
    """Tensors in memory -> transformer adapter, checked against the base.

    Args:
        tensors: by key, in any of the known spellings; alpha / rank is folded in.
        base: transformer parameters, or their shapes.

    Raises:
        KeyMismatchError: naming keys that fit nothing.
    """
    bases = {"transformer": base}
    report = lora_match.match(tensors, bases)
    require(report)

    def read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        a, b = np.asarray(tensors[pair.a]), np.asarray(tensors[pair.b])
        if pair.alpha is not None:
            factor = np.float32(tensors[pair.alpha].item() / pair.rank)
            b = (b.astype(np.float32) * factor).astype(b.dtype)
        return a, b

    return stacked(report.pairs, read, bases)["transformer"]


def _parts(pair: Mapping[str, Any]) -> list[tuple[int | None, np.ndarray, np.ndarray]]:
    """A kernel's pairs by layer [I R], [R O]; zeros that pad a stack are left out."""
    a, b = np.asarray(pair["a"]), np.asarray(pair["b"])
    if a.ndim == 2:
        return [(None, a, b)]
    used = (a != 0).any(-2) | (b != 0).any(-1)
    ranks = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in used]
    if not any(ranks):
        ranks = [a.shape[-1]] * len(ranks)
    return [(n, a[n, :, :r], b[n, :r]) for n, r in enumerate(ranks) if r]


def items(parts: Mapping[str, Adapter], dtype: Any = None) -> Iterator[Item]:
    """The pairs of adapters, to be written.

    Args:
        parts: adapters by network; b is scaled already.
        dtype: of the tensors (default: as they are).

    Raises:
        ValueError: for a path that is no kernel's, or ranks that differ in a pair.
    """
    for network, adapter in parts.items():
        for path, pair in _kernels(adapter):
            module = _MODULES.get((network, path))
            if module is None:
                raise KeyMismatchError(f"{network}/{path}: no LoRA file has this name")
            if np.shape(pair["a"])[-1] != np.shape(pair["b"])[-2]:
                got = f"a {list(np.shape(pair['a']))}, b {list(np.shape(pair['b']))}"
                raise ValueError(f"{path}: got {got}, expected [.. I R] and [.. R O]")
            for layer, a, b in _parts(pair):
                yield _item(module, layer, a.T, b.T, dtype)


def _item(
    module: Module, layer: int | None, a: np.ndarray, b: np.ndarray, dtype: Any
) -> Item:
    kinds = [x.dtype if dtype is None else np.dtype(dtype) for x in (a, b)]
    specs = (Spec(a.shape, kinds[0]), Spec(b.shape, kinds[1]))
    give = [lambda x=x, d=d: x.astype(d) for x, d in zip((a, b), kinds, strict=True)]
    return Item(module, layer, specs, give[0], give[1])


def _kernels(adapter: Adapter) -> Iterator[tuple[str, Mapping[str, Any]]]:
    flat = rules.flatten(adapter)
    for path in dict.fromkeys(leaf.rpartition("/")[0] for leaf in flat):
        yield path, {side: flat[f"{path}/{side}"] for side in "ab"}


def export(adapter: Adapter, dtype: Any = None) -> dict[str, np.ndarray]:
    """Transformer adapter -> tensors by ComfyUI key, in `dtype` (default: as they are).

    Fold alpha / rank into b first (`adapters.scale`): most readers ignore alpha.
    """
    out = {}
    for item in items({"transformer": jax.device_get(adapter)}, dtype):
        name = lora_names.filled(item.module.original, item.layer)
        out[f"{name}.lora_A.weight"] = np.ascontiguousarray(item.a())
        out[f"{name}.lora_B.weight"] = np.ascontiguousarray(item.b())
    return out

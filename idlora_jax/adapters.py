"""Low-rank adapters as parameter-tree deltas: W + a b, pure functions on trees.

An adapter has the shape of the parameters with each adapted kernel [.. I O] replaced by
{a: [.. I R], b: [.. R O]}. It is unscaled while trained; `scale` folds alpha / R (or a
strength) into b. The forward pass reads it as the `lora` variable collection, where a
pair may also hold what dropout needs (`with_dropout`).

Source: LoRA, arXiv 2106.09685, equation 3; defaults of peft's LoraLayer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from idlora_jax import quantized
from idlora_jax.config import AUDIO_TARGETS
from idlora_jax.types import Adapter, Tree


def _is_pair(node: Any) -> bool:
    return isinstance(node, Mapping) and set(node) == {"a", "b"}


def _leaves(tree: Tree, at: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) with {a, b} pairs as leaves."""
    for name, node in tree.items():
        path = f"{at}/{name}" if at else name
        if isinstance(node, Mapping) and not _is_pair(node):
            yield from _leaves(node, path)
        else:
            yield path, node


def _nest(flat: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat:
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def select(params: Tree, targets: tuple[str, ...]) -> list[str]:
    """Paths of the kernels whose module matches one of the patterns.

    A pattern is an fnmatch over a module's path, e.g. "blocks/audio/ff/*"; gates match
    only when a pattern ends in "gate".

    Raises:
        ValueError: naming patterns that match nothing.
    """
    paths = [p for p, _ in _leaves(params) if p.endswith("/kernel")]

    def matches(path: str, pattern: str) -> bool:
        module = path.removesuffix("/kernel")
        gate = module.endswith("/gate") and not pattern.endswith("gate")
        return fnmatch.fnmatch(module, pattern) and not gate

    unused = [t for t in targets if not any(matches(p, t) for p in paths)]
    if unused:
        near = sorted({p.rsplit("/", 2)[0] for p in paths})
        raise ValueError(
            f"adapters.select: no module matches {unused}; modules are in {near}"
        )
    return [p for p in paths if any(matches(p, t) for t in targets)]


def _module(path: str) -> str:
    return path.removesuffix("/kernel")


def init(
    key: Array,
    params: Tree,
    rank: int | Callable[[str], int],
    targets: tuple[str, ...] = AUDIO_TARGETS,
) -> Adapter:
    """A new adapter: a uniform in +-1/sqrt(I), b zero, float32.

    Args:
        key: random key.
        params: the base, or its `jax.eval_shape`.
        rank: R >= 1, for all or by a module's path (`Lora.rank_of`).
        targets: see `select`.

    Raises:
        ValueError: if the rank is below 1 or a target matches nothing.

    Source: peft LoraLayer.reset_lora_parameters (Kaiming uniform, a = sqrt 5).
    """
    leaves = dict(_leaves(params))
    paths = select(params, targets)

    def pair(k: Array, path: str) -> dict[str, Array]:
        *stack, wide, out = leaves[path].shape
        r = rank(_module(path)) if callable(rank) else rank
        if r < 1:
            raise ValueError(f"adapters.init: rank must be at least 1, got {r}")
        bound = 1.0 / np.sqrt(wide)
        a = jax.random.uniform(k, (*stack, wide, r), minval=-bound, maxval=bound)
        return {"a": a, "b": jnp.zeros((*stack, r, out))}

    keys = jax.random.split(key, len(paths))
    return _nest((p, pair(k, p)) for k, p in zip(keys, paths, strict=True))


def require_used(paths: Iterable[str], patterns: Iterable[str]) -> None:
    """Refuse patterns that fit no adapted module.

    Args:
        paths: of the adapted kernels, from `select`.
        patterns: of ranks or alphas.

    Raises:
        ValueError: naming them, and the modules.
    """
    modules = [_module(path) for path in paths]
    unused = [p for p in patterns if not fnmatch.filter(modules, p)]
    if unused:
        near = sorted({m.rpartition("/")[0] for m in modules})
        raise ValueError(
            f"adapters: no adapted module matches {unused}; modules are in {near}"
        )


@jax.jit
def _times(b: Array, factor: Array) -> Array:
    # In float32 and rounded once: a bfloat16 factor would be rounded itself. Compiled,
    # so that no float32 copy of a stack is made.
    return (b.astype(jnp.float32) * factor).astype(b.dtype)


Factor = float | Array | Callable[[str, int], float]


def scale(adapter: Adapter, factor: Factor) -> Adapter:
    """Multiply the change by `factor` (alpha / rank, or a strength): b * factor.

    Args:
        adapter: to be scaled.
        factor: for all, or by a module's path and rank (`Lora.factor`).
    """

    def one(path: str, pair: Tree) -> dict[str, Any]:
        own = factor
        if callable(factor):
            own = factor(_module(path), pair["a"].shape[-1])
        return {"a": pair["a"], "b": _times(pair["b"], jnp.float32(own))}

    return _nest((path, one(path, pair)) for path, pair in _leaves(adapter))


def with_dropout(adapter: Adapter, key: PRNGKeyArray, rate: float) -> Tree:
    """The `lora` collection of one training step: inputs of pairs are left out.

    Args:
        adapter: scaled.
        key: of what is left out; each module and layer has its own part of it.
        rate: the probability, 0 or more and below 1.
    """
    leaves = dict(_leaves(adapter))
    keys = jax.random.split(key, len(leaves))

    def one(k: Array, pair: Tree) -> dict[str, Any]:
        stack = pair["a"].shape[:-2]
        own = jax.random.key_data(jax.random.split(k, stack))
        return {**pair, "key": own, "rate": jnp.full(stack, rate, jnp.float32)}

    return _nest(
        (path, one(k, leaves[path])) for path, k in zip(leaves, keys, strict=True)
    )


def stack(*adapters: Adapter) -> Adapter:
    """Several adapters as one: ranks concatenated, so the changes add up.

    Kernels that only some adapters have are taken over from those.
    """
    flats = [dict(_leaves(a)) for a in adapters]
    paths = dict.fromkeys(path for flat in flats for path in flat)

    def joined(path: str) -> dict[str, Any]:
        pairs = [flat[path] for flat in flats if path in flat]
        a = jnp.concatenate([p["a"] for p in pairs], axis=-1)
        return {"a": a, "b": jnp.concatenate([p["b"] for p in pairs], axis=-2)}

    return _nest((path, joined(path)) for path in paths)


def merge(params: Tree, *adapters: Adapter) -> Tree:
    """The base with the adapters' changes added to its kernels, in the base's dtype.

    Each change is made in the adapter's dtype, then summed, then added: with bfloat16
    operands this rounds as the reference's fusion does. A kernel kept in 8 bits that is
    changed becomes a plain one; the others stay.

    Raises:
        ValueError: if an adapter does not fit the base.

    Source: ltx_core/loader/fuse_loras.py: apply_loras.
    """
    flats = []
    for adapter in adapters:
        check(adapter, params)
        flats.append(dict(_leaves(adapter)))

    def one(path: str, kernel: Any) -> Any:
        pairs = [flat[path] for flat in flats if path in flat]
        if not pairs:
            return kernel
        total = sum(jnp.asarray(p["a"]) @ jnp.asarray(p["b"]) for p in pairs)
        eight_bits = quantized.is_quantized(kernel)
        plain = quantized.whole(kernel) if eight_bits else kernel
        return (plain + total).astype(kernel.dtype)

    return _nest((path, one(path, leaf)) for path, leaf in _leaves(params))


def check(adapter: Adapter, params: Tree) -> None:
    """Refuse an adapter with paths or widths that the base does not have.

    An unknown path would be ignored silently by the forward pass.

    Raises:
        ValueError: listing what was got and what the base has.
    """
    leaves = dict(_leaves(params))
    bad = []
    for path, pair in _leaves(adapter):
        if path not in leaves or not _is_pair(pair):
            bad.append(f"{path}: the base has no such kernel")
            continue
        *stack, wide, out = leaves[path].shape
        a, b = pair["a"].shape, pair["b"].shape
        if a[:-1] != (*stack, wide) or b != (*stack, a[-1], out):
            want = f"a {[*stack, wide, 'R']}, b {[*stack, 'R', out]}"
            bad.append(f"{path}: got a {list(a)}, b {list(b)}, expected {want}")
    if bad:
        shown = "".join(f"\n  {line}" for line in bad[:12])
        raise ValueError(
            f"adapter does not fit the base in {len(bad)} places:{shown}\n"
            "Was it trained on another generation or model size?"
        )


def rank(adapter: Adapter) -> int:
    """The largest rank among the kernels."""
    return max(pair["a"].shape[-1] for _, pair in _leaves(adapter))

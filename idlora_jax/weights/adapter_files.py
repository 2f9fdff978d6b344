"""Checking an adapter file against a base, and rewriting it with metadata.

`compare` counts what a file's keys find in the base, so that a person sees at a glance
whether an adapter belongs to it; `rewrite` imports it (which refuses anything that does
not fit), folds a strength or alpha / rank into b, and saves it in the same key format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from idlora_jax import adapters, checkpoints
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.files import PathLike, problem
from idlora_jax.types import Adapter, Tree
from idlora_jax.weights import io, lora, rules


class Report(NamedTuple):
    """Keys of an adapter file by what the base has for them."""

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    wrong_shape: tuple[str, ...]

    def __str__(self) -> str:
        counts = (len(self.matched), len(self.unmatched), len(self.wrong_shape))
        return "{} keys matched, {} unmatched, {} of a wrong shape".format(*counts)


def compare(tensors: Mapping[str, Any], base: Tree) -> Report:
    """Sort an adapter's keys by what the base has for them.

    Args:
        tensors: the file's tensors by key, or their shapes.
        base: transformer parameters, or their shapes.
    """
    match = rules.matcher(lora.LORA, "torch")
    kernels = rules.flatten(base)
    out: dict[str, list[str]] = {"matched": [], "unmatched": [], "wrong_shape": []}
    for key, tensor in tensors.items():
        out[_kind(tensor.shape, match(key), kernels)].append(key)
    return Report(*(tuple(keys) for keys in out.values()))


def _kind(shape: tuple[int, ...], hits: list[Any], kernels: Mapping[str, Any]) -> str:
    """Which list a key goes to; the rank axis may have any size."""
    if not hits:
        return "unmatched"
    rule, indices = hits[0]
    path, side = rule.flax.rsplit("/", 1)
    if path not in kernels:
        return "unmatched"
    *stack, wide, out = kernels[path].shape
    if stack and int(indices["L"]) >= stack[0]:
        return "unmatched"
    fits = len(shape) == 2 and (shape[1] == wide if side == "a" else shape[0] == out)
    return "matched" if fits else "wrong_shape"


def fold(adapter: Adapter, strength: float, alpha: float | None) -> Adapter:
    """Scale the change by `strength`, and by alpha over each kernel's own rank."""

    def one(pair: dict[str, Any]) -> Adapter:
        factor = strength * (1.0 if alpha is None else alpha / pair["a"].shape[-1])
        return adapters.scale(pair, factor)

    is_pair = lambda node: isinstance(node, Mapping) and set(node) == {"a", "b"}
    return jax.tree.map(one, adapter, is_leaf=is_pair)


def _new_meta(
    meta: AdapterMeta, base: io.BaseFile, strength: float, alpha: float | None
) -> AdapterMeta:
    extra = {**meta.extra, "checked_against": base.base_hash}
    if strength != 1.0:
        earlier = float(meta.extra.get("strength", 1.0))
        extra["strength"] = str(earlier * strength)
    generation = meta.generation or base.generation
    folded = meta.alpha if alpha is None else alpha
    return dataclasses.replace(meta, generation=generation, alpha=folded, extra=extra)


def rewrite(
    source: PathLike,
    base_path: PathLike,
    destination: PathLike | None = None,
    *,
    strength: float = 1.0,
    alpha: float | None = None,
    dtype: Any | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Check an adapter file against a base, and save it again if asked to.

    Args:
        source: a .safetensors file in the ComfyUI key format.
        base_path: the base it is for: original file or converted folder.
        destination: the file to write (default: only check).
        strength: folded into b.
        alpha: alpha / rank is folded into b, for files that are not scaled yet.
        dtype: of the saved tensors (default: as they are).
        say: takes lines about what was found.

    Raises:
        ValueError: if the adapter does not fit the base, or is scaled already.
        OSError: if the destination cannot be written; nothing is left behind.
    """
    base = io.open_base(base_path)
    shapes = io.shapes(base, "transformer")
    tensors, _ = checkpoints.read_tensors(source)
    report = compare(tensors, shapes)
    say(f"{source}: {report}")
    adapter, meta = checkpoints.load_adapter(source, shapes)
    if meta.generation and meta.generation != base.generation:
        got, expected = f"an adapter of {meta.generation}", f"one of {base.generation}"
        raise problem("lora", source, got, expected, "use a base of its generation")
    if alpha is not None and meta.alpha:
        got = f"alpha {meta.alpha:g} folded in"
        raise problem("lora", source, got, "an unscaled file", "leave out alpha")
    if destination is None:
        return report
    new = _new_meta(meta, base, strength, alpha)
    saved = checkpoints.save_adapter(
        Path(destination), fold(adapter, strength, alpha), new, dtype
    )
    say(f"wrote {destination}: rank {saved.rank}, sha256 {saved.content_hash[:12]}")
    return report

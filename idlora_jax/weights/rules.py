"""Torch checkpoint keys <-> parameter paths: one declarative table, both directions.

A `Rule` pairs a key template with a path template. `{L}` is a layer index that becomes
the leading (stacked) axis of the parameter; `{i}`, `{j}`, `{k}` are integers that stand
in both names. `layout` says how the axes are ordered:

    linear          torch [O I]      ours [I O]
    conv            torch [O I *K]   ours [*K I O]
    conv_transpose  torch [I O *K]   ours [*K I O]
    as_is           equal

The layouts are permutations, so import followed by export is bit-exact. Every key must
be matched by exactly one rule and every stack must be complete; offenders are listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

AxisLayout = Literal["linear", "conv", "conv_transpose", "as_is"]


class Rule(NamedTuple):
    """`torch` key template, `flax` path template ("/"-separated), axis layout."""

    torch: str
    flax: str
    layout: AxisLayout = "as_is"


class Source(NamedTuple):
    """Where one parameter comes from: its keys in layer order, and the rule.

    A key is None where a layer is absent (its part is 0; see `plan`).
    """

    keys: tuple[str | None, ...]
    rule: Rule

    @property
    def stacked(self) -> bool:
        """Whether the keys are layers of one stacked parameter."""
        return "{L}" in self.rule.torch


class KeyMismatchError(ValueError):
    """Keys or parameters that the rules do not account for."""


def linear(torch: str, flax: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Rules for a `Dense`: `.weight` -> `/kernel`, `.bias` -> `/bias`."""
    weight = Rule(f"{torch}.weight", f"{flax}/kernel", "linear")
    return (weight, Rule(f"{torch}.bias", f"{flax}/bias")) if bias else (weight,)


def conv(torch: str, flax: str, *, bias: bool = True) -> tuple[Rule, ...]:
    """Rules for a convolution: `.weight` -> `/kernel`, `.bias` -> `/bias`."""
    weight = Rule(f"{torch}.weight", f"{flax}/kernel", "conv")
    return (weight, Rule(f"{torch}.bias", f"{flax}/bias")) if bias else (weight,)


SCALES = {"weight_scale": "_scale", "input_scale": "_input_scale"}
"""Numbers beside the weight of a Linear in 8 bits, and the ends of their paths."""


def scale_key(weight: str, name: str) -> str:
    """The key (or template) of a Linear's scale, from that of its weight."""
    return weight.removesuffix("weight") + name


def scales(table: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules for the scales of a table's Linears."""
    return tuple(
        Rule(scale_key(rule.torch, name), rule.flax + end)
        for rule in table
        if rule.layout == "linear"
        for name, end in SCALES.items()
    )


def to_ours(layout: AxisLayout, ndim: int) -> tuple[int, ...]:
    """The axis permutation from torch's order to ours."""
    if layout == "as_is":
        return tuple(range(ndim))
    if layout == "linear":
        return (1, 0)
    kernel = tuple(range(2, ndim))
    return (*kernel, 1, 0) if layout == "conv" else (*kernel, 0, 1)


def _regex(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w)\}", template)
    seen: set[str] = set()
    out = ""
    for n, part in enumerate(parts):
        if n % 2 == 0:
            out += re.escape(part)
        else:
            out += f"(?P={part})" if part in seen else f"(?P<{part}>\\d+)"
            seen.add(part)
    return re.compile(out)


def _fill(template: str, indices: Mapping[str, str]) -> str:
    for name, value in indices.items():
        template = template.replace("{" + name + "}", value)
    return template


Matcher = Callable[[str], list[tuple[Rule, dict[str, str]]]]


def matcher(rules: Iterable[Rule], side: Literal["torch", "flax"]) -> Matcher:
    """A function listing the rules whose `side` template matches a name entirely."""
    compiled = [(_regex(getattr(rule, side)), rule) for rule in rules]

    def match(name: str) -> list[tuple[Rule, dict[str, str]]]:
        hits = ((rule, pattern.fullmatch(name)) for pattern, rule in compiled)
        return [(rule, hit.groupdict()) for rule, hit in hits if hit]

    return match


def _listing(names: list[str], limit: int = 12) -> str:
    more = f"\n  ... and {len(names) - limit} more" if len(names) > limit else ""
    return "".join(f"\n  {name}" for name in names[:limit]) + more


def plan(
    keys: Iterable[str], rules: Iterable[Rule], *, depth: int | None = None
) -> dict[str, Source]:
    """Which keys make which parameter.

    Args:
        keys: the file's keys.
        rules: the table.
        depth: if given, stacks have this many layers and may lack some (adapters).

    Returns:
        A dict from parameter path to its `Source`.

    Raises:
        KeyMismatchError: naming keys matched by no rule or by several, and stacks with
            missing layers.
    """
    match = matcher(tuple(rules), "torch")
    bad: list[str] = []
    found: dict[str, dict[int, str]] = {}
    by_path: dict[str, Rule] = {}
    for key in keys:
        hits = match(key)
        if len(hits) != 1:
            bad.append(f"{key}: matched by {len(hits)} rules, expected 1")
            continue
        rule, indices = hits[0]
        path = _fill(rule.flax, indices)
        found.setdefault(path, {})[int(indices.get("L", 0))] = key
        by_path[path] = rule
    out: dict[str, Source] = {}
    for path, layers in found.items():
        stacked = "{L}" in by_path[path].torch
        size = depth if depth and stacked else max(layers) + 1
        absent = [n for n in range(size) if n not in layers]
        if absent and not depth:
            bad.append(f"{path}: layers {absent} are missing")
        if max(layers) >= size:
            bad.append(f"{path}: got layer {max(layers)}, expected at most {size - 1}")
        out[path] = Source(tuple(layers.get(n) for n in range(size)), by_path[path])
    if bad:
        raise KeyMismatchError(f"{len(bad)} keys do not fit the rules:{_listing(bad)}")
    return out


def gather(source: Source, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Read one parameter: permute its axes and stack its layers."""

    def one(key: str) -> np.ndarray:
        tensor = read(key)
        return tensor.transpose(to_ours(source.rule.layout, tensor.ndim))

    present = [(layer, key) for layer, key in enumerate(source.keys) if key]
    first = one(present[0][1])
    if not source.stacked:
        return np.asarray(first, order="C")
    out = np.zeros((len(source.keys), *first.shape), first.dtype)
    for n, (layer, key) in enumerate(present):
        out[layer] = first if n == 0 else one(key)
    return out


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": x}` -> `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": x}}` -> `{"a/b": x}`; the inverse of `nest`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def import_(
    tensors: Mapping[str, np.ndarray],
    rules: Iterable[Rule],
    *,
    depth: int | None = None,
) -> dict[str, Any]:
    """Torch-named tensors -> nested parameters (all in memory; see `io` for lazy).

    Raises:
        KeyMismatchError: if a key fits no rule or several, or a layer is missing.
    """
    sources = plan(tensors, rules, depth=depth)
    return nest({p: gather(s, tensors.__getitem__) for p, s in sources.items()})


def keys_of(path: str, layers: int, match: Matcher) -> list[tuple[str, Rule]]:
    """The torch keys (one per layer for a stack) of one parameter path."""
    hits = match(path)
    if len(hits) != 1:
        raise KeyMismatchError(f"{path}: matched by {len(hits)} rules, expected 1")
    rule, indices = hits[0]
    if "{L}" not in rule.torch:
        return [(_fill(rule.torch, indices), rule)]
    return [(_fill(rule.torch, {**indices, "L": str(n)}), rule) for n in range(layers)]


def export(tree: Mapping[str, Any], rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Nested parameters -> torch-named tensors: the inverse of `import_`.

    Raises:
        KeyMismatchError: if a parameter fits no rule or several.
    """
    match = matcher(tuple(rules), "flax")
    out: dict[str, np.ndarray] = {}
    for path, value in flatten(tree).items():
        array = np.asarray(value)
        named = keys_of(path, array.shape[0] if array.ndim else 0, match)
        for layer, (key, rule) in enumerate(named):
            one = array[layer] if "{L}" in rule.torch else array
            back = np.argsort(to_ours(rule.layout, one.ndim))
            out[key] = np.asarray(one.transpose(back), order="C")
    return out

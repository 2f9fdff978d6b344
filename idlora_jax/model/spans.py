"""Which layers serve which branches: the static plan behind one sweep of the weights.

Layers are cut into spans in which the set of distinct branches, and what each of them
computes, is constant. Branches that did the same so far are one group and are computed
once, so a branch that first differs at layer 29 shares layers 0..28. Groups that do the
same kind of work inside a span run through one compiled body. What a branch skips in a
single layer is computed there and left out of the sum: of a pass through 48 layers it
is a thousandth or two, and another body would have to be compiled for it. The last
layer makes only what is read of a branch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from idlora_jax.savings import Saving
from idlora_jax.types import BOTH, Branch, Skip

Mode = Literal["sweep", "pair", "batch"]


@dataclass(frozen=True)
class Kind:
    """Groups doing the same work.

    Attributes:
        branch: one of them (its static facts hold for all; not its prompt).
        skip: what its layers do not compute.
        groups: the first branch index of each group.
    """

    branch: Branch
    skip: Skip
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Layers [start, stop) with constant `kinds`.

    `source[b]` is the group that branch `b` belongs to (the index of its first branch).
    """

    start: int
    stop: int
    kinds: tuple[Kind, ...]
    source: tuple[int, ...]


def checked(
    branches: tuple[Branch, ...], depth: int, *, any_ref: bool
) -> tuple[Branch, ...]:
    """Branches with one `Skip` per layer, and no reference facts without references.

    Raises:
        ValueError: if a branch's skips are neither absent nor one per layer.
    """
    out = []
    for branch in branches:
        if branch.skip and len(branch.skip) != depth:
            raise ValueError(
                f"Branch.skip: got {len(branch.skip)} layers, expected {depth} "
                "(one Skip per layer, or the empty tuple)"
            )
        branch = replace(branch, skip=branch.skip or (Skip(),) * depth)
        if not any_ref:
            facts = {"use_ref": True, "video_sees_ref": True, "ref_sees_text": True}
            branch = replace(branch, **facts)
        out.append(branch)
    # Branches that differ in what is read of them alone are one pass.
    reads: dict[Branch, frozenset[str]] = {}
    for branch in out:
        same = replace(branch, reads=BOTH)
        reads[same] = reads.get(same, frozenset()) | branch.reads
    return tuple(replace(b, reads=reads[replace(b, reads=BOTH)]) for b in out)


def _not_computed(branch: Branch, layer: int, without: Collection[Saving]) -> Skip:
    """What a branch skips in more than one layer."""
    if "skip" in without:
        return Skip()
    often = Skip(*(sum(column) > 1 for column in zip(*branch.skip, strict=True)))
    return Skip(*(a and b for a, b in zip(branch.skip[layer], often, strict=True)))


def _kinds(
    branches: tuple[Branch, ...],
    firsts: list[int],
    layer: int,
    mode: Mode,
    without: Collection[Saving],
) -> tuple[Kind, ...]:
    found: dict[tuple[Branch, Skip], list[int]] = {}
    for first in firsts:
        branch = branches[first]
        # Rows of one batch may differ in key length, so there a dropped reference is no
        # kind of its own.
        use_ref = branch.use_ref or mode != "sweep"
        facts = replace(branch, prompt=0, skip=(), use_ref=use_ref)
        skip = _not_computed(branch, layer, without)
        found.setdefault((facts, skip), []).append(first)
    return tuple(Kind(b, skip, tuple(groups)) for (b, skip), groups in found.items())


def spans(
    branches: tuple[Branch, ...],
    depth: int,
    mode: Mode = "sweep",
    without: Collection[Saving] = (),
) -> tuple[Span, ...]:
    """Cut `depth` layers into spans for branches made by `checked`.

    Args:
        branches: from `checked`.
        depth: L.
        mode: see `transformer.apply`.
        without: savings that are switched off.
    """
    out: list[Span] = []
    for layer in range(depth):
        here = branches
        if layer < depth - 1 or "dead_tail" in without:
            here = tuple(replace(b, reads=BOTH) for b in branches)
        history = [replace(b, skip=b.skip[: layer + 1]) for b in here]
        source = tuple(history.index(h) for h in history)
        if "prefix" in without:
            source = tuple(range(len(branches)))
        kinds = _kinds(here, sorted(set(source)), layer, mode, without)
        if out and (out[-1].kinds, out[-1].source) == (kinds, source):
            out[-1] = replace(out[-1], stop=layer + 1)
        else:
            out.append(Span(layer, layer + 1, kinds, source))
    return tuple(out)

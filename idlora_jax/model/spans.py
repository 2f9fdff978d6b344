"""Which layers serve which branches: the static plan behind one sweep of the weights.

Layers are cut into spans in which the set of distinct branches, and what each of them
skips, is constant. Branches that did the same so far are one group and are computed
once, so a branch that first differs at layer 29 shares layers 0..28. Groups that do the
same kind of work inside a span run through one compiled body.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from idlora_jax.types import Branch, Skip

Mode = Literal["sweep", "pair", "batch"]


@dataclass(frozen=True)
class Kind:
    """Groups doing the same work.

    Attributes:
        branch: one of them (its static facts hold for all; not its prompt).
        skip: what its layers leave out.
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
    return tuple(out)


def _kinds(
    branches: tuple[Branch, ...], firsts: list[int], layer: int, mode: Mode
) -> tuple[Kind, ...]:
    found: dict[tuple[Branch, Skip], list[int]] = {}
    for first in firsts:
        branch = branches[first]
        # Rows of one batch may differ in key length, so there a dropped reference is no
        # kind of its own.
        use_ref = branch.use_ref or mode != "sweep"
        facts = replace(branch, prompt=0, skip=(), use_ref=use_ref)
        found.setdefault((facts, branch.skip[layer]), []).append(first)
    return tuple(Kind(b, skip, tuple(groups)) for (b, skip), groups in found.items())


def spans(
    branches: tuple[Branch, ...], depth: int, mode: Mode = "sweep"
) -> tuple[Span, ...]:
    """Cut `depth` layers into spans for branches made by `checked`."""
    out: list[Span] = []
    for layer in range(depth):
        history = [replace(b, skip=b.skip[: layer + 1]) for b in branches]
        source = tuple(history.index(h) for h in history)
        kinds = _kinds(branches, sorted(set(source)), layer, mode)
        if out and (out[-1].kinds, out[-1].source) == (kinds, source):
            out[-1] = replace(out[-1], stop=layer + 1)
        else:
            out.append(Span(layer, layer + 1, kinds, source))
    return tuple(out)

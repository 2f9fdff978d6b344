"""The guided step: five passes with identity guidance, and their sum."""

from __future__ import annotations

from typing import cast

from benchmarks import cases
from benchmarks.backends import diffusers, reference
from benchmarks.backends import jax as ours
from benchmarks.rows import Row
from benchmarks.session import Session, Weights


def variants(asked: tuple[str, ...]) -> tuple[ours.Variant, ...]:
    """The layouts of ours that are measured.

    Raises:
        ValueError: for a name that is none.
    """
    known = (*ours.VARIANTS, "pair")
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"--variants: got {unknown}, expected some of {known}")
    return cast(tuple[ours.Variant, ...], asked) or ("sweep",)


def run(session: Session) -> list[Row]:
    """Rows of the reference and of ours; without it ratios are to our first."""
    options = session.options
    chosen = variants(options.variants)
    weights = Weights(options)
    case = cases.make(options.size, options.generation)
    model = weights.models.get(reference.NAME)
    works = [] if model is None else [reference.step(case, model)]
    if ours.NAME in options.backends:
        works += [ours.step(case, weights.base, variant) for variant in chosen]
    missing = weights.missing
    if diffusers.NAME in options.backends:
        missing = missing | {diffusers.NAME: "it has no identity pass"}
    rows = session.not_run(missing, "five passes")
    return rows + session.compare(works)

"""One pass of the transformer with the positive prompt."""

from __future__ import annotations

from benchmarks import cases
from benchmarks.backends import diffusers, reference
from benchmarks.backends import jax as ours
from benchmarks.rows import Row
from benchmarks.session import Session, Weights


def run(session: Session) -> list[Row]:
    """Rows of every backend; ratios are to the first that is not ours."""
    options = session.options
    weights = Weights(options)
    case = cases.make(options.size, options.generation)
    make = {reference.NAME: reference.forward, diffusers.NAME: diffusers.forward}
    works = [make[name](case, model) for name, model in weights.models.items()]
    if ours.NAME in options.backends:
        works.append(ours.forward(case, weights.base))
    rows = session.not_run(weights.missing, "pass")
    return rows + session.compare(works)

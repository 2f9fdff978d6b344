"""What compiling costs, at few layers and at as many as the published model has.

Layers are scanned, so the time must not grow with their number. Weights are shapes:
nothing is allocated and nothing runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax

from benchmarks import cases, programs, random_weights
from benchmarks.backends import jax as ours
from benchmarks.backends import jax_training
from benchmarks.configs import Size
from benchmarks.programs import Call
from benchmarks.rows import Row
from benchmarks.session import Session
from benchmarks.works import Work
from idlora_jax.config import Generation

DEPTHS = (4, 48)
"""Layers that are compared; widths and tokens are those of the size."""


def deep(size: Size, layers: int) -> Size:
    """The same size with other layers; STG skips the one at three fifths."""
    return dataclasses.replace(size, layers=layers, stg=3 * layers // 5)


def calls(size: Size, generation: Generation) -> dict[str, Callable[[], Call]]:
    """What makes each kind of program, of shapes of weights."""
    case = cases.make(size, generation)
    base = random_weights.shapes(case.cfg)
    batch = cases.training(size, generation)
    return {
        "pass": lambda: ours.forward_call(case, base),
        "step": lambda: ours.step_call(case, base),
        "train": lambda: jax_training.train_call(batch, base, "full"),
    }


def rows(session: Session, depths: tuple[int, ...] = DEPTHS) -> Iterator[Row]:
    """One row per program and depth; the last depth's has the ratio to the first's."""
    options = session.options
    # What jax does once a process counts for nobody.
    jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((2, 2))))
    kinds = options.variants or ("pass", "step", "train")
    for kind in kinds:
        first = None
        for layers in depths:
            size = deep(options.size, layers)
            call = calls(size, options.generation)[kind]()
            facts = programs.build(*call).facts
            first = facts if first is None else first
            work = Work(
                f"{kind}, {layers} layers", ours.NAME, lambda: None, dict, facts
            )
            row = session.row(work, depth=layers)
            row.first_call_s = facts.compile_s
            row.extra = {
                "blocks": facts.blocks,
                "hlo_mib": round((facts.hlo_bytes or 0) / 2**20, 3),
                "times_first_depth": round(
                    facts.compile_cpu_s / first.compile_cpu_s, 3
                ),
            }
            yield session.told(row)


def run(session: Session) -> list[Row]:
    """See the module."""
    return list(rows(session))

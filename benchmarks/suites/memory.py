"""What XLA holds beside arguments and results: nothing is allocated, nothing timed."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from benchmarks import cases, programs
from benchmarks.backends import jax as ours
from benchmarks.backends import jax_training
from benchmarks.rows import Row
from benchmarks.session import Session
from benchmarks.works import Work
from idlora_jax.memory import size as nbytes

MODES = ("sweep", "pair", "batch")


def run(session: Session) -> list[Row]:
    """Rows of the pass, the step by layout of branches, training by what it keeps."""
    return list(rows(session))


def rows(session: Session) -> Iterator[Row]:
    """See `run`; rows also have the bytes of the weights and of one clip's states."""
    options = session.options
    size, generation = options.size, options.generation
    case = cases.make(size, generation)
    batch = cases.training(size, generation)
    base = ours.shapes(case.cfg)
    states = sum(s.x.shape[1] * m.width for s, m in _pairs(case))

    def row(variant: str, program: programs.Program) -> Row:
        work = Work(variant, ours.NAME, lambda: None, dict, program.facts)
        made = session.row(work)
        made.extra = {
            "weight_bytes": nbytes(base),
            "state_bytes": 4 * states,
            "temp_over_weights": round(
                (program.facts.temp_bytes or 0) / nbytes(base), 4
            ),
        }
        return session.told(made)

    yield row("pass", ours.forward_program(case, base)[0])
    for mode in MODES:
        yield row(f"step {mode}", ours.step_program(case, base, mode)[0])
    for remat in jax_training.REMATS:
        program, _ = jax_training.train_program(batch, base, remat)
        yield row(f"train remat {remat}", program)
    jax.clear_caches()


def _pairs(case: cases.Case) -> list[tuple]:
    return list(zip(case.streams, (case.cfg.video, case.cfg.audio), strict=True))

"""What XLA holds beside arguments and results: nothing is allocated, nothing timed."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from benchmarks import cases, programs, random_weights
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
    base = random_weights.shapes(case.cfg)
    states = sum(s.x.shape[1] * m.width for s, m in _pairs(case))

    def row(variant: str, call: programs.Call) -> Row:
        facts = programs.build(*call).facts
        work = Work(variant, ours.NAME, lambda: None, dict, facts)
        made = session.row(work)
        made.extra = {
            "weight_bytes": nbytes(base),
            "state_bytes": 4 * states,
            "temp_over_weights": round((facts.temp_bytes or 0) / nbytes(base), 4),
        }
        return session.told(made)

    yield row("pass", ours.forward_call(case, base))
    for mode in MODES:
        yield row(f"step {mode}", ours.step_call(case, base, mode))
    for remat in jax_training.REMATS:
        call = jax_training.train_call(batch, base, remat)
        yield row(f"train remat {remat}", call)
    jax.clear_caches()


def _pairs(case: cases.Case) -> list[tuple]:
    return list(zip(case.streams, (case.cfg.video, case.cfg.audio), strict=True))

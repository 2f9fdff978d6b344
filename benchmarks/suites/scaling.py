"""How time grows with tokens, steps, adapters and rows of a batch (ours alone)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, programs, random_weights
from benchmarks.backends import jax as ours
from benchmarks.configs import Size
from benchmarks.rows import Row
from benchmarks.session import Session
from benchmarks.works import Facts, Work, timed
from idlora_jax import adapters
from idlora_jax.model import transformer
from idlora_jax.types import AV

STEPS = (5, 30)
ADAPTERS = (0, 1, 4)
ROWS = (1, 2, 4)
SHARES = (0.25, 0.5, 1.0, 2.0)
"""Of a size's frames."""


def longer(size: Size, share: float) -> Size:
    """The same size with so many times the latent frames, at least one."""
    frames, height, width = size.grid
    frames = max(1, round(frames * share))
    return dataclasses.replace(size, grid=(frames, height, width))


def tokens(session: Session) -> list[Row]:
    """One pass of clips of several lengths: time over FLOPs must not change much."""
    options, works = session.options, []
    sizes = [longer(options.size, share) for share in SHARES]
    base = random_weights.base(options.size.transformer(options.generation))
    for size in sizes:
        case = cases.make(size, options.generation)
        work = ours.forward(case, base)
        works.append(dataclasses.replace(work, variant=f"{size.video} tokens"))
    rows = session.alone(works)
    speeds = [(r.tflop or 0) / (r.wall_med or 1) for r in rows]
    for row, size, speed in zip(rows, sizes, speeds, strict=True):
        curve = round(max(speeds) / speed, 3)
        row.extra = {"video_tokens": size.video, "over_flop_curve": curve}
    return rows


def steps(session: Session) -> list[Row]:
    """Sampling by few and many steps: the time of a step must be the same."""
    options, works = session.options, []
    case = cases.make(options.size, options.generation)
    base = random_weights.base(case.cfg)
    for count in STEPS:
        run = ours.sampler(case, base, count)
        _, took = timed(run)  # compiles, and runs once
        facts = Facts(compile_s=took.wall, compile_cpu_s=took.cpu)
        outputs = lambda done: {"video": done.video.x, "audio": done.audio.x}
        works.append(Work(f"{count} steps", ours.NAME, run, outputs, facts))
    rows = session.alone(works)
    each = [(row.wall_med or 0) / count for row, count in zip(rows, STEPS, strict=True)]
    for row, count, one in zip(rows, STEPS, each, strict=True):
        row.extra = {"steps": count, "s_per_step": round(one, 5)}
        row.extra = {**row.extra, "over_first": round(one / each[0], 4)}
    return rows


def _pass_with(case: cases.Case, traced: list[int]) -> Callable[..., Any]:
    """One pass with an adapter, scaled inside; `traced` grows with each trace."""

    def run(base: Any, adapter: Any, strength: Any, streams: AV, sigma: AV) -> AV:
        traced.append(1)
        variables = {"params": base}
        if adapter:
            variables["lora"] = adapters.scale(adapter, strength)
        prepared = ours.prepare(case, variables)
        args = (case.cfg, variables, prepared, streams, sigma)
        return transformer.apply(*args, targets=case.targets)[0]

    return jax.jit(run)


def with_adapters(session: Session) -> list[Row]:
    """One pass with none, one and several adapters, whose strength changes freely."""
    options, works = session.options, []
    case = cases.make(options.size, options.generation)
    base = random_weights.base(case.cfg)
    draw = functools.partial(adapters.init, params=base, rank=options.size.rank)
    single = [draw(jax.random.key(n)) for n in range(max(ADAPTERS))]
    single = [jax.tree.map(lambda x: x + 0.01, one) for one in single]
    traced: list[int] = []
    jitted: Any = _pass_with(case, traced)
    for count in ADAPTERS:
        stacked = adapters.stack(*single[:count]) if count else {}
        args = (base, stacked, np.float32(1), case.streams, ours.levels(case))
        program = programs.build(jitted, args)
        jitted(*args)
        strengths = iter(np.linspace(0.1, 1, 10_000, dtype=np.float32))

        def run(args: Any = args, strengths: Any = strengths) -> Any:
            own = (*args[:2], next(strengths), *args[3:])
            return jax.block_until_ready(jitted(*own))

        name = f"{count} adapters"
        works.append(Work(name, ours.NAME, run, ours.arrays, program.facts))
    before = len(traced)
    rows = session.alone(works)
    for row, count in zip(rows, ADAPTERS, strict=True):
        cost = round(1 / (row.ratio_med or 1) - 1, 4)
        traces = len(traced) - before
        row.extra = {"adapters": count, "cost": cost, "new_traces": traces}
    return rows


def rows_of_batch(session: Session) -> list[Row]:
    """One pass of several samples at once."""
    options, works = session.options, []
    case = cases.make(options.size, options.generation)
    base = random_weights.base(case.cfg)
    for count in ROWS:
        many = lambda x, n=count: jnp.concatenate([x] * n)
        streams, prompts = jax.tree.map(many, (case.streams, case.prompts))
        own = case._replace(streams=streams, prompts=prompts)
        work = ours.forward(own, base)
        works.append(dataclasses.replace(work, variant=f"{count} rows"))
    made = session.alone(works)
    for row, count in zip(made, ROWS, strict=True):
        row.extra = {"rows": count, "s_per_row": round((row.wall_med or 0) / count, 5)}
    return made


PARTS: dict[str, Callable[[Session], list[Row]]] = {
    "tokens": tokens,
    "steps": steps,
    "adapters": with_adapters,
    "rows": rows_of_batch,
}


def run(session: Session) -> list[Row]:
    """Those parts that were asked for."""
    found: list[Row] = []
    for name in session.options.what or PARTS:
        rows = PARTS[name](session)
        for row in rows:
            print(f"  {row.variant}: {dict(row.extra)}", flush=True)
        found += rows
    return found

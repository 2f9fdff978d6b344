"""The training loop: batches in, adapters out, and nothing lost when it is stopped.

The state after n steps depends on the configuration alone (`training`), so resuming
means reading it back and going on at step n. It is written while training goes on
(`runs`). SIGTERM and SIGINT let the running step finish, save, and return; a second
one kills, and so may anything else at any time: the newest state on disk is whole. What
is not finite never reaches the adapter: such steps are skipped, and a few in a row end
the run.

Several processes go through the same loop at the same pace. A signal to any of them
stops all after the same batch; the first one alone prints and writes logs.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from tqdm import tqdm

from idlora_jax import distributed, optimizers, records, states
from idlora_jax.records import Records, Row, Sampled
from idlora_jax.runs import Run, listed, save
from idlora_jax.states import Data
from idlora_jax.strategies import Batch
from idlora_jax.training import Step, TrainState
from idlora_jax.types import Tree

PATIENCE = 3
"""Steps in a row that may be not finite."""
LINES = 10
"""Lines printed over a run where there is no terminal for a progress bar."""
Batches = Callable[[int], Batch]


class NotFiniteError(ValueError):
    """The loss or its gradient was not finite several times in a row."""


@dataclass(frozen=True)
class Hooks:
    """What the loop asks of others while it goes on; all may be left out.

    Attributes:
        names: from the number of steps taken to the names of the next one's clips.
        validate: from updates and state to held-out losses, or None where they are not
            known then; called before the first update and after every one, before
            that is saved.
        sample: from updates and state to the clips to be shown then, made one by one;
            called before the first update, and after every one when that is saved.
        explain: from a state, a batch and its clips' names to the first tensor that is
            not finite in that step; see `diagnosis`.
        position: where the reader of the data stands, for the saved state.
    """

    names: Callable[[int], Sequence[str]] = lambda _: ()
    validate: Callable[[int, TrainState], Row | None] = lambda *_: None
    sample: Callable[[int, TrainState], Iterable[Sampled]] = lambda *_: ()
    explain: Callable[[TrainState, Batch, Sequence[str]], str] | None = None
    position: Callable[[], Data | None] = lambda: None


NOTHING = Hooks()


class Done(NamedTuple):
    """A step: the state after it, numbers, clips, names of those."""

    state: TrainState
    row: Row
    batch: Batch
    names: Sequence[str]


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """Collect the first SIGTERM or SIGINT in a list; the next one acts as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    old = {kind: signal.getsignal(kind) for kind in kinds}

    def restore() -> None:
        for kind, handler in old.items():
            signal.signal(kind, handler)

    def request(kind: int, frame: Any) -> None:
        caught.append(kind)
        restore()

    for kind in kinds:
        signal.signal(kind, request)
    try:
        yield caught
    finally:
        restore()


class _Clock:
    """Seconds since the last line, without those of what stands beside training."""

    def __init__(self) -> None:
        self.since = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done meanwhile is not counted."""
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def lap(self) -> float:
        """The seconds; they begin again."""
        before, self.since = self.since, time.perf_counter()
        return self.since - before


def _mean(rows: list[Row]) -> Row:
    """The means of the steps since the last line, without the skipped ones."""
    good = [row for row in rows if not row["skipped"]] or rows
    mean = {k: float(np.mean([row[k] for row in good])) for k in good[0]}
    return mean | {"skipped": sum(row["skipped"] for row in rows)}


def _numbers(rows: list[Row], batch: Batch, spent: float) -> Row:
    """What is logged of the steps since the last line, at so many seconds a step."""
    speed: dict[str, Any] = records.speed(batch, spent)
    return {"s_per_step": spent} | {k: float(v) for k, v in speed.items()} | _mean(rows)


def _refuse(run: Run, hooks: Hooks, bad: Sequence[Done]) -> NoReturn:
    """Stop, naming the clips and the first tensor that is not finite."""
    state, row, batch, names = bad[-1]
    count = int(state.step)
    # A skipped step changed nothing but the count.
    before = state._replace(step=state.step - 1)
    why = hooks.explain(before, batch, names) if hooks.explain else "unknown"
    clips = [
        f"step {count - len(bad) + 1 + n}: {', '.join(done.names)}"
        for n, done in enumerate(bad)
        if done.names
    ]
    raise NotFiniteError(
        f"training: the loss or its gradient was not finite {PATIENCE} times in a row "
        f"up to step {count} (loss {row['loss']:g}, gradient norm "
        f"{row['grad_norm']:g}). The first tensor that is not finite: {why}."
        f"{listed(clips)}\nThese steps changed nothing and the adapter before them is "
        f"saved in {run.config.output}. Use a lower optimizer.learning_rate or dtype "
        "float32, and check the base and the latents"
    )


def _text(row: Row) -> str:
    losses = ("loss", "video_loss", "audio_loss")
    shown = " ".join(f"{name.replace('_', ' ')} {row[name]:.4f}" for name in losses)
    return f"{shown} {row['s_per_step']:.2f} s/step"


def _line(run: Run, row: Row) -> str:
    """Progress where there is no terminal."""
    left = (run.config.steps - row["step"]) * row["s_per_step"]
    eta = datetime.timedelta(seconds=round(left))
    return f"step {row['step']:.0f}/{run.config.steps} {_text(row)} ETA {eta}"


def _report(run: Run, log: Records, bar: tqdm, row: Row) -> None:
    """One line into the logs; the bar, or now and then a line instead of it."""
    if not distributed.is_first():
        return
    numbers = {name: value for name, value in row.items() if name != "step"}
    log.write(int(row["step"]), numbers)
    bar.set_postfix_str(_text(row))
    last, every = row["step"] == run.config.steps, max(1, run.config.steps // LINES)
    if bar.disable and (last or row["step"] % every < run.config.log_every):
        print(_line(run, row), flush=True)


def _validated(
    log: Records, hooks: Hooks, updates: int, state: TrainState
) -> float | None:
    """The held-out loss, and all that is known of it into the logs; None: not now."""
    held = hooks.validate(updates, state)
    if held is None:
        return None
    log.write(updates, {f"heldout/{k}": v for k, v in held.items()})
    return held["loss"]


def _shown(
    log: Records, clips: Iterable[Sampled], updates: int, caught: Sequence[int]
) -> None:
    """Clips into the logs as they are made, until a signal."""
    begun, written, failed = time.perf_counter(), 0, 0
    for clip in clips:
        if clip.message:
            tqdm.write(f"warning: {clip.name}: {clip.message}", file=sys.stderr)
            failed += 1
        else:
            log.show(updates, clip)
            written += clip.new
        if caught:
            break
    if written or failed:
        spent = time.perf_counter() - begun
        numbers = {"written": float(written), "failed": float(failed), "s": spent}
        log.write(updates, {f"samples/{k}": v for k, v in numbers.items()})


def _stepped(
    run: Run, step: Step, state: TrainState, base: Tree, batches: Batches, hooks: Hooks
) -> Iterator[Done]:
    """Each step, after it was taken."""
    for seen in range(int(state.step), run.config.steps):
        batch, names = batches(seen), hooks.names(seen)
        if names and distributed.is_first():
            with run.order.open("a") as file:
                line = {"batch": seen + 1, "clips": [*names]}
                file.write(json.dumps(line) + "\n")
        state, metrics = step(state, base, batch)
        row = {k: float(v) for k, v in jax.device_get(metrics).items()}  # pyright: ignore
        yield Done(state, row, batch, names)


def train(
    run: Run,
    step: Step,
    state: TrainState,
    base: Tree,
    batches: Batches,
    hooks: Hooks = NOTHING,
) -> tuple[TrainState, int | None]:
    """Train until the last step or a signal.

    Args:
        run: settings and what to write.
        step: from `training.make_train_step`; it takes the state over.
        state: from `start`.
        base: transformer parameters.
        batches: from the number of steps taken to the next one's batch.
        hooks: what to ask of others.

    Returns:
        The state, saved, and the signal that stopped the run, or None.

    Raises:
        NotFiniteError: if the loss is not finite several times in a row.
        OSError: if something cannot be written; what was saved before stays.
    """
    config = run.config
    rate = optimizers.learning_rate(config.optimizer, config.steps)
    first, hidden = int(state.step), not sys.stderr.isatty()
    hidden = hidden or not distributed.is_first()
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=hidden)
    rows: list[Row] = []
    bad: list[Done] = []
    loss, stopped = None, 0
    kept = {"keep": config.keep, "keep_best": config.keep_best}
    with (
        stopping() as caught,
        contextlib.closing(bar),
        states.opened(run.states, **kept) as out,
        records.opened(config, run.log, first) as log,
    ):
        if not int(state.step):
            _validated(log, hooks, 0, state)
        clips = (c for c in hooks.sample(first, state) if c.new)  # others are logged
        _shown(log, clips, first, caught)
        clock = _Clock()
        for done in _stepped(run, step, state, base, batches, hooks):
            out.check()
            state, rows = done.state, [*rows, done.row]
            bad = [*bad, done] if done.row["skipped"] else []
            updates = int(state.step)
            bar.update()
            if updates % config.log_every == 0 or updates == config.steps:
                lr: Any = rate(updates - 1)
                at = {"step": float(updates), "lr": float(lr)}
                numbers = _numbers(rows, done.batch, clock.lap() / len(rows))
                _report(run, log, bar, at | numbers)
                rows = []
            with clock.paused():
                loss = _validated(log, hooks, updates, state)
            if updates % config.save_every == 0:
                save(run, out, state, loss, hooks.position())
            with clock.paused():
                _shown(log, hooks.sample(updates, state), updates, caught)
            if len(bad) == PATIENCE:
                save(run, out, state, loss, hooks.position())
                _refuse(run, hooks, bad)
            stopped = distributed.agreed(caught[0] if caught else 0)
            if stopped:
                break
        save(run, out, state, loss, hooks.position())
    return state, stopped or None

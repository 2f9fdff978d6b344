"""The training loop: batches in, adapters out, and nothing lost when it is stopped.

The state after n batches depends on the configuration alone (`training`), so resuming
means reading it back and going on at batch n. SIGTERM and SIGINT let the running step
finish, save, and return; a second one kills. What is not finite never reaches the
adapter: such steps are skipped, and a few in a row end the run.

    output/state/<batches>/                     training state (orbax), newest `keep`
    output/lora_weights_step_<updates>.safetensors
    output/log.jsonl                            one line per `log_every` updates
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from tqdm import tqdm

from idlora_jax import adapters, checkpoints, experiment, training
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.experiment import TrainConfig
from idlora_jax.strategies import Batch
from idlora_jax.training import Step, TrainState
from idlora_jax.types import Tree

PATIENCE = 3
"""Steps in a row that may be not finite."""
LINES = 10
"""Lines printed over a run where there is no terminal for a progress bar."""
FREE = ("base", "data", "output", "resume", "steps", "save_every", "keep", "log_every")
"""Settings that may differ when a run is resumed; `steps` moves the schedule's end."""
Row = dict[str, float]
Batches = Callable[[int], Batch]


class NotFiniteError(ValueError):
    """The loss or its gradient was not finite several times in a row."""


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


@dataclass(frozen=True)
class Run:
    """What a run writes and where; static.

    Attributes:
        config: all settings.
        meta: of the exported adapters; step and hash are filled in.
        facts: what else must be equal when resuming (hash of the base, ...).
    """

    config: TrainConfig
    meta: AdapterMeta
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def states(self) -> Path:
        """The folder of training states."""
        return self.config.output / "state"

    @property
    def log(self) -> Path:
        """The log file."""
        return self.config.output / "log.jsonl"

    @property
    def accumulation(self) -> int:
        """Batches per update."""
        return self.config.optimizer.accumulation

    def adapter(self, updates: int) -> Path:
        """Where the adapter after some updates is exported to."""
        return self.config.output / f"lora_weights_step_{updates:05d}.safetensors"

    def identity(self) -> dict[str, Any]:
        """What a saved state belongs to."""
        settings = experiment.flat(experiment.plain(self.config))
        kept = {k: v for k, v in settings.items() if k not in FREE}
        return {"settings": kept, **self.facts}


def save(run: Run, state: TrainState) -> Path:
    """Write the adapter as safetensors with scaled b, and the training state.

    Raises:
        OSError: if either cannot be written.
    """
    batches = int(state.step)
    path = run.adapter(batches // run.accumulation)
    if checkpoints.latest(run.states) == batches and path.is_file():
        return path
    lora = run.config.lora
    scaled = adapters.scale(state.adapter, lora.alpha / lora.rank)
    about = dataclasses.replace(run.meta, step=batches // run.accumulation)
    checkpoints.save_adapter(path, scaled, about)
    meta = {**run.identity(), "batches": batches}
    checkpoints.save_state(run.states, batches, state, meta, keep=run.config.keep)
    return path


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    flat_old, flat_new = experiment.flat(old), experiment.flat(new)
    return [
        f"{key.removeprefix('settings.')}: saved with {flat_old.get(key)!r}, "
        f"now {flat_new.get(key)!r}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def newest(run: Run) -> int | None:
    """The saved state to go on from: its number of batches, or None for a new run.

    Raises:
        ValueError: if the output holds a state and `resume` is off, or if that state
            belongs to other settings, another base or other data.
    """
    batches = checkpoints.latest(run.states)
    if batches is None:
        return None
    if not run.config.resume:
        raise ValueError(
            f"output: {run.config.output} holds a training state after {batches} "
            "batches; add --resume to go on, or choose another --output"
        )
    saved = checkpoints.state_meta(run.states, batches)
    now = json.loads(json.dumps(run.identity()))
    bad = _differences({k: saved.get(k) for k in now}, now)
    if bad:
        listed = "".join(f"\n  {line}" for line in bad[:12])
        raise ValueError(
            f"resume: {run.states}/{batches} belongs to another run:{listed}\nuse the "
            "same settings, or another --output"
        )
    return batches


def start(run: Run, batches: int | None, state: TrainState) -> TrainState:
    """The state to begin with: the given one, or the saved one of that number."""
    run.config.output.mkdir(parents=True, exist_ok=True)
    _cut_log(run.log, (batches or 0) // run.accumulation)
    if batches is None:
        return state
    return checkpoints.restore_state(run.states, batches, state)


def _cut_log(path: Path, updates: int) -> None:
    """Drop log lines after the state that is resumed from."""
    if path.is_file():
        rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in rows if json.loads(line)["step"] <= updates]
        path.write_text("".join(line + "\n" for line in kept))


def _mean(rows: list[Row]) -> Row:
    """The means of the batches since the last line, without the skipped ones."""
    good = [row for row in rows if not row["skipped"]] or rows
    mean = {k: float(np.mean([row[k] for row in good])) for k in good[0]}
    return mean | {"skipped": sum(row["skipped"] for row in rows)}


def _refuse(run: Run, updates: int, last: Row) -> NoReturn:
    raise NotFiniteError(
        f"training: the loss or its gradient was not finite {PATIENCE} times in a row "
        f"up to step {updates} (loss {last['loss']:g}, gradient norm "
        f"{last['grad_norm']:g}). These steps changed nothing and the adapter before "
        f"them is saved in {run.config.output}. Use a lower optimizer.learning_rate or "
        "dtype float32, and check the base and the latents"
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


def _report(run: Run, bar: tqdm, row: Row) -> None:
    """One line into the log file; the bar, or now and then a line instead of it."""
    shown = {k: v if math.isfinite(v) else None for k, v in row.items()}
    with run.log.open("a") as file:
        file.write(json.dumps(shown | {"step": int(row["step"])}) + "\n")
    bar.set_postfix_str(_text(row))
    last, every = row["step"] == run.config.steps, max(1, run.config.steps // LINES)
    if bar.disable and (last or row["step"] % every < run.config.log_every):
        print(_line(run, row), flush=True)


def _stepped(
    step: Step, state: TrainState, base: Tree, batches: Batches, until: int
) -> Iterator[tuple[TrainState, Row]]:
    """The state and the metrics after each batch."""
    for done in range(int(state.step), until):
        state, metrics = step(state, base, batches(done))
        yield state, {k: float(v) for k, v in jax.device_get(metrics).items()}  # pyright: ignore


def train(
    run: Run, step: Step, state: TrainState, base: Tree, batches: Batches
) -> tuple[TrainState, int | None]:
    """Train until the last step or a signal.

    Args:
        run: settings and what to write.
        step: from `training.make_train_step`; it takes the state over.
        state: from `start`.
        base: transformer parameters.
        batches: from the number of batches seen to the next one.

    Returns:
        The state, saved, and the signal that stopped the run, or None.

    Raises:
        NotFiniteError: if the loss is not finite several times in a row.
        OSError: if something cannot be written.
    """
    config, each = run.config, run.accumulation
    rate = training.learning_rate(config.optimizer, config.steps)
    until, first = config.steps * each, int(state.step) // each
    hidden = not sys.stderr.isatty()
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=hidden)
    rows: list[Row] = []
    bad, since = 0, time.perf_counter()
    with stopping() as caught, contextlib.closing(bar):
        for now, row in _stepped(step, state, base, batches, until):
            state, rows = now, [*rows, row]
            bad = bad + 1 if row["skipped"] else 0
            updates, rest = divmod(int(state.step), each)
            if not rest:
                bar.update()
                if updates % config.log_every == 0 or updates == config.steps:
                    spent = (time.perf_counter() - since) * each / len(rows)
                    extra = {"step": updates, "lr": rate(updates - 1)}
                    extra = {k: float(v) for k, v in extra.items()}
                    _report(run, bar, extra | {"s_per_step": spent} | _mean(rows))
                    rows, since = [], time.perf_counter()
                if updates % config.save_every == 0:
                    save(run, state)
            if bad == PATIENCE:
                save(run, state)
                _refuse(run, updates, row)
            if caught:
                break
    save(run, state)
    return state, caught[0] if caught else None

"""What a training run writes, and going on from it.

    steps = newest(run)                 what is there, if it belongs to this run
    state = start(run, steps, new)      read back; what a kill left behind is put right
    save(run, out, state)               a state, and what is exported of it

A state holds what is trained, its optimizer and averages, the number of steps taken,
the settings and the hash of the base. Random draws and the order of the data follow
from the settings and that number.

    output/state/<steps>/                       training state; see `states`
    output/lora_weights_step_<steps>.safetensors        and ..._ema.safetensors
    output/log.jsonl                            one line per `log_every` steps
    output/tensorboard/                         the same numbers; see `records`
    output/clips.jsonl                          the clips of each step, in order

Of several processes, all save and read states together, and the first writes the rest.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from idlora_jax import (
    adapters,
    checkpoints,
    distributed,
    experiment,
    files,
    shares,
    states,
)
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.experiment import TrainConfig
from idlora_jax.states import Data, States
from idlora_jax.training import TrainState
from idlora_jax.types import Tree

Export = Callable[[Path, Tree, AdapterMeta], Any]
Written = tuple[Path, Tree, AdapterMeta]
FREE = frozenset(
    "base data output generation memory dry_run assume resume resume_with verify steps "
    "save_every keep keep_best log_every tensorboard validate_every read_ahead samples "
    "wandb mesh distributed without program_cache use_program_cache precompile".split()
)
"""Settings that may differ when a run is resumed; `steps` moves the schedule's end.

On another mesh, or with another number of processes, a step is the same up to the order
of its sums.
"""


@dataclass(frozen=True)
class Run:
    """What a run writes and where; static.

    Attributes:
        config: all settings.
        meta: of the exported adapters; step and hash are filled in.
        facts: what else must be equal when resuming (hash of the base, ...).
        export: writes what is trained; None: an adapter, its b scaled.
    """

    config: TrainConfig
    meta: AdapterMeta
    facts: dict[str, Any] = field(default_factory=dict)
    export: Export | None = None

    @property
    def states(self) -> Path:
        """The folder of training states."""
        return self.config.output / "state"

    @property
    def log(self) -> Path:
        """The log file."""
        return self.config.output / "log.jsonl"

    @property
    def order(self) -> Path:
        """The file that lists the clips of each batch."""
        return self.config.output / "clips.jsonl"

    @property
    def name(self) -> str:
        """How exported files begin."""
        return "lora_weights" if self.config.mode == "lora" else "transformer"

    def adapter(self, steps: int) -> Path:
        """Where what is trained is exported to after some steps."""
        return self.config.output / f"{self.name}_step_{steps:05d}.safetensors"

    def identity(self) -> dict[str, Any]:
        """What a saved state belongs to."""
        settings = experiment.flat(experiment.plain(self.config))
        kept = {k: v for k, v in settings.items() if not _free(k)}
        return {"settings": kept, **self.facts}


def exported(run: Run, state: TrainState) -> Path:
    """Where what is trained is exported to after the steps of a state."""
    return run.adapter(int(state.step))


def exports(run: Run, state: TrainState) -> list[Written]:
    """What is exported of a state: file, unscaled tree, facts.

    The moving average, if there is one, comes second, and stands in NAME_ema.
    """
    path = exported(run, state)
    about = dataclasses.replace(run.meta, step=int(state.step))
    found: list[Written] = [(path, state.evaluated, about)]
    if state.ema is not None:
        extra = {**about.extra, "ema_decay": str(run.config.ema.decay)}
        about = dataclasses.replace(about, extra=extra)
        found.append((path.with_stem(f"{path.stem}_ema"), state.ema, about))
    return found


def _export(run: Run, path: Path, tree: Tree, about: AdapterMeta) -> None:
    if run.export is not None:
        run.export(path, tree, about)
        return
    scaled = adapters.scale(tree, run.config.lora.factor)
    checkpoints.save_adapter(path, scaled, about)


def save(
    run: Run,
    out: States,
    state: TrainState,
    loss: float | None = None,
    data: Data | None = None,
) -> None:
    """Begin to write a training state, and what is exported of it as safetensors.

    Args:
        run: settings and facts.
        out: the open `run.states`.
        state: may be donated as soon as this returns.
        loss: held-out, where it is known.
        data: where the reader of the data stands; see `position`.

    Raises:
        OSError: if what was saved before could not be written.
    """
    steps = int(state.step)
    if out.saved == steps:
        return
    # Copied to the host now: the next step takes the arrays over.
    beside = tuple(
        functools.partial(_export, run, path, shares.gathered(tree), about)
        for path, tree, about in exports(run, state)
    )
    beside = beside if distributed.is_first() else ()
    meta = {**run.identity(), "steps": steps}
    out.save(steps, state, meta, loss=loss, data=data, beside=beside)


def _named(flat: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("settings."): value for key, value in flat.items()}


def _covers(name: str, setting: str) -> bool:
    """Whether `optimizer` or `optimizer.clip` stands for `optimizer.clip`."""
    return setting == name or setting.startswith(f"{name}.")


def _free(setting: str) -> bool:
    return any(_covers(name, setting) for name in FREE)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    before, now = _named(experiment.flat(old)), _named(experiment.flat(new))
    return {
        key: f"{key}: saved with {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def listed(lines: Sequence[str]) -> str:
    """Lines under a message, the first twelve of them."""
    more = [f"... and {len(lines) - 12} more"] if len(lines) > 12 else []
    return "".join(f"\n  {line}" for line in [*lines[:12], *more])


def _check_allowed(allowed: Sequence[str], known: Collection[str]) -> None:
    for name in allowed:
        if not any(_covers(name, key) for key in known) and name not in FREE:
            near = difflib.get_close_matches(name, known, 1, 0.0)
            raise ValueError(
                f"resume_with: got {name!r}, expected the name of a setting or a fact "
                f"of the run; the nearest is {near[0]!r}"
            )


def newest(run: Run) -> int | None:
    """The saved state to go on from: its number of steps, or None for a new run.

    Raises:
        ValueError: if the output holds a state and `resume` is off, or if that state
            belongs to other settings, another base or other data that `resume_with`
            does not name.
    """
    allowed = run.config.resume_with
    now = json.loads(json.dumps(run.identity()))
    _check_allowed(allowed, _named(experiment.flat(now)))
    steps = states.latest(run.states)
    if steps is None:
        return None
    if not run.config.resume:
        raise ValueError(
            f"output: {run.config.output} holds a training state after {steps} "
            "steps; add --resume to go on, or choose another --output"
        )
    saved = states.meta_of(run.states, steps)
    found = _differences({k: saved.get(k) for k in now}, now)
    bad = [key for key in found if not any(_covers(name, key) for name in allowed)]
    if bad:
        raise ValueError(
            f"resume: {run.states}/{steps} belongs to another run:"
            f"{listed([found[key] for key in bad])}\nuse the same settings, or another "
            f"--output; to go on nevertheless, add --resume-with {' '.join(bad)}"
        )
    if found and distributed.is_first():
        print(f"resuming with other settings:{listed([*found.values()])}", flush=True)
    return steps


def position(run: Run, steps: int | None) -> Data | None:
    """Where the reader of the data stood when a state was saved; None: not recorded."""
    return None if steps is None else states.meta_of(run.states, steps)["data"]


def start(run: Run, steps: int | None, state: TrainState) -> TrainState:
    """The state to begin with: the given one, or the saved one of that number.

    What a kill left behind is put right: half-written files go, log lines after that
    state too, and an adapter that was not yet exported is.

    Raises:
        ValueError: if the state is damaged, or processes differ in their settings, or
            do not see one folder.
    """
    # Until all have looked for a state, none may write one.
    same = {**run.identity(), "steps": steps}
    distributed.require_same("settings, base, data or training states", same)
    if distributed.is_first():
        _clean(run, steps)
    distributed.wait()
    if distributed.agreed(not run.config.output.is_dir()):
        raise ValueError(
            f"output: {run.config.output} was made by the first process and is not "
            "there on all, expected one folder that all hosts reach; put it on a "
            "shared file system"
        )
    if steps is None:
        # Held to its devices, as one that was read back is: both compile to the same,
        # which a persistent cache then has.
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))
    state = states.restore(run.states, steps, state)
    for path, tree, about in exports(run, state):
        if distributed.agreed(not path.exists()):
            whole = shares.gathered(tree)
            if distributed.is_first():
                _export(run, path, whole, about)
    return state


def _clean(run: Run, steps: int | None) -> None:
    """Make the folder; remove what is half-written, and log lines after a state."""
    run.config.output.mkdir(parents=True, exist_ok=True)
    for path in run.config.output.glob(f".{run.name}_step_*.tmp*"):
        path.unlink()
    # Before the first step there is a line, too, which a new run writes again.
    _cut(run.log, "step", -1 if steps is None else steps)
    _cut(run.order, "batch", steps or 0)


def _row(line: str) -> dict[str, Any]:
    """A line of a log; one that a kill cut off is empty."""
    try:
        return json.loads(line)
    except ValueError:
        return {}


def _cut(path: Path, key: str, last: int) -> None:
    """Drop the lines after the state that is resumed from."""
    if path.is_file():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if _row(line).get(key, math.inf) <= last]
        with files.replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))

"""Train an adapter on preprocessed clips.

    python train.py --config configs/tiny.py --optimizer.learning-rate 1e-4

Writes lora_weights_step_<n>.safetensors, log.jsonl, tensorboard/, clips.jsonl and
state/ into the output folder; --resume goes on from the newest state, also after a
kill. SIGTERM and SIGINT (Ctrl-C) let the running step finish, save, and end with
status 143 and 130, so that a scheduler can tell a stopped run from a finished one
(0). Wrong usage ends with status 2, a failure with 1. --dry-run says what a run is and
needs, also where weights or data are not there, and ends. Several devices and hosts:
docs/scaling.md.
"""

from __future__ import annotations

import functools
import signal
import sys
from typing import Any

from idlora_jax import commandline
from idlora_jax.experiment import TrainConfig


def warn(line: str) -> None:
    """A line on stderr."""
    print(f"warning: {line}", file=sys.stderr)


def main() -> int:
    """Check the command line, say what a run needs, or train."""
    config = commandline.parse(sys.argv[1:], TrainConfig)
    # Imports jax: later than the command line, so that its mistakes answer at once.
    from idlora_jax import compile_cache, distributed, dry_run

    if config.dry_run:
        for text in dry_run.reports(config):
            print(text, flush=True)
        return 0
    compile_cache.start(compile_cache.folder_of(config), warn)
    distributed.start(config.distributed)
    return distributed.run(lambda: train(config)) or 0


def train(config: TrainConfig) -> int:
    """Check the inputs, train; the status is 0, or 128 and what stopped it."""
    from idlora_jax import (
        distributed,
        fitting,
        precompile,
        programs,
        training_checks,
    )

    plan = fitting.plan(config)
    if distributed.is_first():
        training_checks.announce(plan, functools.partial(print, file=sys.stderr))
    if config.precompile:
        rows, failed = precompile.training(plan)
        for outcome in failed:
            told = f"samples: {outcome.config.name}: {outcome.message}"
            print(f"error: {told}", file=sys.stderr)
        if distributed.is_first():
            print(programs.table(rows))
        return commandline.FAILURE if failed else 0
    result = fitting.fit(plan)
    if distributed.is_first():
        report(result)
    return 0 if result.signal is None else 128 + result.signal


def report(result: Any) -> None:
    """Where the adapter is, and how to go on if training was stopped."""
    print(result.adapter)
    if result.signal is not None:
        name, steps = signal.Signals(result.signal).name, int(result.state.step)
        say = f"stopped by {name} after {steps} steps, all saved"
        print(f"{say}; go on with --resume")


if __name__ == "__main__":
    commandline.guarded(main)

"""Train an adapter on preprocessed clips.

    python train.py --config configs/tiny.py --optimizer.learning-rate 1e-4

Writes lora_weights_step_<n>.safetensors, log.jsonl, tensorboard/, clips.jsonl and
state/ into the output folder; --resume goes on from the newest state, also after a
kill. SIGTERM and SIGINT (Ctrl-C) let the running step finish, save, and end with
status 143 and 130, so that a scheduler can tell a stopped run from a finished one
(0). Wrong usage ends with status 2, a failure with 1. --dry-run says what a run is and
needs, also where weights or data are not there, and ends.
"""

from __future__ import annotations

import functools
import signal
import sys

from idlora_jax import commandline
from idlora_jax.experiment import TrainConfig


def main() -> int:
    """Check the inputs, train, say where the adapter is."""
    config = commandline.parse(sys.argv[1:], TrainConfig)
    # Imports jax: later than the command line, so that its mistakes answer at once.
    from idlora_jax import dry_run, fitting, training_memory

    if config.dry_run:
        for text in dry_run.reports(config):
            print(text, flush=True)
        return 0
    plan = fitting.plan(config)
    training_memory.announce(plan, functools.partial(print, file=sys.stderr))
    result = fitting.fit(plan)
    print(result.adapter)
    if result.signal is None:
        return 0
    name, batches = signal.Signals(result.signal).name, int(result.state.step)
    print(f"stopped by {name} after {batches} batches, all saved; go on with --resume")
    return 128 + result.signal


if __name__ == "__main__":
    commandline.guarded(main)

"""Sample clips: a face and a voice from a picture, a recording and a prompt.

    python sample.py --config configs/tiny_sample.py --lora adapter.safetensors \
        --reference-audio ref.wav --first-frame face.png \
        --prompt "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..." --output-dir out/

Many samples come from --prompts-file or --input-dir (docs/sampling.md). Each writes
<name>.mp4, <name>.wav, <name>.png and <name>.json (every setting, hashes, "synthetic":
true) into the output folder; those that are there already, made from the same things,
are left as they are. Wrong usage ends with status 2, a failure of any sample with 1,
Ctrl-C with 130.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from idlora_jax import batches, commandline
from idlora_jax.sample_config import SampleConfig


def warn(line: str) -> None:
    """A line on stderr, which leaves a bar whole."""
    tqdm.write(f"warning: {line}", file=sys.stderr)


def report(outcome: Any) -> None:
    """What became of a sample: its files on stdout, or why there are none."""
    name = outcome.config.name
    if outcome.state == "failed":
        tqdm.write(f"failed: {name}: {outcome.message}", file=sys.stderr)
    elif outcome.state == "skipped":
        done = "finished before; --overwrite makes it again"
        tqdm.write(f"skipped: {name}: {done}", file=sys.stderr)
    for path in outcome.paths:
        tqdm.write(str(path), file=sys.stdout)


def summary(states: Counter[str]) -> str:
    """How many samples ended how."""
    kinds = ("written", "failed", "skipped")
    return ", ".join(f"{states[kind]} {kind}" for kind in kinds)


def main() -> int:
    """Check all inputs, sample, write; the status is 1 if any sample failed."""
    config = commandline.parse(sys.argv[1:], SampleConfig)
    configs = batches.read(config, warn)
    # Imports jax: later than the command line, so that its mistakes answer at once.
    from idlora_jax import compile_cache, precompile, programs, sessions

    compile_cache.start(compile_cache.folder_of(config), warn)
    states: Counter[str] = Counter()
    try:
        session = sessions.prepare(configs)
        for table in session.memory:
            tqdm.write(table, file=sys.stderr)
        for name, line in session.warnings:
            warn(line if len(configs) == 1 else f"{name}: {line}")
        for outcome in session.outcomes:
            report(outcome)
            states[outcome.state] += 1
        if config.precompile:
            rows, failed = precompile.samples(session)
            for outcome in failed:
                report(outcome)
            print(programs.table(rows))
            return commandline.FAILURE if failed else 0
        hidden = not (config.progress and session.todo)
        with tqdm(total=session.steps, unit="step", disable=hidden) as bar:

            def step(names: Sequence[str], seen: Any) -> None:
                bar.set_description(", ".join(names), refresh=False)
                bar.update(len(names))

            watch = step if config.progress else None
            for outcome in sessions.make(session, watch, warn):
                report(outcome)
                states[outcome.state] += 1
    except KeyboardInterrupt:
        done = states["written"] + states["skipped"]
        print(
            f"interrupted: {done} of {len(configs)} samples are finished, in "
            f"{config.output_dir}; the same command goes on with the others",
            file=sys.stderr,
        )
        return commandline.INTERRUPTED
    if len(configs) > 1:
        print(summary(states), file=sys.stderr)
    return commandline.FAILURE if states["failed"] else 0


if __name__ == "__main__":
    commandline.guarded(main)

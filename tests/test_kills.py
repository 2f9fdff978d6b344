"""kill -9 at random moments: what is on disk can always be gone on from, exactly.

IDLORA_KILLS=20 kills more often than the three times of every run of the tests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import latent_folder
import numpy as np
import pytest
from train_script import ROOT, command, environment, lines

from idlora_jax import states
from idlora_jax.experiment import TrainConfig
from idlora_jax.presets import tiny_train

KILLS = int(os.environ.get("IDLORA_KILLS", "3"))
STEPS = 6 + 5 * KILLS


def started(config: TrainConfig, cache: pathlib.Path) -> subprocess.Popen[str]:
    """Every step is saved, so that a kill often finds a save under way."""
    options = [f"--steps={STEPS}", "--save-every=1", "--batch-size=1", "--resume"]
    return subprocess.Popen(
        command(config, *options, "--ema.decay=0.9"),
        cwd=ROOT,
        env=environment(cache),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    """Wait; a run that has come to its end is not waited for."""
    while not there() and process.poll() is None:
        time.sleep(0.005)


def killed(
    config: TrainConfig, cache: pathlib.Path, rng: np.random.Generator
) -> tuple[float, int | None, bool]:
    """Start, kill: seconds to the first new batch, the newest state, a torn save."""
    process = started(config, cache)
    began, took = time.monotonic(), float("nan")
    if rng.random() < 0.2:  # while it starts, too
        time.sleep(rng.uniform(0, 3))
    else:
        known = states.latest(config.output / "state") or 0
        log = config.output / "clips.jsonl"
        # Lines of batches after that state are dropped first.
        until(process, lambda: lines(log) <= known)
        until(process, lambda: lines(log) > known)
        took = time.monotonic() - began
        more = int(rng.integers(1, 6))
        until(process, lambda: lines(log) > known + more)
        time.sleep(rng.uniform(0, 0.15))
    process.kill()
    _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err
    names = [path.name for path in config.output.rglob("*") if "tmp" in path.name]
    return took, states.latest(config.output / "state"), bool(names)


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_like_one_that_was_not(
    tiny_model: Any, tmp_path: pathlib.Path
):
    clips = latent_folder.write(tmp_path / "clips", 4, text=(128, 48))
    config = dataclasses.replace(
        tiny_train(), base=tiny_model[0], data=clips, output=tmp_path / "straight"
    )
    cache, rng = tmp_path / "cache", np.random.default_rng()
    straight = started(config, cache)
    _, err = straight.communicate()
    assert straight.returncode == 0, err
    wounded = dataclasses.replace(config, output=tmp_path / "killed")
    seen = [killed(wounded, cache, rng) for _ in range(KILLS)]
    last = started(wounded, cache)
    out, err = last.communicate()
    assert last.returncode == 0, err
    for took, newest, torn in seen:
        print(f"first step after {took:.1f} s; newest state {newest}; torn {torn}")
    for path in sorted(config.output.glob(f"*_{STEPS:05d}*.safetensors")):
        again = wounded.output / path.name
        assert again.read_bytes() == path.read_bytes(), path.name
    saved = [sorted(p.name for p in c.output.glob("*")) for c in (config, wounded)]
    assert saved[0] == saved[1]
    assert len(saved[0]) == 2 * STEPS + 4
    order = [c.output / "clips.jsonl" for c in (config, wounded)]
    assert order[0].read_text() == order[1].read_text()
    logs = [rows(c.output / "log.jsonl") for c in (config, wounded)]
    machine = dict.fromkeys(("s_per_step", "tokens_per_s", "peak_memory_gb"), 0)
    for one, other in zip(*logs, strict=True):
        assert one | machine == other | machine
    assert str(wounded.output) in out

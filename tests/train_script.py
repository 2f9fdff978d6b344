"""`train.py` as users start it, on the tiny model."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

from idlora_jax.experiment import TrainConfig

ROOT = pathlib.Path(__file__).parents[1]


def command(config: TrainConfig, *options: str) -> list[str]:
    """The script with the paths of a configuration."""
    paths = {"base": config.base, "data": config.data, "output": config.output}
    given = [f"--{name}={path}" for name, path in paths.items()]
    script = [sys.executable, "train.py", "--config", "configs/tiny.py"]
    # The plan of memory has its own tests, and takes a second of each run.
    return [*script, *given, "--heldout.clips=0", "--memory=off", *options]


def environment(cache: pathlib.Path) -> dict[str, str]:
    """Runs that reuse each other's compiled step."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def lines(path: pathlib.Path) -> int:
    """How many lines a file has by now."""
    return len(path.read_text().splitlines()) if path.is_file() else 0


def wait_for_line(log: pathlib.Path, process: subprocess.Popen[str], line: int) -> None:
    """Return as soon as the log has so many lines."""
    deadline = time.monotonic() + 300
    while lines(log) < line:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.005)

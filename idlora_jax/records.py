"""Where the numbers of a training run go.

    log.jsonl       always: one JSON object a line, its `step` first; not finite is null
    tensorboard/    the same numbers as scalars (`TrainConfig.tensorboard`)

A run that goes on from a saved state appends to both. The lines after that state were
cut off (`runs.start`), and TensorBoard is told to drop what it has from there on.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax

from idlora_jax import distributed
from idlora_jax.experiment import TrainConfig

Row = dict[str, float]
FOLDER = "tensorboard"
GB = 1e9


@runtime_checkable
class Sink(Protocol):
    """What takes numbers by name."""

    def scalars(self, step: int, values: Row) -> None:
        """Write the numbers of a step."""
        ...


@dataclass(frozen=True)
class Lines:
    """A JSONL file, appended to."""

    path: Path

    def scalars(self, step: int, values: Row) -> None:
        """One line, on disk when this returns."""
        shown = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **shown}) + "\n")


@dataclass(frozen=True)
class Board:
    """TensorBoard's event files, one for each time a run goes on."""

    writer: Any

    def scalars(self, step: int, values: Row) -> None:
        """One number each, on disk when this returns."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


@dataclass(frozen=True)
class Records:
    """Several sinks as one."""

    sinks: tuple[Sink, ...]

    def write(self, step: int, values: Row) -> None:
        """Write the numbers of a step to all.

        Raises:
            OSError: if one cannot be written.
        """
        for sink in self.sinks:
            sink.scalars(step, values)


@contextlib.contextmanager
def opened(config: TrainConfig, log: Path, first: int) -> Iterator[Records]:
    """The logs of a run, while it goes on; of several processes the first writes them.

    Args:
        config: which ones, and where.
        log: the JSONL file.
        first: updates done before.
    """
    if not distributed.is_first():
        yield Records(())
        return
    lines = Lines(log)
    if not config.tensorboard:
        yield Records((lines,))
        return
    # Takes seconds where torch is installed, which it then imports.
    from tensorboardX import SummaryWriter

    folder = config.output / FOLDER
    purge = first + 1 if folder.is_dir() else None
    # A second of its own is not enough to tell the files of two starts apart.
    writer = SummaryWriter(
        str(folder), purge_step=purge, filename_suffix=f".{time.time_ns()}"
    )
    with contextlib.closing(writer):
        yield Records((lines, Board(writer)))


def peak_bytes() -> int:
    """The most memory that was in use: of the first device, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def tokens(batch: Any) -> int:
    """Target and reference tokens of a batch of latents [B F H W C] and [B T M C]."""
    video = (batch.video, batch.video_reference)
    sound = (batch.audio, batch.reference)
    count = sum(math.prod(x.shape[:4]) for x in video if x is not None)
    return count + sum(math.prod(x.shape[:2]) for x in sound if x is not None)


def speed(batch: Any, seconds: float) -> Row:
    """`tokens_per_s`, where a batch takes so long, and `peak_memory_gb` until now."""
    memory = peak_bytes() / GB
    return {"tokens_per_s": tokens(batch) / seconds, "peak_memory_gb": memory}

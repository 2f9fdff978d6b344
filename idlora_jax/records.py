"""Where the numbers of a training run go, and the clips sampled on the way.

    log.jsonl       always: one JSON object a line, its `step` first; not finite is null
    tensorboard/    the same numbers as scalars, contact sheets and sound of clips
                    (`TrainConfig.tensorboard`)
    wandb/          the same for Weights & Biases (`TrainConfig.wandb`); see `wandb_run`

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from idlora_jax import distributed, media, wandb_run
from idlora_jax.experiment import TrainConfig

Row = dict[str, float]
FOLDER = "tensorboard"
GB = 1e9


class Sampled(NamedTuple):
    """A clip that was sampled while training went on; see `validation`.

    Attributes:
        name: where it stands in the logs.
        files: what there is of it, by ending: "mp4", "wav", "png", "json".
        new: False if it was there before.
        message: what went wrong, if there is none.
    """

    name: str
    files: Mapping[str, Path] = {}
    new: bool = True
    message: str = ""


@runtime_checkable
class Sink(Protocol):
    """What takes numbers by name, and clips."""

    def scalars(self, step: int, values: Row) -> None:
        """Write the numbers of a step."""
        ...

    def clip(self, step: int, name: str, files: Mapping[str, Path]) -> None:
        """Write a clip, whose files are given by ending."""
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

    def clip(self, step: int, name: str, files: Mapping[str, Path]) -> None:
        """Nothing: the JSON beside the clip says all there is."""


@dataclass(frozen=True)
class Board:
    """TensorBoard's event files, one for each time a run goes on."""

    writer: Any

    def scalars(self, step: int, values: Row) -> None:
        """One number each, on disk when this returns."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def clip(self, step: int, name: str, files: Mapping[str, Path]) -> None:
        """Contact sheet and sound; the mp4 stays where it is."""
        if "png" in files:
            sheet = media.read_image(files["png"])
            self.writer.add_image(f"{name}/sheet", sheet, step, dataformats="HWC")
        if "wav" in files:
            # Here and not above: librosa, which this library uses, brings it.
            import soundfile

            wave, rate = soundfile.read(files["wav"], dtype="float32", always_2d=True)
            self.writer.add_audio(f"{name}/sound", wave, step, rate)
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

    def show(self, step: int, clip: Sampled) -> None:
        """Give a clip to all.

        Raises:
            OSError: if one cannot be written.
        """
        for sink in self.sinks:
            sink.clip(step, clip.name, clip.files)


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
    with contextlib.ExitStack() as stack:
        sinks: list[Sink] = [Lines(log)]
        if config.tensorboard:
            sinks.append(stack.enter_context(_board(config.output / FOLDER, first)))
        if config.wandb.project is not None:
            sinks.append(stack.enter_context(wandb_run.opened(config)))
        yield Records(tuple(sinks))


@contextlib.contextmanager
def _board(folder: Path, first: int) -> Iterator[Board]:
    # Takes seconds where torch is installed, which it then imports.
    from tensorboardX import SummaryWriter

    # Before the first step there may be numbers, too.
    purge = first + bool(first) if folder.is_dir() else None
    # A second of its own is not enough to tell the files of two starts apart.
    writer = SummaryWriter(
        str(folder), purge_step=purge, filename_suffix=f".{time.time_ns()}"
    )
    with contextlib.closing(writer):
        yield Board(writer)


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

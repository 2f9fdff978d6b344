"""A training run in Weights & Biases, whose package is only imported if it is used.

    check(config)               before anything is read: the package is there
    opened(config) -> Project   while the run goes on; one of the sinks of `records`

The run's id is kept in OUTPUT/wandb_run.json, so that a run that is resumed goes on
there. What came after the state that it goes on from stays in its curves: Weights &
Biases forgets nothing that it was told. Its own variables hold: with WANDB_MODE=offline
everything stays in OUTPUT/wandb, to be sent later by `wandb sync`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlora_jax import experiment, files
from idlora_jax.experiment import TrainConfig

NAME = "wandb_run.json"
"""The file in the output folder that holds the run's id."""
STEP = "step"
PACKAGE = "wandb"


def check(config: TrainConfig) -> None:
    """Raise if the package is needed and not there.

    Raises:
        ValueError: with the command that installs it.
    """
    project = config.wandb.project
    if project is None:
        return
    spec = importlib.util.find_spec(PACKAGE)
    # A folder of that name, which every run leaves where it was, has no file.
    if spec is None or spec.origin is None:
        raise ValueError(
            f"wandb.project: got {project!r}, but the package wandb is not installed; "
            "pip install idlora_jax[wandb], or leave --wandb.project out"
        )


@dataclass(frozen=True)
class Project:
    """An open run.

    Attributes:
        run: of the package.
        package: itself, for its types of media.
        video: whether mp4 files are given to it.
    """

    run: Any
    package: Any
    video: bool

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step."""
        self.run.log({STEP: step, **values})

    def clip(self, step: int, name: str, files: Mapping[str, Path]) -> None:
        """Contact sheet and sound, and the video if that is wanted."""
        kinds = {"png": ("sheet", self.package.Image, {})}
        kinds["wav"] = ("sound", self.package.Audio, {})
        if self.video:
            kinds["mp4"] = ("video", self.package.Video, {"format": "mp4"})
        shown = {
            f"{name}/{part}": kind(str(files[ending]), **options)
            for ending, (part, kind, options) in kinds.items()
            if ending in files
        }
        if shown:
            self.run.log({STEP: step, **shown})


def _id(output: Path) -> str:
    """The run's id: that of before, or a new one, which is kept.

    Raises:
        ValueError: if the file that keeps it is damaged.
        OSError: if it cannot be written.
    """
    path = output / NAME
    if path.is_file():
        try:
            return str(json.loads(path.read_text())["id"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: got a file without a run's id, expected the one that was "
                "written here; delete it to begin another run in Weights & Biases"
            ) from None
    made = uuid.uuid4().hex[:12]
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps({"id": made}) + "\n")
    return made


@contextlib.contextmanager
def opened(config: TrainConfig) -> Iterator[Project]:
    """Begin the run, or go on with it.

    Args:
        config: `wandb.project` is set.

    Raises:
        ValueError: if it cannot be begun: without a key, without a network.
    """
    import wandb

    folder = config.output / PACKAGE
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=config.wandb.project,
            id=_id(config.output),
            resume="allow",
            dir=str(config.output),
            config=experiment.flat(experiment.plain(config)),
            allow_val_change=True,
            # Of what is printed it would keep a copy.
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise ValueError(
            f"wandb.project: the run could not be begun ({error}); log in by `wandb "
            "login`, or set WANDB_MODE=offline to keep it here"
        ) from None
    run.define_metric("*", step_metric=STEP)
    failed = 1
    try:
        yield Project(run, wandb, config.wandb.video)
        failed = 0
    finally:
        run.finish(exit_code=failed)

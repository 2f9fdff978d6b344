"""What is looked at while a training run goes on, as values: clips, and where they go.

Samples     clips that are sampled every so many steps; see `validation`
Wandb       the project of Weights & Biases that numbers and clips go to
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from idlora_jax.sample_config import SampleConfig
from idlora_jax.settings import require


@dataclass(frozen=True)
class Samples:
    """Clips that are sampled while training goes on, always the same ones.

    They come out as `sample.py` gives them with the adapter of that step. Base, dtype,
    weights and mesh are those of training, the adapter comes after the configuration's
    own.

    Attributes:
        every: steps between them, the last step included; 0: none.
        at_start: whether they are sampled before the first step, too, which shows what
            the base does, and at once whether there is memory for it.
        config: a configuration file of `sample.py`.
        prompts_file: prompts, recordings and pictures; see `batches`. None: those of
            the configuration.
        text_encoder: in place of the configuration's.
        ema: whether the moving average is sampled, too.
        clips: what is sampled, in place of `config`; all that is no text, file, name,
            size, rate or seed of a clip must be equal in them.
    """

    every: int = 0
    at_start: bool = True
    config: Path | None = None
    prompts_file: Path | None = None
    text_encoder: Path | None = None
    ema: bool = False
    clips: tuple[SampleConfig, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is something to sample."""
        require(self.every >= 0, "samples.every", self.every, "0 or more")
        if self.every:
            given = bool(self.clips) or self.config is not None
            want = "a configuration file of sample.py, such as configs/tiny_sample.py"
            require(given, "samples.config", None, want)
        if self.clips:
            for name in ("config", "prompts_file"):
                value = getattr(self, name)
                require(value is None, f"samples.{name}", value, "none beside clips")

    def due(self, step: int, last: int) -> bool:
        """Whether clips are sampled after so many steps.

        Args:
            step: updates done; 0 before the first.
            last: updates of the whole run.
        """
        if not self.every:
            return False
        if not step:
            return self.at_start
        return step % self.every == 0 or step == last


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases; its own variables (WANDB_MODE, WANDB_ENTITY, ...) hold, too.

    Attributes:
        project: where the run appears; None: it is not used.
        video: whether the mp4 files of sampled clips are uploaded.
    """

    project: str | None = None
    video: bool = False

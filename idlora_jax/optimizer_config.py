"""How gradients change what is trained, as values; see `optimizers`.

Optimizer   the method, its learning rate and what stands around it
Ema         the moving average beside it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from idlora_jax.settings import require


@dataclass(frozen=True)
class Optimizer:
    """How gradients change what is trained; see `optimizers`.

    Attributes:
        name: the method.
        learning_rate: the highest; for prodigy a factor of what it finds, about 1.
        schedule: how the rate changes after the warm-up, until `TrainConfig.steps`.
        warmup: steps over which it rises from 0.
        end_factor: the last learning rate over the first.
        power: of the polynomial schedule.
        cycle: steps of the first cycle of restarts; None: a quarter of all.
        cycle_growth: each cycle of restarts is this many times as long.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        clip: largest global norm of the gradient; None: no clipping.
        accumulation: batches per step, one after the other.
        b_ratio: learning rate of an adapter's b over that of its a (LoRA+).
    """

    name: Literal["adamw", "adamw8bit", "lion", "prodigy", "schedule_free"] = "adamw"
    learning_rate: float = 2e-4
    schedule: Literal["linear", "constant", "cosine", "restarts", "polynomial"] = (
        "linear"
    )
    warmup: int = 0
    end_factor: float = 0.1
    power: float = 1.0
    cycle: int | None = None
    cycle_growth: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float | None = 1.0
    accumulation: int = 1
    b_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges, and what does not go together."""
        rate, n = self.learning_rate, self.accumulation
        require(rate >= 0, "optimizer.learning_rate", rate, "0 or more")
        require(n >= 1, "optimizer.accumulation", n, "1 or more")
        good = self.clip is None or self.clip > 0
        require(good, "optimizer.clip", self.clip, "above 0, or None")
        good = all(0 <= beta < 1 for beta in self.betas)
        require(good, "optimizer.betas", self.betas, "two numbers from 0, below 1")
        for name in ("end_factor", "warmup", "eps", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optimizer.{name}", value, "0 or more")
        for name in ("power", "b_ratio"):
            value = getattr(self, name)
            require(value > 0, f"optimizer.{name}", value, "above 0")
        for name in ("cycle", "cycle_growth"):
            value = getattr(self, name)
            good = value is None or value >= 1
            require(good, f"optimizer.{name}", value, "1 or more")
        self._check_method()

    def _check_method(self) -> None:
        if self.name == "prodigy":
            got = self.learning_rate
            want = "a factor of about 1 (0.1 or more): prodigy finds the rate itself"
            require(got >= 0.1, "optimizer.learning_rate", got, want)
            want = "1: prodigy finds one rate for all"
            require(self.b_ratio == 1, "optimizer.b_ratio", self.b_ratio, want)
        if self.name == "schedule_free":
            want = "constant (a warm-up may stand before): schedule_free averages"
            require(
                self.schedule == "constant", "optimizer.schedule", self.schedule, want
            )
            want = "a first one above 0: schedule_free divides by it"
            require(self.betas[0] > 0, "optimizer.betas", self.betas, want)


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of what is trained, exported beside it.

    Attributes:
        decay: of the average at each step, such as 0.999; None: no average.
        start: steps until which the average is the last value.
    """

    decay: float | None = None
    start: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        good = self.decay is None or 0 < self.decay < 1
        require(good, "ema.decay", self.decay, "above 0 and below 1, or None")
        require(self.start >= 0, "ema.start", self.start, "0 or more")

"""One experiment as a value: every setting of training, checked.

A configuration file is Python: its `get_config()` returns a frozen dataclass, this
`TrainConfig` or `sample_config.SampleConfig`, and the command line (`commandline`)
overrides single fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from idlora_jax.config import AUDIO_TARGETS

Numerics = Literal["exact", "reference"]


def require(ok: bool, name: str, got: Any, expected: str) -> None:
    """Raise `ValueError` unless a setting is as expected."""
    if not ok:
        raise ValueError(f"{name}: got {got!r}, expected {expected}")


@dataclass(frozen=True)
class Strategy:
    """How a training sample is made from a clip; see `strategies`.

    Attributes:
        name: which streams are built.
        first_frame_p: probability that the first latent frame is given.
        coin: one draw for that per sample, or one for the whole batch (as published).
        video_sees_ref: whether audio-to-video attention reads the reference.
        ref_sees_text: whether reference tokens read the prompt.
        negative_positions: the reference lies before zero seconds, else on the plain
            grid from zero.
        gap_s: seconds between the reference's end and zero.
        sigma: the sampler of noise levels: of the generation "2.0" or "2.3", or
            uniform.
        shared_sigma: video and audio get the same level.
        audio_weight: factor of the audio loss.
    """

    name: Literal["audio_ref_only_ic", "text_to_video"] = "audio_ref_only_ic"
    first_frame_p: float = 0.9
    coin: Literal["sample", "batch"] = "batch"
    video_sees_ref: bool = False
    ref_sees_text: bool = False
    negative_positions: bool = True
    gap_s: float = 0.04
    sigma: Literal["2.0", "2.3", "uniform"] = "2.0"
    shared_sigma: bool = True
    audio_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        p = self.first_frame_p
        require(0 <= p <= 1, "strategy.first_frame_p", p, "0 to 1")
        require(self.gap_s >= 0, "strategy.gap_s", self.gap_s, "0 or more seconds")


@dataclass(frozen=True)
class Lora:
    """The adapter that is trained.

    Attributes:
        rank: R.
        alpha: the change is scaled by alpha / rank.
        targets: patterns of adapted modules; see `adapters.select`.
        seed: of its initial values.
    """

    rank: int = 128
    alpha: float = 128.0
    targets: tuple[str, ...] = AUDIO_TARGETS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.rank >= 1, "lora.rank", self.rank, "1 or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")


@dataclass(frozen=True)
class Optimizer:
    """AdamW with decoupled weight decay, after clipping.

    Attributes:
        learning_rate: at the first step.
        schedule: how it changes over `TrainConfig.steps`.
        end_factor: the last learning rate over the first.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: times the learning rate.
        clip: largest global norm of the gradient; None: no clipping.
        accumulation: batches per step.
    """

    learning_rate: float = 2e-4
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    end_factor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float | None = 1.0
    accumulation: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        rate, n = self.learning_rate, self.accumulation
        require(rate >= 0, "optimizer.learning_rate", rate, "0 or more")
        require(n >= 1, "optimizer.accumulation", n, "1 or more")
        good = self.clip is None or self.clip > 0
        require(good, "optimizer.clip", self.clip, "above 0, or None")


@dataclass(frozen=True)
class HeldOut:
    """The fixed batch whose loss is printed before and after training.

    Attributes:
        clips: how many clips are kept out of training; 0: no such loss.
        sigmas: the fixed noise levels.
        seed: of the fixed noise.
    """

    clips: int = 2
    sigmas: tuple[float, ...] = tuple((2 * k + 1) / 16 for k in range(8))
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.clips >= 0, "heldout.clips", self.clips, "0 or more")
        good = all(0 < s <= 1 for s in self.sigmas) and len(self.sigmas) > 0
        require(good, "heldout.sigmas", self.sigmas, "levels above 0, up to 1")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `train.py` needs.

    Attributes:
        base: the base checkpoint (one .safetensors file, or a converted folder).
        data: folder of the published latent layout, or a TFDS data set of it.
        output: folder for the log, the training state and the exported adapters.
        strategy: how training samples are made.
        lora: the adapter.
        optimizer: how it is updated.
        steps: updates of the adapter.
        batch_size: clips per batch.
        seed: of shuffling, noise levels and noise.
        save_every: steps between saves; the last step is always saved.
        keep: how many training states are kept (exported adapters all are).
        log_every: steps between log lines.
        numerics: how positions are made; see `geometry.positions`.
        remat: what the backward pass keeps: everything but weights, some
            activations, or layer inputs only.
        dtype: of the base and of the computation. Adapter, loss and optimizer are
            float32.
        fp8: what becomes of kernels that the base holds in 8 bits: times their scales
            in `dtype`, or kept and widened a layer at a time (half the memory).
        heldout: the fixed evaluation.
        resume: continue from the newest state in `output`.
        verify: first read the whole base and compare it with its recorded hashes.
    """

    base: Path
    data: Path
    output: Path
    strategy: Strategy = field(default_factory=Strategy)
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    steps: int = 3000
    batch_size: int = 1
    seed: int = 0
    save_every: int = 200
    keep: int = 2
    log_every: int = 1
    numerics: Numerics = "exact"
    remat: Literal["none", "selective", "full"] = "full"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    fp8: Literal["upcast", "keep"] = "upcast"
    heldout: HeldOut = field(default_factory=HeldOut)
    resume: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "batch_size", "save_every", "keep", "log_every"):
            value = getattr(self, name)
            require(value >= 1, name, value, "1 or more")


def plain(config: Any) -> Any:
    """A configuration as nested dicts, lists and strings, for JSON."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.fields(config)
        return {f.name: plain(getattr(config, f.name)) for f in fields}
    if isinstance(config, tuple | list):
        return [plain(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        deeper = isinstance(value, dict)
        out |= flat(value, f"{prefix}{name}.") if deeper else {prefix + name: value}
    return out


def config_hash(config: Any) -> str:
    """A short hash of every setting."""
    text = json.dumps(plain(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

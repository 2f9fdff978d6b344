"""One experiment as a value: every setting of training, checked.

A configuration file is Python: its `get_config()` returns a frozen dataclass, this
`TrainConfig` or `sample_config.SampleConfig`, and the command line (`commandline`)
overrides single fields.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from idlora_jax import axes
from idlora_jax.assumed import Assume
from idlora_jax.config import AUDIO_TARGETS, Generation
from idlora_jax.monitoring import Samples, Wandb
from idlora_jax.optimizer_config import Ema, Optimizer
from idlora_jax.savings import Saving
from idlora_jax.settings import Distributed, Numerics, require

StrategyName = Literal[
    "audio_ref_only_ic", "text_to_video", "video_to_video", "audio_video_ic"
]


@dataclass(frozen=True)
class Strategy:
    """How a training sample is made from a clip; see `strategies`.

    Attributes:
        name: which streams are built.
        with_audio: whether "text_to_video" trains the clips' sound too.
        first_frame_p: probability that the first latent frame is given.
        coin: one draw for that per sample, or one for the whole batch (as published).
        video_sees_ref: whether audio-to-video attention reads the reference.
        ref_sees_text: whether reference tokens read the prompt.
        negative_positions: an audio reference lies before zero seconds, else on the
            plain grid from zero.
        negative_video: a video reference lies before zero seconds, else at the clip's
            own time.
        gap_s: seconds between the end of a reference before zero, and zero.
        reference_p_drop: probability that a sample is trained without its references,
            so that guidance away from "no reference" has something to start from.
        sigma: the sampler of noise levels: of the generation "2.0" or "2.3", or
            uniform; None: of the base's generation.
        shared_sigma: video and audio get the same level.
        audio_weight: factor of the audio loss.
    """

    name: StrategyName = "audio_ref_only_ic"
    with_audio: bool = True
    first_frame_p: float = 0.9
    coin: Literal["sample", "batch"] = "batch"
    video_sees_ref: bool = False
    ref_sees_text: bool = False
    negative_positions: bool = True
    negative_video: bool = False
    gap_s: float = 0.04
    reference_p_drop: float = 0.0
    sigma: Literal["2.0", "2.3", "uniform"] | None = None
    shared_sigma: bool = True
    audio_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("first_frame_p", "reference_p_drop"):
            p = getattr(self, name)
            require(0 <= p <= 1, f"strategy.{name}", p, "0 to 1")
        require(self.gap_s >= 0, "strategy.gap_s", self.gap_s, "0 or more seconds")
        weight = self.audio_weight
        require(weight >= 0, "strategy.audio_weight", weight, "0 or more")


def patterns(name: str, rows: tuple[str, ...]) -> dict[str, float]:
    """`("blocks/audio/ff/*=64",)` -> `{"blocks/audio/ff/*": 64.0}`.

    Raises:
        ValueError: for a row of another form, or a value that is not above 0.
    """
    out: dict[str, float] = {}
    for row in rows:
        pattern, _, text = row.rpartition("=")
        good = bool(pattern) and re.fullmatch(r"\d+(\.\d+)?", text) is not None
        good = good and float(text) > 0
        require(good, name, row, '"pattern=number", the number above 0')
        out[pattern] = float(text)
    return out


def _first(table: dict[str, float], module: str, default: float) -> float:
    """The value of the first pattern that fits."""
    fits = (v for p, v in table.items() if fnmatch.fnmatchcase(module, p))
    return next(fits, default)


@dataclass(frozen=True)
class Lora:
    """The adapter that is trained.

    Attributes:
        rank: R.
        alpha: the change is scaled by alpha / rank.
        targets: patterns of adapted modules; see `adapters.select`.
        ranks: other ranks, as "pattern=rank"; the first pattern that fits decides.
        alphas: other alphas, as "pattern=alpha".
        rslora: scale by alpha / sqrt(rank) instead, so that a larger rank does not
            make the change smaller (arXiv 2312.03732).
        dropout: probability that an input of an adapter is left out in training.
        seed: of its initial values.
    """

    rank: int = 128
    alpha: float = 128.0
    targets: tuple[str, ...] = AUDIO_TARGETS
    ranks: tuple[str, ...] = ()
    alphas: tuple[str, ...] = ()
    rslora: bool = False
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        require(self.rank >= 1, "lora.rank", self.rank, "1 or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "above 0")
        good = 0 <= self.dropout < 1
        require(good, "lora.dropout", self.dropout, "0 or more, below 1")
        patterns("lora.alphas", self.alphas)
        for pattern, rank in patterns("lora.ranks", self.ranks).items():
            require(rank == int(rank), f"lora.ranks {pattern}", rank, "a whole number")

    def rank_of(self, module: str) -> int:
        """The rank of a module, given its path."""
        table = patterns("lora.ranks", self.ranks)
        return int(_first(table, module, float(self.rank)))

    def factor(self, module: str, rank: int) -> float:
        """What the change of a module of that rank is multiplied with."""
        alpha = _first(patterns("lora.alphas", self.alphas), module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


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
        data: folder of the published latent layout, a folder of such folders by size,
            or a TFDS data set of it.
        output: folder for the log, the training state and the exported adapters.
        generation: that the base must be of; None: any.
        mode: what is trained: an adapter, or (full) every parameter of the transformer,
            which needs 16 bytes for each of them; `lora` is not read then.
        strategy: how training samples are made.
        lora: the adapter.
        optimizer: how it is updated.
        ema: its moving average.
        steps: updates of the adapter.
        batch_size: clips per batch; a step takes `optimizer.accumulation` of these.
        read_ahead: batches that threads read while one is trained on; 0: none.
        seed: of shuffling, noise levels and noise.
        save_every: steps between saves; the last step is always saved.
        keep: how many training states are kept (exported adapters all are).
        keep_best: how many of those with the lowest held-out loss are kept besides.
        log_every: steps between log lines.
        tensorboard: whether numbers go to `output/tensorboard`, too.
        validate_every: steps between held-out losses in the log; 0: none.
        numerics: how positions are made; see `geometry.positions`.
        remat: what the backward pass keeps: everything but weights, some
            activations, or layer inputs only.
        without: savings that are switched off, to find a fault; see `savings`.
        dtype: of the base and of the computation. Adapter, loss and optimizer are
            float32.
        weights: what the transformer's kernels are: those that the base holds in fp8
            times their scales in `dtype` ("upcast"), or kept and widened a layer at a
            time ("keep": half the memory); or all of the blocks in int8, made while
            they are read ("int8": half the memory of any base).
        weights_in: where the kernels of the blocks are; "host": in host memory, from
            where layers come to the device while the one before computes.
        heldout: the fixed evaluation.
        samples: clips that are sampled while training goes on.
        wandb: whether numbers and clips go to Weights & Biases, too.
        mesh: axes over devices, for instance "data=2,fsdp=4"; empty: one device.
        distributed: how processes on several hosts find each other.
        memory: what happens if the memory plan exceeds the device: an error, a warning,
            or no plan at all.
        program_cache: folder of compiled programs; None: in the user's cache folder.
        use_program_cache: whether compiled programs are kept and used again.
        precompile: compile all that the run needs, say what of time and memory that
            takes, and read no weights.
        dry_run: print what the run is and needs, and do nothing.
        assume: what that takes for what is not there.
        resume: continue from the newest state in `output`.
        resume_with: names of settings, such as "seed" or "optimizer", that may differ
            from those of that state; "base" and "clips" stand for other weights and
            other data.
        verify: first read the whole base and compare it with its recorded hashes.
    """

    base: Path
    data: Path
    output: Path
    generation: Generation | None = None
    mode: Literal["lora", "full"] = "lora"
    strategy: Strategy = field(default_factory=Strategy)
    lora: Lora = field(default_factory=Lora)
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema: Ema = field(default_factory=Ema)
    steps: int = 3000
    batch_size: int = 1
    read_ahead: int = 2
    seed: int = 0
    save_every: int = 200
    keep: int = 2
    keep_best: int = 1
    log_every: int = 1
    tensorboard: bool = True
    validate_every: int = 0
    numerics: Numerics = "exact"
    remat: Literal["none", "selective", "full"] = "full"
    without: tuple[Saving, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weights: Literal["upcast", "keep", "int8"] = "upcast"
    weights_in: Literal["device", "host"] = "device"
    heldout: HeldOut = field(default_factory=HeldOut)
    samples: Samples = field(default_factory=Samples)
    wandb: Wandb = field(default_factory=Wandb)
    mesh: str = ""
    distributed: Distributed = field(default_factory=Distributed)
    memory: Literal["check", "warn", "off"] = "check"
    program_cache: Path | None = None
    use_program_cache: bool = True
    precompile: bool = False
    dry_run: bool = False
    assume: Assume = field(default_factory=Assume)
    resume: bool = False
    resume_with: tuple[str, ...] = ()
    verify: bool = False

    @property
    def clips_per_step(self) -> int:
        """Clips that a step takes, those of all its batches."""
        return self.batch_size * self.optimizer.accumulation

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "batch_size", "save_every", "keep", "log_every"):
            value = getattr(self, name)
            require(value >= 1, name, value, "1 or more")
        for name in ("keep_best", "validate_every", "read_ahead"):
            value = getattr(self, name)
            require(value >= 0, name, value, "0 or more")
        self._check_together()

    def _check_mesh(self) -> None:
        sizes = axes.parse(self.mesh)
        parts = axes.parts(sizes)
        want = f"a multiple of {parts}, the data and fsdp of mesh {self.mesh!r}"
        require(self.batch_size % parts == 0, "batch_size", self.batch_size, want)
        want = "no guidance axis: training has no branches (use data, fsdp, tensor)"
        require(sizes.get("guidance", 1) == 1, "mesh", self.mesh, want)

    def _check_together(self) -> None:
        self._check_mesh()
        optimizer, warmup = self.optimizer, self.optimizer.warmup
        want = f"fewer than the {self.steps} steps"
        require(warmup < self.steps, "optimizer.warmup", warmup, want)
        if optimizer.name == "schedule_free":
            want = "None: what schedule_free exports is an average already"
            require(self.ema.decay is None, "ema.decay", self.ema.decay, want)
        if self.samples.ema:
            want = "off without a moving average (--ema.decay)"
            require(self.ema.decay is not None, "samples.ema", True, want)
        if self.weights_in == "host":
            want = "full with weights_in 'host': layers are fetched and computed again"
            require(self.remat == "full", "remat", self.remat, want)
        if self.mode == "full":
            want = "upcast: parameters kept in 8 bits cannot be trained"
            require(self.weights == "upcast", "weights", self.weights, want)
            want = "device: parameters in host memory cannot be trained"
            require(self.weights_in == "device", "weights_in", self.weights_in, want)
            want = "1: in mode full there is no adapter"
            require(
                optimizer.b_ratio == 1, "optimizer.b_ratio", optimizer.b_ratio, want
            )


def of_generation(config: TrainConfig, generation: Generation) -> TrainConfig:
    """The settings for a base, with its sampler of noise levels where none is named.

    Raises:
        ValueError: if they are for the other generation.
    """
    want = f"{generation}, which {config.base} is of"
    good = config.generation in (None, generation)
    require(good, "generation", config.generation, want)
    if config.strategy.sigma is not None:
        return config
    strategy = dataclasses.replace(config.strategy, sigma=generation)
    return dataclasses.replace(config, strategy=strategy)


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

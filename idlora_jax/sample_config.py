"""One sample, or many, as a value: every setting of `sample.py`, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from idlora_jax.savings import Saving, TextKV
from idlora_jax.settings import Guidance, Numerics, require

NEGATIVE_PROMPT = (
    "blurry or flickering picture, deformed face, stiff or mismatched lips, captions, "
    "watermark, cuts, noisy, muffled or echoing voice, music"
)
"""Ours and short; the published scripts use a long one (give it by its option)."""

REFINING = ("two_stage", "two_stage_hq")
"""Plans whose second stage works at twice the size."""


@dataclass(frozen=True)
class SampleConfig:
    """Everything that `sample.py` needs.

    Attributes:
        base: the base checkpoint (one .safetensors file, or a converted folder).
        text_encoder: folder of gemma-3-12b-it.
        prompt: "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..."; "@file" reads it from one.
        negative_prompt: what to stay away from; "@file" reads it from one.
        prompts_file: JSON or JSONL, one sample an entry; see `batches`.
        input_dir: folder with one sample a subfolder or stem; see `batches`.
        lora: adapter files.
        lora_strength: one factor per file; none: 1 each. A refining stage uses none of
            these files.
        masks: whether attention hides of the reference what it hid in training, for
            adapters that record it; off as published.
        position_rounding: whether positions have the bfloat16 steps of training, for
            adapters that record them.
        plan: which pipeline; see `plans`.
        upsampler: the latent upsampler, for plans that refine.
        distilled_lora: for plans that refine, and for "distilled" on a base that is not
            distilled.
        distilled_strength: one factor per stage; none: the plan's own.
        reference_audio: recordings of the voice to take, each in its own stretch of
            negative time, the first nearest to the clip; none: no reference.
        reference_crop: which part of each is used; "none": all of it.
        reference_seconds: how much a crop leaves.
        pre_roll: seconds of sound made before the clip begins, and cut off again.
        first_frame: picture (or video) to start from; None: free.
        fit: how it is brought to size, cropped or stretched.
        continue_from: a clip whose end this one begins with.
        overlap: how many of its frames, 8k+1.
        joined: write both clips as one instead of what is new.
        output_dir: for `<name>.mp4`, `<name>.wav`, `<name>.png` and `<name>.json`.
        name: of these files.
        frames: 8k+1.
        height: pixels, a multiple of 32; a plan that refines gives twice as many. None,
            with width None: as the first frame's aspect wants (512 at most), or 512.
        width: pixels, likewise.
        fps: frames per second.
        steps: of the first stage's solver; "distilled" has its own eight.
        seed: of the noise; that of sample n of several is seed + n.
        guidance: how far predictions are pushed.
        branches: how the passes of a step are laid out; results are equal.
        batch: how many samples pass the transformer at once; results are equal.
        numerics: how positions and noise levels are made.
        dtype: of the networks' weights and the transformer's computation.
        weights: what the transformer's kernels are: those that the base holds in fp8
            times their scales in `dtype` ("upcast"), or kept and widened a layer at a
            time ("keep": half the memory); or all of the blocks in int8, made while
            they are read ("int8": half the memory of any base).
        weights_in: where the kernels of the blocks are; "host": in host memory, from
            where layers come to the device while the one before computes.
        text_kv: keys and values of prompts: made once for all steps (2.0), or, in less
            memory, once a step for the branches that share a prompt.
        without: savings that are switched off, to find a fault; see `savings`.
        mesh: axes over devices, for instance "data=2,tensor=4"; empty: one device.
        memory: what happens if the memory plan exceeds the device: an error, a warning,
            or no plan at all.
        tile_size: pixels along a side of the tiles that a video is decoded in, a
            multiple of 32; 0: frames are not cut. None: the largest that fit.
        tile_frames: frames of a tile less one, a multiple of 8; 0: time is not cut.
            None: as `tile_size`.
        text_cache: folder of encoded prompts; None: in the user's cache folder.
        use_text_cache: whether encoded prompts are kept and used again.
        program_cache: folder of compiled programs; None: in the user's cache folder.
        use_program_cache: whether compiled programs are kept and used again.
        precompile: compile all that the samples need, say what of time and memory that
            takes, and read no weights.
        crf: quality of the mp4's pictures; 0 best, 51 worst.
        contact_sheet: whether `<name>.png` is written.
        provenance: whether the mp4 itself says what made it; the JSON always does.
        preview: every how many steps a small picture of the clip is written; 0: never.
        save_trajectory: whether every step's latents are written.
        overwrite: make samples again that are finished.
        progress: show a bar.
        verify: first read the whole base and the adapters, and compare them with their
            recorded hashes.
    """

    base: Path
    text_encoder: Path
    prompt: str = ""
    negative_prompt: str = NEGATIVE_PROMPT
    prompts_file: Path | None = None
    input_dir: Path | None = None
    lora: tuple[Path, ...] = ()
    lora_strength: tuple[float, ...] = ()
    masks: Literal["off", "as_trained"] = "off"
    position_rounding: Literal["off", "as_trained"] = "off"
    plan: Literal["one_stage", "two_stage", "two_stage_hq", "distilled"] = "one_stage"
    upsampler: Path | None = None
    distilled_lora: Path | None = None
    distilled_strength: tuple[float, ...] = ()
    reference_audio: tuple[Path, ...] = ()
    reference_crop: Literal["none", "start", "center", "loudest"] = "none"
    reference_seconds: float = 5.0
    pre_roll: float = 0.0
    first_frame: Path | None = None
    fit: Literal["crop", "stretch"] = "crop"
    continue_from: Path | None = None
    overlap: int = 17
    joined: bool = False
    output_dir: Path = Path("outputs/sample")
    name: str = "sample"
    frames: int = 121
    height: int | None = None
    width: int | None = None
    fps: float = 25.0
    steps: int = 30
    seed: int = 42
    guidance: Guidance = field(default_factory=Guidance)
    branches: Literal["sweep", "pair", "batch"] = "sweep"
    batch: int = 1
    numerics: Numerics = "exact"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    weights: Literal["upcast", "keep", "int8"] = "upcast"
    weights_in: Literal["device", "host"] = "device"
    text_kv: TextKV = "cached"
    without: tuple[Saving, ...] = ()
    mesh: str = ""
    memory: Literal["check", "warn", "off"] = "check"
    tile_size: int | None = None
    tile_frames: int | None = None
    text_cache: Path | None = None
    use_text_cache: bool = True
    program_cache: Path | None = None
    use_program_cache: bool = True
    precompile: bool = False
    crf: int = 17
    contact_sheet: bool = True
    provenance: bool = True
    preview: int = 0
    save_trajectory: bool = False
    overwrite: bool = False
    progress: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        files, factors = self.lora, self.lora_strength
        for name in ("steps", "batch"):
            count = getattr(self, name)
            require(count >= 1, name, count, "1 or more")
        for name in ("frames", "overlap"):
            count = getattr(self, name)
            near = max(0, round((count - 1) / 8)) * 8 + 1
            require(count == near, name, count, f"8k+1 (use {near})")
        if self.continue_from is not None:
            text = f"fewer than the clip's {self.frames} frames"
            require(self.overlap < self.frames, "overlap", self.overlap, text)
            free = self.first_frame is None
            require(free, "first_frame", self.first_frame, "none with continue_from")
            require(
                not self.pre_roll, "pre_roll", self.pre_roll, "0 with continue_from"
            )
        for name in ("height", "width"):
            side = getattr(self, name)
            both = (self.height is None) == (self.width is None)
            require(both, name, side, "height and width together, or neither")
            near = 512 if side is None else max(1, round(side / 32)) * 32
            require(side in (None, near), name, side, f"a multiple of 32 (use {near})")
        for name, unit in (("tile_size", 32), ("tile_frames", 8)):
            value = getattr(self, name)
            near = value and max(2, round(value / unit)) * unit
            require(value == near, name, value, f"a multiple of {unit} (use {near})")
        require(0 < self.fps < 1000, "fps", self.fps, "above 0 (use 25)")
        require(0 <= self.crf <= 51, "crf", self.crf, "0 to 51 (use 17)")
        require(self.preview >= 0, "preview", self.preview, "0 or more steps")
        seconds = self.reference_seconds
        require(seconds > 0, "reference_seconds", seconds, "above 0 (use 5)")
        text = "0 to 2 seconds"
        require(0 <= self.pre_roll <= 2, "pre_roll", self.pre_roll, text)
        good = len(factors) in (0, len(files))
        require(good, "lora_strength", factors, f"{len(files)} factors, one per file")
        self._check_plan()
        several = self.prompts_file is not None and self.input_dir is not None
        text = "one of prompts_file and input_dir"
        require(not several, "input_dir", self.input_dir, text)
        plain_name = Path(self.name).name == self.name not in ("", "..")
        require(plain_name, "name", self.name, "a file name without folder or ending")

    def _check_plan(self) -> None:
        stages = 2 if self.plan in REFINING else 1
        for name in ("upsampler", "distilled_lora") if stages == 2 else ():
            value = getattr(self, name)
            require(value is not None, name, value, f"a file, for plan {self.plan!r}")
        good = len(self.distilled_strength) in (0, stages)
        text = f"{stages} factors, one per stage"
        require(good, "distilled_strength", self.distilled_strength, text)

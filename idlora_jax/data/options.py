"""The settings of preprocessing; what they do is said in `data.preprocess`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from idlora_jax import geometry
from idlora_jax.data import buckets
from idlora_jax.data.buckets import Bucket

MOST_WORKERS = 64


@dataclass(frozen=True)
class Options:
    """Encode clips and captions into the folder that training reads.

    `--validate FOLDER` alone reads such a folder instead and says what is wrong.

    Attributes:
        manifest: a folder of clips (a subfolder for each speaker), or a .jsonl, .json,
            .csv or .tsv file with the columns video, caption, speaker, and if wanted
            start, end, reference.
        base: the LTX-2 checkpoint whose VAEs encode.
        text_encoder: the folder of gemma-3-12b-it.
        output: folder for the latents.
        frames: of each clip, 8k+1.
        height: pixels, a multiple of 32.
        width: pixels, a multiple of 32.
        buckets: several sizes instead of these three, HEIGHTxWIDTHxFRAMES, separated by
            commas; each clip gets the one of the nearest aspect that it can fill.
        segments: at most so many parts of a clip, one behind the other.
        fps: frames per second; clips at other rates are resampled.
        seed: of the choice of references; None: the speaker's next clip in the list.
        self_reference: a speaker's only clip refers to another part of itself.
        voice_hook: module:function of (wave [2 N], rate) that cleans references.
        workers: threads that decode; each holds one clip's frames in memory.
        dtype: of the text encoder; the VAEs compute in float32.
        skip_existing: leave clips alone that are there, made from the same things.
        strict: end with status 1 if any clip was left out.
    """

    manifest: Annotated[Path, tyro.conf.arg(aliases=("--input",))]
    base: Path
    text_encoder: Path
    output: Path
    frames: int = 121
    height: int = 512
    width: int = 512
    buckets: str | None = None
    segments: int = 1
    fps: float = 25.0
    seed: int | None = None
    self_reference: bool = False
    voice_hook: str | None = None
    workers: int = 2
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    skip_existing: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        """Check sizes and numbers."""
        for bucket in self.sizes:
            geometry.audio_grid(bucket.grid(self.fps).frames, self.fps)
        if self.segments < 1 or not 1 <= self.workers <= MOST_WORKERS:
            raise ValueError(
                f"got segments {self.segments} and workers {self.workers}, expected "
                f"segments of 1 or more and 1 to {MOST_WORKERS} workers"
            )

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """The sizes of clips."""
        if self.buckets is None:
            return (Bucket(self.height, self.width, self.frames),)
        return buckets.parse(self.buckets, self.fps)

    def folder(self, bucket: Bucket) -> Path:
        """Where the samples of a size lie."""
        return self.output / str(bucket) if len(self.sizes) > 1 else self.output

"""The files of one sample: written together, and recognised when they are there.

Every file says in its metadata what it was made from: `made`, a digest of the source,
the cut, the networks and the settings (`Marks`), and `voice`, that of the reference.
Files are written into a working folder first and then moved to their places, `latents/`
last, so that a sample is there whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idlora_jax.data import encode, identity, layout, published, stored
from idlora_jax.data.buckets import Bucket
from idlora_jax.data.cuts import Cut
from idlora_jax.data.hook import Hook
from idlora_jax.data.stored import AUDIO, REFERENCE, TEXT, VIDEO
from idlora_jax.types import VideoGrid
from idlora_jax.weights import tensorfile

FORMAT = 1
"""Raised when this library makes other numbers of the same things."""


@dataclass(frozen=True)
class Marks:
    """What all samples of a run are made with; gives what a file must say of itself.

    Attributes:
        base: hash of the checkpoint.
        text: digest of the text encoder's folder, and the dtype it computes in.
        hook: the name of the voice hook, or "".
        pairing: the settings that choose references.
    """

    base: str
    text: str
    hook: str
    pairing: tuple[object, ...]

    def caption(self, text: str) -> str:
        """Of the features of a caption."""
        return identity.of(FORMAT, "caption", self.base, self.text, text)

    def voice(self, content: str, start_s: float, grid: VideoGrid) -> str:
        """Of a reference: a stretch of a file, as long as a video."""
        parts = (content, start_s, grid.frames, grid.fps)
        return identity.of(FORMAT, "voice", self.base, self.hook, *parts)

    def sample(self, cut: Cut) -> str:
        """Of a sample, but for its caption and its reference."""
        parts = (str(cut.bucket), cut.fps, cut.start_s, cut.content, *self.pairing)
        return identity.of(FORMAT, "sample", self.base, *parts)


@dataclass(frozen=True)
class Place:
    """Where samples go, what is there, and how references are chosen.

    Attributes:
        marks: what samples are made with.
        folder: of a bucket's samples.
        captions: that keeps features of captions.
        work: for files that are being written.
        clean: the voice hook, if there is one.
        seed: of the choice of references.
        self_reference: whether another part of the same clip will do.
        skip_existing: whether samples that are there stay.
        workers: threads.
    """

    marks: Marks
    folder: Callable[[Bucket], Path]
    captions: Path
    work: Path
    clean: Hook | None = None
    seed: int | None = None
    self_reference: bool = False
    skip_existing: bool = False
    workers: int = 1


class Reference(NamedTuple):
    """Where a reference comes from, in words; its digest; its latents [T M C]."""

    source: str
    mark: str
    latents: np.ndarray


def _said(path: Path) -> dict[str, str]:
    """What a file says of itself; nothing if it is not there or not whole."""
    try:
        return dict(tensorfile.header(path).metadata)
    except (ValueError, OSError):
        return {}


def is_complete(place: Place, cut: Cut, voices: Collection[str]) -> bool:
    """Whether all files of a sample are there, made from the same things.

    Args:
        place: where they go.
        cut: the sample.
        voices: digests of the references that it may have.
    """
    folder, marks = place.folder(cut.bucket), place.marks
    said = {
        kind: _said(layout.file_of(folder, kind, cut.name)) for kind in layout.FOLDERS
    }
    made, text = marks.sample(cut), marks.caption(cut.clip.caption)
    own = all(said[kind].get("made") == made for kind in (VIDEO, AUDIO, REFERENCE))
    same = said[TEXT].get("caption") == text
    return own and same and said[REFERENCE].get("voice") in voices


def source_of(place: Place, cut: Cut) -> str:
    """The reference of a sample that is complete, in words."""
    file = layout.file_of(place.folder(cut.bucket), REFERENCE, cut.name)
    return _said(file).get("source", "")


def sound_of(place: Place, cut: Cut) -> np.ndarray:
    """Audio latents [T M C] of a sample that is complete.

    Raises:
        ValueError: if the file is damaged.
    """
    file = layout.file_of(place.folder(cut.bucket), AUDIO, cut.name)
    return stored.sound(published.read(file))


class Made(NamedTuple):
    """Latents of a sample: [f h w C], [T M C], and its reference."""

    video: np.ndarray
    sound: np.ndarray
    reference: Reference


def write(place: Place, cut: Cut, made: Made) -> None:
    """Write the four files of a sample.

    Raises:
        OSError: if a file cannot be written; then none is there.
    """
    own = {"source": cut.name, "made": place.marks.sample(cut)}
    reference = made.reference
    theirs = {**own, "source": reference.source, "voice": reference.mark}
    files = {
        REFERENCE: (layout.sound_file(reference.latents), theirs),
        AUDIO: (layout.sound_file(made.sound), own),
        VIDEO: (layout.video_file(made.video, cut.fps), own),
    }
    parts = {kind: place.work / f"{kind}.safetensors" for kind in layout.FOLDERS}
    for kind, (arrays, about) in files.items():
        encode.write(parts[kind], arrays, about)
    kept = encode.caption_file(place.captions, place.marks.caption(cut.clip.caption))
    encode.linked(kept, parts[TEXT])
    for kind, part in parts.items():
        target = layout.file_of(place.folder(cut.bucket), kind, cut.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)

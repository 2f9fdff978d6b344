"""Reading preprocessed clips for training, from whatever holds them.

    a folder of the published layout   safetensors or .pt files; `data.published`
    a TFDS data set                    ArrayRecord files; `data.tfds_latents`

`listed` finds clips and sizes without reading latents, an `Index` holds those that may
stand in one batch. Text features are stored before the connectors, which run when a
clip is read. Everything here stays on the host: batches are NumPy arrays.

Source: ltx_trainer/datasets.py: PrecomputedDataset.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from idlora_jax import references
from idlora_jax.data import published, stored
from idlora_jax.data.stored import (
    AUDIO,
    FOLDERS,
    REFERENCE,
    TEXT,
    VIDEO,
    VIDEO_REFERENCE,
    Clip,
    Stored,
)
from idlora_jax.strategies import Batch
from idlora_jax.types import AV, Prompt, Rate

__all__ = [
    "AUDIO",
    "FOLDERS",
    "REFERENCE",
    "TEXT",
    "VIDEO",
    "VIDEO_REFERENCE",
    "Clip",
    "Connect",
    "Index",
    "Listing",
    "Sample",
    "bucket",
    "collate",
    "grouped",
    "index",
    "listed",
    "read",
    "said",
    "whole",
]

Connect = Callable[[AV, Any], Prompt]
"""(features AV of [1 S D], mask [1 S]) -> Prompt; see `prompts.prompts`."""


Load = Callable[[Clip], Stored]


class Listing(NamedTuple):
    """A folder's clips, sorted by name, and what reads one of them."""

    root: Path
    clips: tuple[Clip, ...]
    load: Load


@dataclass(frozen=True)
class Index:
    """Clips that are all of one video size, frame rate and size of video references.

    Attributes:
        root: where they lie.
        clips: sorted by name.
        audio: the longest sound in latent frames, to which others are padded.
        reference: the longest reference, likewise.
        ragged: whether (sounds, references) differ in length.
        load: reads one of them.
        video_reference: latent (F, H, W) of every video reference; (): none.
    """

    root: Path
    clips: tuple[Clip, ...]
    audio: int
    reference: int
    ragged: tuple[bool, bool]
    load: Load = field(repr=False)
    video_reference: tuple[int, ...] = ()

    @property
    def fps(self) -> float:
        """Frames per second of every clip."""
        return self.clips[0].fps


class Sample(NamedTuple):
    """One clip, channel-last: [F H W C], [T M C], [Tr M C], [S D] each."""

    video: np.ndarray
    audio: np.ndarray | None
    reference: np.ndarray | None
    prompt: Prompt
    video_reference: np.ndarray | None = None


def lines(found: Sequence[str], limit: int = 12) -> str:
    """Lines under a message, the first of them."""
    more = [f"... and {len(found) - limit} more"] if len(found) > limit else []
    return "".join(f"\n  {line}" for line in [*found[:limit], *more])


def _matched(root: Path, names: Mapping[str, Collection[str]]) -> list[str]:
    """Names that stand in every folder; others are refused."""
    every = set().union(*names.values())
    everywhere = every.intersection(*names.values())
    if not names[VIDEO]:
        suffixes = " or ".join(published.SUFFIXES)
        raise ValueError(
            f"data: no {suffixes} files in {root}/{VIDEO}; archives of them are "
            "converted first: convert/dataset.py"
        )
    bad = [
        f"{name}: missing in {', '.join(f for f in names if name not in names[f])}"
        for name in sorted(every - everywhere)
    ]
    if bad:
        raise ValueError(
            f"data: {len(bad)} of {len(every)} clips in {root} are not in all of "
            f"{', '.join(names)}:{lines(bad)}\npreprocess them again, or delete "
            "them from the other folders"
        )
    return sorted(everywhere)


def _told(where: Any, convert: Callable[[Any], Any], found: Any) -> Any:
    try:
        return convert(found)
    except ValueError as error:
        raise ValueError(
            f"data: {where}: {error}; preprocess this clip again"
        ) from None


def _loaded(paths: Mapping[str, Path]) -> Stored:
    files = {folder: published.read(path) for folder, path in paths.items()}
    for folder, file in files.items():
        if not stored.finite(file):
            raise ValueError(
                f"data: {paths[folder]} holds values that are not finite; preprocess "
                "this clip again"
            )
    return _told(paths[VIDEO], stored.stored, files)


def _folder(root: Path, folders: Sequence[str]) -> tuple[list[Clip], Any]:
    """The clips of a folder of the published layout, and what reads one."""
    found = published.listed(root)
    names = published.pair({folder: found.get(folder, {}) for folder in folders})

    def paths(name: str) -> dict[str, Path]:
        return {folder: found[folder][names[folder][name]] for folder in folders}

    def clip(name: str) -> Clip:
        path = paths(name)
        specs = {folder: published.specs(path[folder]) for folder in folders}
        size, fps = _told(path[VIDEO], stored.video_size, specs[VIDEO])
        audio, reference = (
            _told(path[f], stored.sound_length, specs[f]) if f in folders else 0
            for f in (AUDIO, REFERENCE)
        )
        seen = ()
        if VIDEO_REFERENCE in folders:
            where = path[VIDEO_REFERENCE]
            seen, rate = _told(where, stored.video_size, specs[VIDEO_REFERENCE])
            _check_reference(where, (size, fps), (seen, rate))
        return Clip(name, size, fps, audio, reference, seen)

    clips = [clip(name) for name in _matched(root, names)]
    return clips, lambda clip: _loaded(paths(clip.name))


def _check_reference(path: Path, clip: Any, reference: Any) -> None:
    """Refuse a video reference that cannot stand beside its clip."""
    (size, fps), (seen, rate) = clip, reference
    if rate != fps:
        raise ValueError(
            f"data: {path} has {rate:g} frames per second, its clip {fps:g}; "
            "preprocess both at one rate"
        )
    try:
        references.downscale(size[1:], seen[1:])
    except ValueError as error:
        raise ValueError(f"data: {path}: {error}; preprocess it again") from None


def said(clip: Clip) -> str:
    """The sizes and the rate of a clip, in words."""
    beside = f", references {clip.video_reference}" if clip.video_reference else ""
    return f"{clip.video} at {clip.fps:g} fps{beside}"


def grouped(clips: Sequence[Clip]) -> list[tuple[Clip, ...]]:
    """Clips that may stand in one batch, by their sizes, in the order of these."""
    key = lambda clip: (clip.video, clip.fps, clip.video_reference)
    keys = sorted(set(map(key, clips)))
    return [tuple(c for c in clips if key(c) == own) for own in keys]


def _dataset(root: Path, folders: Sequence[str]) -> tuple[list[Clip], Any]:
    """The clips of a TFDS data set, and what reads one."""
    from idlora_jax.data import tfds_latents

    if VIDEO_REFERENCE in folders:
        raise ValueError(
            f"data: {root} is a TFDS data set, which holds no video references; give "
            "the folder it was converted from"
        )
    opened = tfds_latents.open_dataset(root)
    rows = {clip.name: row for row, clip in enumerate(opened.clips)}
    audio, reference = AUDIO in folders, REFERENCE in folders

    def clip(found: Clip) -> Clip:
        if (audio and not found.audio) or (reference and not found.reference):
            raise ValueError(
                f"data: {root} lacks sound or references, expected {', '.join(folders)}"
            )
        heard = audio * found.audio
        return replace(found, audio=heard, reference=reference * found.reference)

    def load(clip: Clip) -> Stored:
        found = opened[rows[clip.name]]
        leaves = jax.tree.leaves(found)
        if not stored.finite({str(n): leaf for n, leaf in enumerate(leaves)}):
            raise ValueError(
                f"data: the record of {clip.name} in {root} holds values that are not "
                "finite; preprocess this clip again and convert the data set"
            )
        return found._replace(
            audio=found.audio if audio else None,
            reference=found.reference if reference else None,
        )

    return [clip(opened.clips[rows[name]]) for name in sorted(rows)], load


def listed(folder: str | Path, folders: Sequence[str] = FOLDERS) -> Listing:
    """List the clips of a data folder.

    Args:
        folder: holds the folders of the layout (or `.precomputed/`, which does), or is
            a TFDS data set made by convert/dataset.py.
        folders: which of them are read: `VIDEO`, `TEXT` and any of `AUDIO`,
            `REFERENCE` and `VIDEO_REFERENCE`.

    Raises:
        ValueError: for a missing or empty folder, clips that are not in all folders,
            or damaged files.
    """
    dataset = published.dataset_root(Path(folder))
    root = dataset or published.root_of(Path(folder))
    clips, load = (_dataset if dataset else _folder)(root, folders)
    return Listing(root, tuple(clips), load)


def bucket(root: Path, clips: Sequence[Clip], load: Load) -> Index:
    """An index of clips of one size (`grouped`)."""
    lengths = [{c.audio for c in clips}, {c.reference for c in clips}]
    ragged = tuple(len(found) > 1 for found in lengths)
    longest = (max(found) for found in lengths)
    seen = clips[0].video_reference
    return Index(root, tuple(clips), *longest, ragged, load, seen)  # pyright: ignore


def index(folder: str | Path, folders: Sequence[str] = FOLDERS) -> Index:
    """List the clips of a data folder, which are all of one size; see `listed`.

    Raises:
        ValueError: as `listed`, and for clips of different sizes or frame rates.
    """
    root, clips, load = listed(folder, folders)
    usual, *others = sorted(grouped(clips), key=len, reverse=True)
    if others:
        bad = [f"{c.name}: latents {said(c)}" for group in others for c in group]
        raise ValueError(
            f"data: all clips must have one size and frame rate. {len(usual)} of "
            f"{len(clips)} have latents (frames, height, width) {said(usual[0])}, "
            f"{len(bad)} others:{lines(bad)}\npreprocess all to one size"
        )
    return bucket(root, clips, load)


def read(index: Index, clip: Clip, connect: Connect) -> Sample:
    """Read one clip and run the connectors on its text features.

    Raises:
        ValueError: if a file is damaged, incomplete or holds values not finite.
    """
    found = index.load(clip)
    features = AV(*(x[None] for x in found.features))
    prompt = connect(features, found.mask[None])
    prompt = jax.tree.map(lambda a: np.asarray(a)[0], prompt)
    sounds = found.audio, found.reference
    return Sample(found.video, *sounds, prompt, found.video_reference)


def _padded(sounds: Sequence[np.ndarray], frames: int) -> Float[np.ndarray, "B T M C"]:
    return np.stack([np.pad(s, ((0, frames - len(s)), (0, 0), (0, 0))) for s in sounds])


def _check_together(samples: Sequence[Sample]) -> None:
    sizes = {
        "videos of one size, got latents": {s.video.shape for s in samples},
        "texts of one length, got features": {s.prompt.video.shape for s in samples},
    }
    for name, found in sizes.items():
        if len(found) > 1:
            raise ValueError(
                f"data: a batch needs {name} {sorted(found)}; preprocess all of these "
                "clips alike"
            )


def collate(samples: Sequence[Sample], index: Index) -> Batch:
    """Clips -> one batch; sounds are padded on the right to the longest of the index.

    Lengths are given where the sounds of the index differ in length, so that every
    batch of it has the same shapes and the step is compiled once.

    Raises:
        ValueError: if videos or texts differ in size.
    """
    _check_together(samples)

    def sounds(name: str) -> tuple[Any, Any]:
        which = ("audio", "reference").index(name)
        every = [getattr(s, name) for s in samples]
        if every[0] is None:
            return None, None
        lengths = np.array([len(s) for s in every], np.int32)
        padded = _padded(every, getattr(index, name))
        return padded, lengths if index.ragged[which] else None

    audio, audio_length = sounds("audio")
    reference, reference_length = sounds("reference")
    prompts = [s.prompt for s in samples]
    seen = [s.video_reference for s in samples if s.video_reference is not None]
    return Batch(
        video=np.stack([s.video for s in samples]),
        audio=audio,
        reference=reference,
        prompt=jax.tree.map(lambda *p: np.stack(p), *prompts),
        audio_length=audio_length,
        reference_length=reference_length,
        video_reference=np.stack(seen) if seen else None,
        rate=Rate(index.fps),
    )


def whole(index: Index, connect: Connect) -> Batch:
    """All clips of an index as one batch."""
    return collate([read(index, clip, connect) for clip in index.clips], index)

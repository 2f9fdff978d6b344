"""Reading a folder of preprocessed clips, in the layout of the published data sets.

    latents/<name>.safetensors                  latents [C F H W], fps
    audio_latents/<name>.safetensors            latents [C T M]
    reference_audio_latents/<name>.safetensors  latents [C T M]
    conditions/<name>.safetensors               prompt_embeds [S D], or one for
                                                each modality, and
                                                prompt_attention_mask [S]

One clip has the same relative name in every folder. `index` reads headers only and
refuses what does not fit together; which clips a step reads is a pure function of
(seed, step), so that resuming needs no reader state. Text features are stored before
the connectors, which run once per clip when it is first read.

Source: ltx_trainer/datasets.py: PrecomputedDataset.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open

from idlora_jax.strategies import Batch
from idlora_jax.types import AV, Prompt

VIDEO, AUDIO, TEXT = "latents", "audio_latents", "conditions"
REFERENCE = "reference_audio_latents"
FOLDERS = (VIDEO, TEXT, AUDIO, REFERENCE)
_SUFFIX = ".safetensors"
_ENTERED = ".precomputed"

Connect = Callable[[AV, Any], Prompt]
"""(features AV of [1 S D], mask [1 S]) -> Prompt; see `prompts.prompts`."""


@dataclass(frozen=True)
class Clip:
    """One clip's name and sizes.

    Attributes:
        name: relative path without suffix, the same in every folder.
        video: latent (F, H, W).
        fps: frames per second.
        audio: latent frames of its own sound; 0: not read.
        reference: latent frames of the reference; 0: not read.
    """

    name: str
    video: tuple[int, ...]
    fps: float
    audio: int = 0
    reference: int = 0


@dataclass(frozen=True)
class Index:
    """The clips of a folder, all of one video size and frame rate.

    Attributes:
        root: the folder.
        clips: sorted by name.
        audio: the longest sound in latent frames, to which others are padded.
        reference: the longest reference, likewise.
        ragged: whether (sounds, references) differ in length.
    """

    root: Path
    clips: tuple[Clip, ...]
    audio: int
    reference: int
    ragged: tuple[bool, bool]

    @property
    def fps(self) -> float:
        """Frames per second of every clip."""
        return self.clips[0].fps


class Sample(NamedTuple):
    """One clip, channel-last, on the host: [F H W C], [T M C], [Tr M C], [S D] each."""

    video: np.ndarray
    audio: np.ndarray | None
    reference: np.ndarray | None
    prompt: Prompt


def _root(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(
            f"data: no such folder {folder}; expected one with {', '.join(FOLDERS)} "
            "(python -m idlora_jax.data.preprocess makes it)"
        )
    inner = folder / _ENTERED
    return inner if inner.is_dir() else folder


def _names(root: Path, folder: str) -> set[str]:
    paths = (root / folder).rglob("*" + _SUFFIX)
    found = (p.relative_to(root / folder) for p in paths)
    return {p.as_posix().removesuffix(_SUFFIX) for p in found if p.name[0] != "."}


def _listed(lines: Sequence[str], limit: int = 12) -> str:
    more = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "".join(f"\n  {line}" for line in [*lines[:limit], *more])


def _matched(root: Path, folders: Sequence[str]) -> list[str]:
    """Names that stand in every folder; others are refused."""
    names = {folder: _names(root, folder) for folder in folders}
    everywhere = set.intersection(*names.values())
    every = set.union(*names.values())
    if not every:
        raise ValueError(f"data: no {_SUFFIX} files in {root}/{VIDEO}")
    bad = [
        f"{name}: missing in {', '.join(f for f in folders if name not in names[f])}"
        for name in sorted(every - everywhere)
    ]
    if bad:
        raise ValueError(
            f"data: {len(bad)} of {len(every)} clips in {root} are not in all of "
            f"{', '.join(folders)}:{_listed(bad)}\npreprocess them again, or delete "
            "them from the other folders"
        )
    return sorted(everywhere)


def _path(root: Path, folder: str, name: str) -> Path:
    return root / folder / (name + _SUFFIX)


def _opened(path: Path, read: Callable[[Any], Any]) -> Any:
    try:
        with safe_open(path, framework="numpy") as file:
            return read(file)
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"data: {path} is damaged or lacks a tensor ({error}); preprocess this "
            "clip again"
        ) from None


def _scalar(file: Any, key: str) -> float:
    return float(file.get_tensor(key).reshape(-1)[0])


def _video_size(file: Any) -> tuple[tuple[int, ...], float]:
    shape = file.get_slice("latents").get_shape()
    if len(shape) == 2:  # an older form, [F*H*W C]
        shape = [0, *(_scalar(file, k) for k in ("num_frames", "height", "width"))]
    return tuple(map(int, shape[1:])), _scalar(file, "fps")


def _length(file: Any) -> int:
    return int(file.get_slice("latents").get_shape()[1])


def _one_bucket(clips: Sequence[Clip]) -> None:
    counts = Counter((c.video, c.fps) for c in clips)
    ((size, fps), most), *others = counts.most_common()
    if not others:
        return
    bad = [
        f"{c.name}: latents {c.video} at {c.fps:g} fps"
        for c in clips
        if (c.video, c.fps) != (size, fps)
    ]
    raise ValueError(
        f"data: all clips must have one size and frame rate. {most} of {len(clips)} "
        f"have latents (frames, height, width) {size} at {fps:g} fps, "
        f"{len(bad)} others:{_listed(bad)}\npreprocess all to one size, or train on "
        "one size at a time"
    )


def index(folder: str | Path, folders: Sequence[str] = FOLDERS) -> Index:
    """List the clips of a data folder.

    Args:
        folder: holds the folders of the layout (or `.precomputed/`, which does).
        folders: which of them are read; `AUDIO` and `REFERENCE` may be left out.

    Raises:
        ValueError: for a missing folder, clips that are not in all folders, damaged
            files, or clips of different sizes or frame rates.
    """
    root = _root(Path(folder))

    def clip(name: str) -> Clip:
        video, fps = _opened(_path(root, VIDEO, name), _video_size)
        audio, reference = (
            _opened(_path(root, f, name), _length) if f in folders else 0
            for f in (AUDIO, REFERENCE)
        )
        return Clip(name, video, fps, audio, reference)

    clips = tuple(clip(name) for name in _matched(root, folders))
    _one_bucket(clips)
    lengths = [{c.audio for c in clips}, {c.reference for c in clips}]
    ragged = tuple(len(found) > 1 for found in lengths)
    return Index(root, clips, max(lengths[0]), max(lengths[1]), ragged)  # pyright: ignore


def split(index: Index, held_out: int) -> tuple[Index, Index]:
    """Keep `held_out` clips, evenly spread over the names, out of the rest.

    Raises:
        ValueError: if nothing is left to train on.
    """
    count = len(index.clips)
    if held_out >= count:
        raise ValueError(
            f"data: {count} clips, of which heldout.clips keeps out {held_out}; "
            "expected at least one to train on"
        )
    chosen = {(2 * k + 1) * count // (2 * held_out) for k in range(held_out)}
    parts = [
        tuple(c for n, c in enumerate(index.clips) if (n in chosen) == out)
        for out in (False, True)
    ]
    return replace(index, clips=parts[0]), replace(index, clips=parts[1])


def chosen(count: int, batch: int, step: int, seed: int) -> Int[np.ndarray, " B"]:
    """Which of `count` clips the batch of `step` holds.

    Every epoch is a new permutation of all clips, made from (seed, epoch) alone, and
    epochs follow each other without a gap.
    """
    rows = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, at = divmod(place, count)
        rows.append(np.random.default_rng([seed, epoch]).permutation(count)[at])
    return np.array(rows)


def _finite(path: Path, tensor: np.ndarray) -> np.ndarray:
    if not np.isfinite(tensor).all():
        raise ValueError(
            f"data: {path} holds values that are not finite; preprocess this clip again"
        )
    return tensor


def _tensors(root: Path, folder: str, name: str) -> Mapping[str, np.ndarray]:
    path = _path(root, folder, name)
    found = _opened(path, lambda f: {k: f.get_tensor(k) for k in f.keys()})
    return {key: _finite(path, tensor) for key, tensor in found.items()}


def _features(path: Path, tensors: Mapping[str, np.ndarray]) -> tuple[AV, np.ndarray]:
    both = tensors.get("prompt_embeds")
    video = tensors.get("video_prompt_embeds", both)
    audio = tensors.get("audio_prompt_embeds", both)
    mask = tensors.get("prompt_attention_mask")
    if video is None or audio is None or mask is None:
        raise ValueError(
            f"data: {path} holds {sorted(tensors)}, expected prompt_embeds (or "
            "video_prompt_embeds and audio_prompt_embeds) and prompt_attention_mask"
        )
    return AV(video[None], audio[None]), mask[None] > 0


def read(index: Index, clip: Clip, connect: Connect) -> Sample:
    """Read one clip and run the connectors on its text features.

    Raises:
        ValueError: if a file is damaged, incomplete or holds values not finite.
    """
    tensors = functools.partial(_tensors, index.root, name=clip.name)
    latents = tensors(VIDEO)["latents"]
    if latents.ndim == 2:
        latents = latents.reshape(*clip.video, -1)
    else:
        latents = np.moveaxis(latents, 0, -1)
    audio, reference = (
        np.moveaxis(tensors(folder)["latents"], 0, -1) if length else None
        for folder, length in ((AUDIO, clip.audio), (REFERENCE, clip.reference))
    )
    path = _path(index.root, TEXT, clip.name)
    prompt = connect(*_features(path, tensors(TEXT)))
    prompt = jax.tree.map(lambda a: np.asarray(a)[0], prompt)
    return Sample(latents, audio, reference, prompt)


def _padded(sounds: Sequence[np.ndarray], frames: int) -> Float[np.ndarray, "B T M C"]:
    return np.stack([np.pad(s, ((0, frames - len(s)), (0, 0), (0, 0))) for s in sounds])


def collate(samples: Sequence[Sample], index: Index) -> Batch:
    """Clips -> one batch; sounds are padded on the right to the longest of all.

    Lengths are given where the folder's sounds differ in length, so that every batch
    of a folder has the same shapes and the step is compiled once.

    Raises:
        ValueError: if the videos differ in size.
    """
    shapes = {s.video.shape for s in samples}
    if len(shapes) > 1:
        raise ValueError(
            f"data: a batch needs videos of one size, got latents {sorted(shapes)}; "
            "preprocess all clips to one size"
        )

    def sounds(name: str) -> tuple[Any, Any]:
        which = ("audio", "reference").index(name)
        every = [getattr(s, name) for s in samples]
        if every[0] is None:
            return None, None
        lengths = jnp.asarray([len(s) for s in every], jnp.int32)
        padded = jnp.asarray(_padded(every, getattr(index, name)))
        return padded, lengths if index.ragged[which] else None

    audio, audio_length = sounds("audio")
    reference, reference_length = sounds("reference")
    prompts = [s.prompt for s in samples]
    return Batch(
        video=jnp.asarray(np.stack([s.video for s in samples])),
        audio=audio,
        reference=reference,
        prompt=jax.tree.map(lambda *p: jnp.asarray(np.stack(p)), *prompts),
        audio_length=audio_length,
        reference_length=reference_length,
    )


def whole(index: Index, connect: Connect) -> Batch:
    """All clips of an index as one batch (the held-out ones)."""
    return collate([read(index, clip, connect) for clip in index.clips], index)


def batches(
    index: Index, connect: Connect, batch: int, *, seed: int = 0, cached: int = 256
) -> Callable[[int], Batch]:
    """A function from the step to its batch.

    Args:
        index: the clips to train on.
        connect: the connectors; they run when a clip is read.
        batch: B.
        seed: of the shuffling.
        cached: how many read clips stay in memory.
    """

    @functools.lru_cache(maxsize=cached)
    def sample(at: int) -> Sample:
        return read(index, index.clips[at], connect)

    def of(step: int) -> Batch:
        rows = chosen(len(index.clips), batch, step, seed)
        return collate([sample(int(row)) for row in rows], index)

    return of

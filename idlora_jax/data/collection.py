"""Clips of several sizes: one bucket for each, since a batch holds clips of one.

    folder/512x512x121/latents/...      what preprocessing with --buckets writes
    folder/latents/...                  clips of any sizes in one folder
    folder/                             a TFDS data set, or a folder of sizes of these

A bucket is what may stand in one batch: one size of video latents, one frame rate, one
size of video references. Sounds of any length go together: they are padded to the
longest of their bucket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from idlora_jax.data import latents, published
from idlora_jax.data.latents import Index, Listing, lines, said
from idlora_jax.data.stored import FOLDERS, VIDEO, Clip, Stored


@dataclass(frozen=True)
class Collection:
    """Clips in buckets.

    Attributes:
        root: where they lie.
        buckets: each with at least one clip, in the order of their sizes.
    """

    root: Path
    buckets: tuple[Index, ...]

    @property
    def clips(self) -> tuple[Clip, ...]:
        """All clips, one bucket after the other."""
        return tuple(clip for bucket in self.buckets for clip in bucket.clips)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many clips each bucket has."""
        return tuple(len(bucket.clips) for bucket in self.buckets)

    @property
    def fps(self) -> float:
        """The frame rate of most clips."""
        return Counter(clip.fps for clip in self.clips).most_common(1)[0][0]

    @property
    def reference(self) -> int:
        """Latent frames of the longest reference."""
        return max((bucket.reference for bucket in self.buckets), default=0)


def _joined(root: Path, parts: Sequence[tuple[str, Listing]]) -> Listing:
    """Several folders as one; clips are named after their folder, too."""
    found = {
        prefix + clip.name: (clip, part.load)
        for prefix, part in parts
        for clip in part.clips
    }

    def load(clip: Clip) -> Stored:
        inner, of = found[clip.name]
        return of(inner)

    clips = (replace(clip, name=name) for name, (clip, _) in found.items())
    return Listing(root, tuple(clips), load)


def _listed(root: Path, folders: Sequence[str]) -> Listing:
    inner = published.sized(root)
    if not inner:
        return latents.listed(root, folders)
    if (published.root_of(root) / VIDEO).is_dir():
        raise ValueError(
            f"data: {root} holds {VIDEO}/ and folders of sizes ({inner[0].name}, ...); "
            "move one of them elsewhere"
        )
    parts = [(f"{path.name}/", latents.listed(path, folders)) for path in inner]
    return _joined(root, parts)


def index(folder: str | Path, folders: Sequence[str] = FOLDERS) -> Collection:
    """List the clips of a data folder, of whatever sizes.

    Args:
        folder: see the module.
        folders: see `latents.listed`.

    Raises:
        ValueError: for a missing or empty folder, clips that are not in all folders,
            or damaged files.
    """
    root, clips, load = _listed(Path(folder), folders)
    groups = latents.grouped(clips)
    return Collection(root, tuple(latents.bucket(root, g, load) for g in groups))


def split(collection: Collection, held_out: int) -> tuple[Collection, Collection]:
    """Keep `held_out` clips out of the rest, evenly spread over sizes and names.

    Returns:
        The rest, and the clips kept out: these only in the buckets that have some.

    Raises:
        ValueError: if nothing is left of a bucket to train on.
    """
    count = len(collection.clips)
    if held_out >= count:
        raise ValueError(
            f"data: {count} clips, of which heldout.clips keeps out {held_out}; "
            "expected at least one to train on"
        )
    chosen = {(2 * k + 1) * count // (2 * held_out) for k in range(held_out)}
    rest, out, first = [], [], 0
    for bucket in collection.buckets:
        numbered = [*enumerate(bucket.clips, first)]
        first += len(numbered)
        kept = tuple(clip for n, clip in numbered if n not in chosen)
        held = tuple(clip for n, clip in numbered if n in chosen)
        if not kept:
            raise ValueError(
                f"data: heldout.clips {held_out} keeps out all {len(held)} clips of "
                f"latents {said(held[0])}; expected fewer, or more clips of that size"
            )
        rest.append(replace(bucket, clips=kept))
        out += [replace(bucket, clips=held)] if held else []
    made = replace(collection, buckets=tuple(rest))
    return made, replace(collection, buckets=tuple(out))


def require_batches(collection: Collection, batch: int) -> None:
    """Refuse buckets that cannot fill one batch.

    Raises:
        ValueError: naming them.
    """
    small = [
        f"latents {said(bucket.clips[0])}: {len(bucket.clips)}"
        for bucket in collection.buckets
        if len(bucket.clips) < batch
    ]
    if small:
        raise ValueError(
            f"data: {len(small)} of {len(collection.buckets)} sizes have fewer clips "
            f"to train on than batch_size {batch}:{lines(small)}\nexpected at least "
            f"{batch} of each; lower batch_size or heldout.clips, add clips, or leave "
            "these out"
        )

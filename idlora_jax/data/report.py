"""What a data set holds, and what is wrong with it.

    facts(item)     one file, read and looked at: sizes, rate, tokens, what is broken
    report(facts)   all of them: pairs, partners that are missing, distributions
    str(report)     the same in words

A report is *broken* if a file cannot be read or holds values that are not finite, if a
clip lacks a partner, or a name stands for two files. Clips of several sizes, or one
video in several pairs, are told but are no fault.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from idlora_jax import geometry
from idlora_jax.data import published, stored
from idlora_jax.data.published import Names
from idlora_jax.data.sources import Item
from idlora_jax.data.stored import AUDIO, FOLDERS, REFERENCE, TEXT, VIDEO, File
from idlora_jax.types import AudioGrid

_LISTED = 20


@dataclass(frozen=True)
class Fact:
    """What there is to know of one file.

    Attributes:
        folder: of the layout.
        name: relative path without suffix.
        nbytes: of the file.
        archive: that holds it.
        shape: channel-last; of text (S, D, Da).
        dtypes: of the tensors that training reads.
        fps: of a video.
        tokens: of a text that are not padding.
        shared: whether both modalities have the same text features.
        digest: of a video's latents.
        problem: what is broken; empty: nothing.
    """

    folder: str
    name: str
    nbytes: int
    archive: str = ""
    shape: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    fps: float = 0.0
    tokens: int = 0
    shared: bool = False
    digest: str = ""
    problem: str = ""


def _video_facts(file: File) -> dict[str, Any]:
    latents = stored.video(file)
    digest = hashlib.blake2b(latents.tobytes(), digest_size=8)
    return {
        "shape": latents.shape,
        "dtypes": (latents.dtype.name,),
        "fps": stored.number(file, "fps"),
        "digest": digest.hexdigest(),
    }


def _sound_facts(file: File) -> dict[str, Any]:
    latents = stored.sound(file)
    return {"shape": latents.shape, "dtypes": (latents.dtype.name,)}


def _text_facts(file: File) -> dict[str, Any]:
    features, mask = stored.text(file)
    tokens = int(mask.sum())
    if tokens == 0:
        raise ValueError("got a text without tokens, expected at least one")
    if mask[: len(mask) - tokens].any():
        raise ValueError("got padding on the right, expected it on the left")
    return {
        "shape": (*features.video.shape, features.audio.shape[1]),
        "dtypes": tuple(x.dtype.name for x in features),
        "tokens": tokens,
        "shared": features.video is features.audio,
    }


_LOOKS = {
    VIDEO: _video_facts,
    AUDIO: _sound_facts,
    REFERENCE: _sound_facts,
    TEXT: _text_facts,
}


def look(item: Item) -> Fact:
    """Read a file of a source and note what it is; its problem, where it has one."""
    fact = (item.folder, item.name, item.nbytes, item.archive)
    try:
        file = item.read()
        found = _LOOKS[item.folder](file)
        if not stored.finite(file):
            raise ValueError("got values that are not finite (NaN or Inf)")
    except (ValueError, OSError) as error:
        return Fact(*fact, problem=" ".join(str(error).split()))
    return Fact(*fact, **found)


@dataclass(frozen=True)
class Report:
    """A data set.

    Attributes:
        facts: one of every file.
        names: which file of each folder belongs to which clip.
        missing: (clip, folders that lack it).
        repeated: (folder, name) of files that are there more than once.
        speakers: by clip, as far as known.
    """

    facts: tuple[Fact, ...]
    names: Names
    missing: tuple[tuple[str, tuple[str, ...]], ...]
    repeated: tuple[tuple[str, str], ...]
    speakers: Mapping[str, str]

    @property
    def problems(self) -> tuple[Fact, ...]:
        """Files that cannot be used."""
        return tuple(fact for fact in self.facts if fact.problem)

    @property
    def broken(self) -> bool:
        """Whether anything is wrong, or there is nothing."""
        return bool(self.problems or self.missing or self.repeated or not self.usable)

    @property
    def usable(self) -> tuple[str, ...]:
        """Clips whose files are all there and sound."""
        if VIDEO not in self.names or TEXT not in self.names:
            return ()
        bad = {(fact.folder, fact.name) for fact in self.problems}
        return tuple(
            clip
            for clip in sorted(self.names[VIDEO])
            if all(
                clip in found and (folder, found[clip]) not in bad
                for folder, found in self.names.items()
            )
        )

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def report(facts: Iterable[Fact], speakers: Mapping[str, str] | None = None) -> Report:
    """Put together what is known of every file.

    Args:
        facts: one of each file.
        speakers: by clip; where a clip has none, the folder it lies in is one.
    """
    facts = tuple(facts)
    counts = Counter((fact.folder, fact.name) for fact in facts)
    found = {f: {n for g, n in counts if g == f} for f in FOLDERS}
    required = [f for f in FOLDERS if found[f] or f in (VIDEO, TEXT)]
    names = published.pair({f: found[f] for f in required})
    every = sorted(set().union(*names.values()))
    lacks = {clip: tuple(f for f in names if clip not in names[f]) for clip in every}
    known = speakers or {}
    nested = {clip: clip.rpartition("/")[0] for clip in every}
    return Report(
        facts,
        names,
        tuple((clip, folders) for clip, folders in lacks.items() if folders),
        tuple(at for at, count in counts.items() if count > 1),
        {c: s for c in every if (s := known.get(c) or nested[c])},
    )


def _spread(values: Sequence[float], unit: str) -> str:
    low, middle, high = (float(f(values)) for f in (np.min, np.median, np.max))
    if low == high:
        return f"{low:.4g}{unit}"
    return f"{low:.4g} to {high:.4g}{unit}, median {middle:.4g}"


def _counted(values: Iterable[Any]) -> str:
    counts = Counter(map(str, values)).most_common()
    shown = ", ".join(f"{value} ({count:,})" for value, count in counts[:4])
    return shown + (f", {len(counts) - 4} others" if len(counts) > 4 else "")


def _video_lines(good: Sequence[Fact]) -> Iterable[str]:
    seconds = [(8 * (f.shape[0] - 1) + 1) / f.fps for f in good]
    yield f"  {len({f.digest for f in good}):,} different videos"
    yield f"  latents [F H W C]: {_counted(list(f.shape) for f in good)}"
    yield f"  frames per second: {_counted(f'{f.fps:g}' for f in good)}"
    yield f"  seconds: {_spread(seconds, ' s')}"


def _sound_lines(good: Sequence[Fact]) -> Iterable[str]:
    seconds = [geometry.seconds(AudioGrid(f.shape[0])) for f in good]
    yield f"  latents [T M C]: {_counted(list(f.shape) for f in good)}"
    yield f"  seconds: {_spread(seconds, ' s')}"


def _text_lines(good: Sequence[Fact]) -> Iterable[str]:
    forms = ("one feature for both (2.0)" if f.shared else "two (2.3)" for f in good)
    yield f"  features: {_counted(forms)}"
    yield f"  [S D Da]: {_counted(list(f.shape) for f in good)}"
    yield f"  tokens: {_spread([float(f.tokens) for f in good], '')}"


_PARTS = {
    VIDEO: _video_lines,
    AUDIO: _sound_lines,
    REFERENCE: _sound_lines,
    TEXT: _text_lines,
}


def _listed(title: str, lines: Sequence[str]) -> Iterable[str]:
    if lines:
        yield f"{title}: {len(lines):,}"
        yield from (f"  {line}" for line in lines[:_LISTED])
        if len(lines) > _LISTED:
            yield f"  ... and {len(lines) - _LISTED:,} more"


def _lines(r: Report) -> Iterable[str]:
    """The report in words."""
    yield f"pairs: {len(r.usable):,} (complete and readable)"
    speakers = {r.speakers[c] for c in r.usable if c in r.speakers}
    known = f"{len(speakers):,}" if speakers else "not known (no folders, no metadata)"
    yield f"speakers: {known}"
    for folder in FOLDERS:
        facts = [f for f in r.facts if f.folder == folder]
        total = sum(f.nbytes for f in facts)
        yield f"{folder}: {len(facts):,} files, {total / 1e6:,.1f} MB"
        good = [f for f in facts if not f.problem]
        if good:
            yield f"  stored as {_counted(' and '.join(f.dtypes) for f in good)}"
            yield from _PARTS[folder](good)
    bad = [f"{f.folder}/{f.name}: {f.problem}" for f in r.problems]
    yield from _listed("unreadable or broken files", bad)
    gone = [f"{clip}: missing in {', '.join(fs)}" for clip, fs in r.missing]
    yield from _listed("clips without a partner", gone)
    twice = [f"{folder}/{name}" for folder, name in r.repeated]
    yield from _listed("files that are there more than once", twice)
    yield "broken" if r.broken else "nothing is broken"

"""Deciding what a TFDS data set of latents is made of: clips, their order, shards.

All records of a data set have one form: the same tensors, of the same dtypes and
widths. Numbers of frames and tokens may vary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from idlora_jax.data import sources, tfds_latents
from idlora_jax.data.report import Fact, Report
from idlora_jax.data.sources import Archives, Folder
from idlora_jax.data.stored import AUDIO, REFERENCE, TEXT, VIDEO, Clip
from idlora_jax.data.tfds_latents import Form, Tensor

SHARD = 1 << 28
"""Bytes of a shard, as the clips' files have them."""
Source = Folder | Archives


@dataclass(frozen=True)
class Options:
    """What to write, and where.

    Attributes:
        data_dir: where data sets lie.
        name: of this one.
        dtype: of latents and features; None: as stored.
        skip_broken: leave out clips that are broken, instead of failing.
        shard: bytes of a shard.

    Raises:
        ValueError: if TFDS does not allow the name.
    """

    data_dir: Path
    name: str = "idlora_folder"
    dtype: str | None = None
    skip_broken: bool = False
    shard: int = SHARD

    def __post_init__(self) -> None:
        """Check the name before anything is written."""
        tfds_latents.check_name(self.name)

    @property
    def final(self) -> Path:
        """The finished data set."""
        return self.data_dir / self.name / tfds_latents.VERSION

    @property
    def incomplete(self) -> Path:
        """What is there until then."""
        return self.final.with_name(f"incomplete.{tfds_latents.VERSION}")


_FLOATS = ("bfloat16", "float16", "float32", "float64")
_FIXED = {VIDEO: 3, AUDIO: 1, REFERENCE: 1, TEXT: 1}
"""The first axis from which on shapes of a folder must agree."""


def _agreed(folder: str, facts: Mapping[str, Fact], dtype: str | None) -> Fact:
    """One of the facts of a folder, after all were found to be of one form.

    Raises:
        ValueError: if they are not.
    """
    forms = {
        (f.shape[_FIXED[folder] :], None if dtype else f.dtypes, f.shared): (clip, f)
        for clip, f in facts.items()
    }
    if len(forms) > 1:
        shown = (f"{c}: {list(f.shape)} {f.dtypes}" for c, f in forms.values())
        raise ValueError(
            f"data: {folder} has clips of different forms ({'; '.join(shown)}), "
            "expected one in a data set; convert them apart, or give --dtype"
        )
    ((_, fact),) = forms.values()
    return dataclasses.replace(fact, dtypes=(dtype,) * 2) if dtype else fact


def form_of(found: Report, clips: Sequence[str], dtype: str | None) -> Form:
    """What the records of a data set look like.

    Raises:
        ValueError: if the clips differ in what cannot differ.
    """
    facts = {(fact.folder, fact.name): fact for fact in found.facts}
    one = {
        folder: _agreed(folder, {c: facts[folder, at[c]] for c in clips}, dtype)
        for folder, at in found.names.items()
    }
    if odd := {d for fact in one.values() for d in fact.dtypes} - {*_FLOATS}:
        raise ValueError(f"data: got tensors of {sorted(odd)}; give --dtype")
    form = {"mask": Tensor((None,), "bool")}
    for folder, name in ((VIDEO, "video"), (AUDIO, "audio"), (REFERENCE, "reference")):
        if folder in one:
            fixed = _FIXED[folder]
            shape = (*[None] * fixed, *one[folder].shape[fixed:])
            form[name] = Tensor(shape, one[folder].dtypes[0])
    (_, *widths), dtypes = one[TEXT].shape, one[TEXT].dtypes
    names = ("features",) if one[TEXT].shared else ("features_video", "features_audio")
    parts = zip(names, widths, dtypes, strict=False)
    return form | {name: Tensor((None, width), d) for name, width, d in parts}


def _clip(name: str, files: Mapping[str, Fact]) -> Clip:
    audio, reference = (
        files[f].shape[0] if f in files else 0 for f in (AUDIO, REFERENCE)
    )
    video = files[VIDEO]
    return Clip(name, tuple(video.shape[:3]), video.fps, audio, reference)


@dataclass(frozen=True)
class Plan:
    """What is written: clips in order, cut into shards.

    Attributes:
        report: of the source.
        form: of the records.
        places: of the source's files, in its order.
        clips: by name, in the order of the records.
        shards: names of the clips in each.
    """

    report: Report
    form: Form
    places: sources.Places
    clips: Mapping[str, Clip]
    shards: tuple[tuple[str, ...], ...]

    def nbytes(self, name: str) -> int:
        """Bytes of a clip's files."""
        return _nbytes(self.report, self.places, name)


def _nbytes(found: Report, places: sources.Places, name: str) -> int:
    return sum(places[f, at[name]].nbytes for f, at in found.names.items())


def plan(source: Source, found: Report, options: Options) -> Plan:
    """Decide what is written where.

    Raises:
        ValueError: if something is broken and not to be skipped, or nothing is left, or
            clips differ in what cannot differ.
    """
    names = found.usable
    if not names or (found.broken and not options.skip_broken):
        raise ValueError(
            f"data: {source.root} is broken, or holds no complete clip\n{found}\n"
            "repair it, or give --skip-broken to leave out what is broken"
        )
    facts = {(fact.folder, fact.name): fact for fact in found.facts}
    places = {at: sources.Place(f.nbytes, f.archive) for at, f in facts.items()}
    ordered = source.ordered(names, found.names, places)
    clips = {
        name: _clip(name, {f: facts[f, at[name]] for f, at in found.names.items()})
        for name in ordered
    }
    size = functools.partial(_nbytes, found, places)
    shards = tuple(map(tuple, sources.grouped(ordered, size, options.shard)))
    return Plan(found, form_of(found, names, options.dtype), places, clips, shards)

"""Encoding samples speaker by speaker, each with another one's voice as reference.

A reference is the sound of another sample, so all sounds of a speaker are encoded
before the speaker's pictures. Threads decode both ahead, in this order:

    sounds of A, sounds of B, pictures of A, sounds of C, pictures of B, ...

so that nothing waits between two speakers. In memory are the sounds of two speakers
(latents, 60 KB each) and the frames of `workers` + 1 clips.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from idlora_jax.data import encode, outcomes, pairing, prefetch, samples, worklist
from idlora_jax.data.cuts import Cut
from idlora_jax.data.encode import Encoders, Wave
from idlora_jax.data.listening import Listener, Voice
from idlora_jax.data.outcomes import Outcome
from idlora_jax.data.rejection import Rejection
from idlora_jax.data.samples import Made, Place, Reference
from idlora_jax.data.worklist import Group, Work

Heard = Mapping[str, Voice | Rejection | None]
"""Sounds by names of cuts: None for a sample that is there and was not listened to."""


class _Job(NamedTuple):
    """Decode the sounds of cuts of one file, or else the pictures of one cut.

    Attributes:
        cuts: of one file; of pictures, one.
        group: of pictures, all cuts of the speaker; None: sounds.
        last: whether they are the group's last pictures.
    """

    cuts: Sequence[Cut]
    group: Group | None = None
    last: bool = False


def _jobs(work: Work, *, all_sounds: bool) -> Iterator[_Job]:
    """What is to be decoded, in order; `all_sounds`: of samples that are there, too."""
    names = {cut.name for cut in work.todo}
    before: list[_Job] = []
    for group in work.groups:
        todo = [cut for cut in group if cut.name in names]
        heard = group if all_sounds and todo else todo
        for _, same in groupby(heard, key=lambda cut: cut.clip.video):
            yield _Job([*same])
        yield from before
        before = [_Job([cut], group, cut is todo[-1]) for cut in todo]
    yield from before


def _stretch(cut: Cut, recorded: np.ndarray, rate: int) -> Wave | Rejection:
    try:
        where = cut.clip.video
        return encode.wave(where, recorded, rate, cut.grid, start_s=cut.start_s)
    except Rejection as error:
        return error


def _decoded(rate: int, job: _Job) -> tuple[_Job, list[Any]]:
    """A job with the wave or the frames of each cut, or why there are none."""
    try:
        if job.group is not None:
            return job, [encode.frames(job.cuts[0])]
        recorded = encode.recording(job.cuts[0].clip.video, rate)
    except Rejection as error:
        return job, [error] * len(job.cuts)
    return job, [_stretch(cut, recorded, rate) for cut in job.cuts]


def _is_usable(heard: Heard, cut: Cut) -> bool:
    """Whether a cut's sound can be a reference."""
    if cut.name not in heard:
        return False
    found = heard[cut.name]
    return found is None or (isinstance(found, Voice) and found.clean is not None)


def _of_other(place: Place, other: Cut, heard: Heard) -> Reference:
    found = heard[other.name]
    latents = found.clean if isinstance(found, Voice) else None
    if latents is None:
        latents = samples.sound_of(place, other)
    return Reference(other.name, worklist.voice(place, other), latents)


def _reference(
    place: Place,
    cut: Cut,
    group: Group,
    heard: Heard,
    of_file: Callable[..., Reference],
) -> Reference:
    """The reference of a cut.

    Raises:
        Rejection: if there is none.
    """
    path, start_s = cut.clip.reference, 0.0
    if path is None:
        usable = {other.name for other in group if _is_usable(heard, other)}
        other = pairing.choose(cut, group, usable, place.seed)
        if other is not None:
            return _of_other(place, other, heard)
        spare = pairing.spare_s(cut) if place.self_reference else None
        if spare is None:
            said = f"no other clip of {cut.clip.speaker} has sound to refer to"
            raise Rejection("no reference", f"{cut.name}: {said}")
        path, start_s = cut.clip.video, spare
    try:
        return of_file(path, start_s, cut.grid)
    except Rejection as error:
        raise Rejection("no reference", f"{cut.name}: its reference: {error}") from None


def encode_all(place: Place, encoders: Encoders, work: Work) -> Generator[Outcome]:
    """Encode and write samples; one outcome after each.

    Args:
        place: where they go, and what with.
        encoders: with the parameters of both VAEs.
        work: from `worklist.work`.

    Raises:
        ValueError: if the voice hook fails.
        OSError: if a file cannot be written.
    """
    nets, params, _ = encoders
    listener = Listener(place, encoders)
    # A speaker's clips often name one file.
    of_file = functools.lru_cache(8)(listener.of_file)
    heard: dict[str, Voice | Rejection | None] = {
        outcome.name: None for outcome in work.done if outcome.state == "existing"
    }

    def made(cut: Cut, group: Group, frames: np.ndarray | Rejection) -> Made:
        own = heard[cut.name]
        for found in (own, frames):
            if isinstance(found, Rejection):
                raise found
        reference = _reference(place, cut, group, heard, of_file)
        assert isinstance(own, Voice) and isinstance(frames, np.ndarray)
        video = encode.encode_video(nets.video_vae, params["video_vae"], frames)
        return Made(video, own.own, reference)

    decode = functools.partial(_decoded, listener.rate)
    jobs = _jobs(work, all_sounds=place.clean is not None)
    with contextlib.closing(prefetch.ordered(decode, jobs, place.workers)) as decoded:
        for job, found in decoded:
            if job.group is None:
                for cut, wave in zip(job.cuts, found, strict=True):
                    heard[cut.name] = wave
                    if isinstance(wave, Wave):
                        heard[cut.name] = listener.voice(wave, cut.name)
                continue
            (cut,) = job.cuts
            try:
                new = made(cut, job.group, found[0])
                samples.write(place, cut, new)
                yield outcomes.accepted(cut, "written", new.reference.source)
            except Rejection as why:
                yield outcomes.rejected(cut.name, cut.clip.speaker, why)
            if job.last:
                for other in job.group:
                    heard.pop(other.name, None)

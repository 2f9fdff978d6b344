"""What may be a sample's reference, before anything is decoded.

A file that the list names; else another sample of the speaker; else, if that is wanted,
a stretch beside it in its own clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from idlora_jax.data import identity, outcomes, pairing, samples
from idlora_jax.data.cuts import Cut
from idlora_jax.data.outcomes import Outcome
from idlora_jax.data.rejection import Rejection
from idlora_jax.data.samples import Place

Group = Sequence[Cut]


class Work(NamedTuple):
    """Cuts by speaker, which of them are to be made, and what became of the others."""

    groups: list[Group]
    todo: list[Cut]
    done: list[Outcome]


def voice(place: Place, cut: Cut) -> str:
    """The digest of a sample's sound as a reference."""
    return place.marks.voice(cut.content, cut.start_s, cut.grid)


def _voices(place: Place, cut: Cut, group: Group) -> set[str]:
    """Digests of the references that a sample may have."""
    mark = place.marks.voice
    if cut.clip.reference is not None:
        return {mark(identity.of_file(cut.clip.reference), 0.0, cut.grid)}
    found = {voice(place, other) for other in pairing.others(cut, group)}
    spare = pairing.spare_s(cut) if place.self_reference else None
    return found if spare is None else found | {mark(cut.content, spare, cut.grid)}


def _hopeless(place: Place, cut: Cut, group: Group) -> Rejection | None:
    """Why a cut can have no reference, as far as headers tell."""
    path = cut.clip.reference
    if path is not None:
        if path.is_file():
            return None
        said = f"{cut.name}: got no file {path}, expected its reference; check the path"
        return Rejection("no reference", said)
    if pairing.others(cut, group):
        return None
    who = f"{cut.name}: no other clip of {cut.clip.speaker} can be its reference"
    if not place.self_reference:
        do = "add one, name a file as its reference, or give --self-reference"
        return Rejection("no reference", f"{who}; {do}")
    if pairing.spare_s(cut) is None:
        what = f"and it has no other {cut.seconds:.2f} s itself"
        return Rejection("no reference", f"{who}, {what}; ask for fewer frames")
    return None


def _is_there(place: Place, cut: Cut, group: Group) -> bool:
    voices = _voices(place, cut, group) if place.skip_existing else ()
    return bool(voices) and samples.is_complete(place, cut, voices)


def work(place: Place, groups: Sequence[Group]) -> Work:
    """Sort out which samples are there and which cannot be.

    Args:
        place: where samples go.
        groups: cuts of each speaker, in order.
    """
    able, todo, done = [], [], []
    for group in groups:
        reasons = {cut.name: _hopeless(place, cut, group) for cut in group}
        able.append([cut for cut in group if reasons[cut.name] is None])
        for cut in group:
            why = reasons[cut.name]
            if why is not None:
                done.append(outcomes.rejected(cut.name, cut.clip.speaker, why))
            elif _is_there(place, cut, group):
                source = samples.source_of(place, cut)
                done.append(outcomes.accepted(cut, "existing", source))
            else:
                todo.append(cut)
    return Work(able, todo, done)

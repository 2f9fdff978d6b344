"""Which other part of which clip is the reference of a sample.

Never the sample itself, nor a part of the same file that overlaps it; a part of another
file comes before one of the same. Without a seed it is the next one of the speaker in
the order of the list, after the last one the first. With a seed the one whose digest
with the sample's name and the seed is least: as random as a digest, and the same
whatever other samples there are, as long as it is there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from idlora_jax.data import identity
from idlora_jax.data.cuts import Cut


def by_speaker(cuts: Sequence[Cut]) -> dict[str, list[Cut]]:
    """Cuts of each speaker in order, speakers by first appearance."""
    groups: dict[str, list[Cut]] = {}
    for cut in cuts:
        groups.setdefault(cut.clip.speaker, []).append(cut)
    return groups


def _apart(cut: Cut, other: Cut) -> bool:
    same = cut.clip.video == other.clip.video
    first, second = sorted((cut, other), key=lambda c: c.start_s)
    return not same or second.start_s >= first.end_s - 1e-6


def others(cut: Cut, group: Sequence[Cut]) -> list[Cut]:
    """Those that may be a cut's reference, the next one first.

    Args:
        cut: one of `group`.
        group: all cuts of its speaker, in order.
    """
    at = next(n for n, other in enumerate(group) if other.name == cut.name)
    found = [other for other in [*group[at + 1 :], *group[:at]] if _apart(cut, other)]
    return sorted(found, key=lambda other: other.clip.video == cut.clip.video)


def choose(
    cut: Cut, group: Sequence[Cut], usable: Collection[str], seed: int | None = None
) -> Cut | None:
    """The reference of a cut.

    Args:
        cut: one of `group`.
        group: all cuts of its speaker, in order.
        usable: names of cuts whose sound can be used.
        seed: None: the next one in order.

    Returns:
        None if no other cut is usable.
    """
    found = [other for other in others(cut, group) if other.name in usable]
    if not found or seed is None:
        return next(iter(found), None)
    same = [(other.clip.video == cut.clip.video, other) for other in found]

    def place(pair: tuple[bool, Cut]) -> tuple[bool, str]:
        return pair[0], identity.of("pair", seed, cut.name, pair[1].name)

    return min(same, key=place)[1]


def spare_s(cut: Cut) -> float | None:
    """Where another stretch of the cut's length begins in the same clip, beside it.

    Returns:
        The one behind the cut, else the one before it; None if there is no room.
    """
    length, slack = cut.seconds, 0.5 / cut.fps
    if cut.until_s - cut.end_s >= length - slack and cut.until_s != float("inf"):
        return cut.end_s
    room = cut.start_s - cut.clip.start_s
    return cut.start_s - length if room >= length - slack else None

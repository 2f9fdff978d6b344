"""Comparing works: equal numbers first, then times, taken in turns.

Rounds are interleaved, A B C A B C, so that whatever else the machine does meets all of
them alike; a ratio is taken within each round, and its median over the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.works import Outputs, Timed, Work, timed

TOLERANCE = 1e-4


class UnequalError(Exception):
    """Works that should compute the same do not; nothing was timed."""


class Error(NamedTuple):
    """The largest difference of any output.

    Attributes:
        absolute: max |a - b|.
        relative: the same over max |b|, each output by itself.
    """

    absolute: float
    relative: float


def difference(got: Outputs, want: Outputs) -> Error:
    """How far outputs are from others; infinite where a number is not finite.

    Raises:
        UnequalError: if names or shapes differ.
    """
    shapes = [{n: np.shape(x) for n, x in side.items()} for side in (got, want)]
    if shapes[0] != shapes[1]:
        raise UnequalError(f"equality: got outputs {shapes[0]}, expected {shapes[1]}")
    worst = Error(0.0, 0.0)
    for name, value in want.items():
        a, b = (np.asarray(x, np.float64) for x in (got[name], value))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return Error(np.inf, np.inf)
        far, size = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        if size == 0:
            return Error(np.inf, np.inf)  # nothing was computed
        worst = Error(*map(max, worst, (float(far), float(far / size))))
    return worst


class First(NamedTuple):
    """The first, untimed run of a work: how far from the baseline, and how long."""

    error: Error
    took: Timed


def check(works: Sequence[Work], tolerance: float = TOLERANCE) -> list[First]:
    """Run each work once and compare it with the first.

    Args:
        works: the baseline first.
        tolerance: largest allowed relative difference.

    Raises:
        UnequalError: naming the works that are further from it, or not finite.
    """
    found, wanted, bad = [], None, []
    for work in works:
        done, took = timed(work.run)
        outputs = {n: np.array(x) for n, x in work.outputs(done).items()}
        wanted = outputs if wanted is None else wanted
        error = difference(outputs, wanted)
        found.append(First(error, took))
        if not error.relative <= tolerance:
            bad.append(f"{work.backend} {work.variant}: {error.relative:.2e}")
    if bad:
        raise UnequalError(
            f"equality: relative difference from {works[0].backend} "
            f"{works[0].variant} above {tolerance:g}, not timed: {'; '.join(bad)}"
        )
    return found


def order(works: int, rounds: int) -> Iterator[tuple[int, int]]:
    """(round, number of the work) in the order of running."""
    return ((r, n) for r in range(rounds) for n in range(works))


@dataclass(frozen=True)
class Times:
    """What the rounds took, one of each per round.

    Attributes:
        wall: seconds.
        cpu: seconds.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]


def measure(works: Sequence[Work], rounds: int) -> list[Times]:
    """Time works in turns; run `check` before.

    Args:
        works: each already run once.
        rounds: how often each runs.
    """
    found: list[list[Timed]] = [[] for _ in works]
    for _, n in order(len(works), rounds):
        found[n].append(timed(works[n].run)[1])
    return [
        Times(tuple(t.wall for t in own), tuple(t.cpu for t in own)) for own in found
    ]


def ratios(baseline: Times, own: Times, *, clock: str = "cpu") -> tuple[float, ...]:
    """How many times faster than the baseline, round by round.

    Args:
        baseline: its times.
        own: of as many rounds.
        clock: "cpu" or "wall".
    """
    pairs = zip(getattr(baseline, clock), getattr(own, clock), strict=True)
    return tuple(a / b for a, b in pairs)

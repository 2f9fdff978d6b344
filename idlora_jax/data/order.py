"""Which clips a batch holds: a function of the data, the seed and the batch's number.

Clips lie in buckets (`data.collection`), and a batch holds clips of one. Each bucket of
n clips is shuffled anew every epoch; its epochs follow each other without a gap, so
that what is too little for a batch of B is not lost but begins the bucket's next one:
after e epochs a bucket has given floor(e n / B) batches. Batches of an epoch come in a
random order of their buckets. Every clip has then been seen e times, or e - 1 times if
it is one of the less than B that wait.

Nothing is kept between batches: any batch of any epoch is found at once, by every host,
however many there are.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Place(NamedTuple):
    """One batch: the number of its bucket and of its clips there, [B]."""

    bucket: int
    rows: Int[np.ndarray, " B"]


@functools.lru_cache(maxsize=256)
def _permutation(count: int, seed: int, epoch: int, bucket: int) -> np.ndarray:
    """A bucket's clips in the order of one epoch."""
    entropy = [seed, epoch, bucket] if bucket else [seed, epoch]
    return np.random.default_rng(entropy).permutation(count)


@functools.lru_cache(maxsize=16)
def _buckets(given: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """The bucket of each batch of one epoch, in which each gives so many."""
    every = np.repeat(np.arange(len(given)), given)
    return np.random.default_rng([seed, epoch, len(given)]).permutation(every)


@dataclass(frozen=True)
class Order:
    """The order of all batches.

    Attributes:
        counts: clips of each bucket, at least one bucket with a batch of them.
        batch: B.
        seed: of the shuffling.
    """

    counts: tuple[int, ...]
    batch: int
    seed: int = 0

    def _before(self, epoch: int) -> list[int]:
        """How many batches each bucket has given before an epoch."""
        return [epoch * count // self.batch for count in self.counts]

    def _epoch(self, number: int) -> int:
        """The epoch of a batch."""
        some = max(self.counts)
        enough = (number + 1) * self.batch // some + 2
        total = lambda epoch: sum(self._before(epoch))
        return bisect.bisect_right(range(enough), number, key=total) - 1

    def at(self, number: int) -> Place:
        """The clips of a batch, counted from 0."""
        epoch = self._epoch(number)
        first, last = self._before(epoch), self._before(epoch + 1)
        given = tuple(b - a for a, b in zip(first, last, strict=True))
        buckets = _buckets(given, self.seed, epoch)
        at = number - sum(first)
        bucket = int(buckets[at])
        own = first[bucket] + int(np.count_nonzero(buckets[:at] == bucket))
        rows = range(own * self.batch, (own + 1) * self.batch)
        return Place(bucket, np.array([self._row(bucket, row) for row in rows]))

    def _row(self, bucket: int, place: int) -> int:
        count = self.counts[bucket]
        epoch, at = divmod(place, count)
        return int(_permutation(count, self.seed, epoch, bucket)[at])

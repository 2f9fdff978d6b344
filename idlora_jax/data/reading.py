"""Batches for training, read ahead by threads.

    data = batches(collection, connect, order, count=1000)     any batch by its number
    with opened(data, ahead=2, seen=40) as reader:
        batch = reader(40)                                     and so on, in order
        reader.position()                                      saved with a checkpoint

`Batches` is random access, which Grain's threads use to make the next batches while one
is trained on. What a batch holds depends on its number alone (`data.order`), never on
how far threads have come, so that a run goes on from a position exactly. The position
counts batches that were handed out, not those that wait.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from idlora_jax.data import latents
from idlora_jax.data.collection import Collection
from idlora_jax.data.latents import Connect, Sample
from idlora_jax.data.order import Order
from idlora_jax.strategies import Batch

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Rows = slice | Int[np.ndarray, " n"]
_EVERY = slice(None)


def kept(of: Callable[[Key], Value], size: int) -> Callable[[Key], Value]:
    """A function that keeps its last `size` values; threads make each of them once."""
    lock = threading.Lock()
    found: OrderedDict[Key, Future[Value]] = OrderedDict()

    def get(key: Key) -> Value:
        with lock:
            mine = key not in found
            future = found.setdefault(key, Future())
            found.move_to_end(key)
            if len(found) > size:
                found.popitem(last=False)
        if mine:
            try:
                future.set_result(of(key))
            except BaseException as error:
                with lock:
                    found.pop(key, None)
                future.set_exception(error)
        return future.result()

    return get


@dataclass(frozen=True)
class Batches:
    """All batches of a run: `len`, and each by its number, on the host.

    Attributes:
        clips: in buckets.
        order: which of them a batch holds.
        count: how many batches there are.
        rows: of every batch, those that this host reads.
        sample: reads a clip, given the number of its bucket and its own there.
    """

    clips: Collection
    order: Order
    count: int
    rows: Rows
    sample: Callable[[tuple[int, int]], Sample] = field(repr=False)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        """This host's rows of a batch.

        Raises:
            ValueError: if a clip cannot be read.
        """
        bucket, rows = self.order.at(index)
        samples = [self.sample((bucket, int(row))) for row in rows[self.rows]]
        return latents.collate(samples, self.clips.buckets[bucket])

    def names(self, number: int) -> list[str]:
        """The clips of a batch, those of other hosts too; nothing is read."""
        bucket, rows = self.order.at(number)
        clips = self.clips.buckets[bucket].clips
        return [clips[row].name for row in rows]


def batches(
    clips: Collection,
    connect: Connect,
    order: Order,
    *,
    count: int,
    rows: Rows = _EVERY,
    cached: int = 256,
) -> Batches:
    """The batches of a run.

    Args:
        clips: to train on.
        connect: the connectors; they run when a clip is read, in threads.
        order: which clips a batch holds.
        count: how many batches there are.
        rows: of every batch, those that this host reads; its batches hold no others.
        cached: how many clips that were read stay in memory.
    """

    def sample(at: tuple[int, int]) -> Sample:
        bucket, row = at
        index = clips.buckets[bucket]
        return latents.read(index, index.clips[row], connect)

    return Batches(clips, order, count, rows, kept(sample, cached))


@dataclass(frozen=True)
class Reader:
    """Batches in their order; see `opened`."""

    iterator: Any

    def __call__(self, seen: int) -> Batch:
        """The next batch.

        Args:
            seen: how many were handed out before.

        Raises:
            ValueError: if a clip cannot be read, or the reader stands elsewhere.
        """
        import grain

        _check(grain.experimental.get_next_index(self.iterator), seen)
        return next(self.iterator)

    def position(self) -> dict[str, Any]:
        """Where it stands, for `opened`: behind the last batch handed out."""
        return self.iterator.get_state()


def _check(at: int, seen: int) -> None:
    if at != seen:
        raise ValueError(
            f"data: the reader stands at batch {at}, the training state at {seen}; "
            "delete this state to resume from an older one"
        )


def _moved(iterator: Any, seen: int, position: Any) -> None:
    """Set an iterator to a saved position, which must be behind `seen` batches."""
    import grain

    if position is None:
        grain.experimental.set_next_index(iterator, seen)
        return
    try:
        iterator.set_state(position)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"data: the saved position {position!r:.80} of the reader is of another "
            f"version of grain or of other data ({error}); delete this state to resume "
            "from an older one"
        ) from None
    _check(grain.experimental.get_next_index(iterator), seen)


@contextlib.contextmanager
def opened(
    data: Batches, *, ahead: int = 2, seen: int = 0, position: Any = None
) -> Iterator[Reader]:
    """Read batches in their order, the next ones ahead of their use.

    Args:
        data: the batches.
        ahead: how many are made ahead, each by a thread of its own; 0: none.
        seen: how many were handed out before; the reader begins behind them.
        position: of a reader that a state was saved with (`Reader.position`), where
            there was one: must be the same place.

    Raises:
        ValueError: if it is another place.
    """
    import grain  # a second to import, and only training needs it

    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    source = grain.MapDataset.source(data)
    iterator = iter(source.to_iter_dataset(options))
    with contextlib.closing(iterator):
        if seen < len(data):
            _moved(iterator, seen, position)
            iterator.start_prefetch()
        yield Reader(iterator)

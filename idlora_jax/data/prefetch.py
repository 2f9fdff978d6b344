"""Work done ahead of its use, by threads, in order and in bounded memory.

Decoding and resizing release the interpreter's lock, so that threads are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result]:
    """`work` of each item, in the order of the items.

    At most `workers` results wait or are made while another one is used, and `items`
    is asked for the next item only then. An error of `work` is raised when its result
    is due. Closing the iterator leaves work that has not begun undone.

    Args:
        work: called in threads.
        items: read in the calling thread.
        workers: threads, at least 1.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, "decode") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

"""How far a long reading or writing is, in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Progress = Callable[[int], object]
"""Takes the number of bytes that were just done."""


def silent(done: int) -> None:
    """The progress nobody watches."""


@contextlib.contextmanager
def bar(total: int, what: str) -> Iterator[Progress]:
    """A bar of `total` bytes on a terminal's stderr; nothing where there is none."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as shown:
        yield shown.update

"""Which arrays are on devices that were not there before."""

from __future__ import annotations

from collections.abc import Callable

import jax


def since_now() -> Callable[[], list[jax.Array]]:
    """A function that gives the arrays that are there when it is called, without those
    that are there now (which it keeps, so that none of them goes meanwhile)."""
    before = {id(x): x for x in jax.live_arrays()}
    return lambda: [x for x in jax.live_arrays() if id(x) not in before]

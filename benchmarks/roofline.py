"""What a device can do at most, and what share of it was reached.

    floor = max(flops / peak flops, bytes / peak bytes per second)
    frac_roof = floor / time

The peak of a CPU is measured: the best of a few large products and copies, with the
threads of this run. That of a GPU is its maker's, for dense products in bfloat16.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

N, COPIED, TRIES = 1024, 64 * 2**20, 5


class Peak(NamedTuple):
    """The most of a device.

    Attributes:
        flops: a second.
        bytes: read and written a second.
        source: "measured" or "maker".
    """

    flops: float
    bytes: float
    source: str


MAKERS = {
    "H200": Peak(989e12, 4.8e12, "maker"),
    "H100": Peak(989e12, 3.35e12, "maker"),
    "A100": Peak(312e12, 2.0e12, "maker"),
    "L40S": Peak(362e12, 0.864e12, "maker"),
    "RTX 4090": Peak(165e12, 1.0e12, "maker"),
}
"""By a part of the device's name: bfloat16 without sparsity."""


def _best(f: Callable[[], Any]) -> float:
    """Seconds of the fastest of some runs, after one that does not count."""
    f()
    took = []
    for _ in range(TRIES):
        start = time.perf_counter()
        f()
        took.append(time.perf_counter() - start)
    return min(took)


def measured(n: int = N, copied: int = COPIED) -> Peak:
    """The peak of the first device in float32, by products of [n n] and a copy.

    Args:
        n: side of the matrices.
        copied: bytes that are copied.
    """
    x = jnp.asarray(np.random.default_rng(0).standard_normal((n, n)), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    seconds = _best(lambda: jax.block_until_ready(product(x)))
    y = jnp.zeros(copied // 4, jnp.float32)
    add = jax.jit(lambda a: a + 1)
    moved = _best(lambda: jax.block_until_ready(add(y)))
    return Peak(2 * n**3 / seconds, 2 * copied / moved, "measured")


@functools.cache
def peak() -> Peak:
    """Of the first device."""
    kind = jax.devices()[0].device_kind
    known = [peak for name, peak in MAKERS.items() if name in kind]
    return known[0] if known else measured()


def floor_s(flops: float | None, moved: int | None, limit: Peak) -> float | None:
    """The least seconds that so much work takes.

    Args:
        flops: of products; None: unknown.
        moved: bytes that must be read or written once; None: unknown.
        limit: of the device.
    """
    if flops is None:
        return None
    return max(flops / limit.flops, (moved or 0) / limit.bytes)

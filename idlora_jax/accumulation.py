"""A batch in parts, one after the other, in one compiled step.

    parts = split(batch, 4)         [4 B ...] of [4B ...]
    grads = mean(f, 4, parts)       the mean of f(0, part), f(1, part), ...

The parts go through a scan, which holds one part's activations and one sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

Means = TypeVar("Means")


def split(tree: Any, parts: int) -> Any:
    """Arrays [N B ...] of arrays [N B, ...]: part n has the rows n, N + n, 2 N + n, ...

    Where rows are divided over devices, each keeps its own: of its first N rows one
    goes into each part.

    Args:
        tree: arrays with the same number of rows.
        parts: N.

    Raises:
        ValueError: if N parts of equal size cannot be made.
    """

    def one(x: Array) -> Array:
        rows, rest = divmod(x.shape[0], parts)
        if rest:
            raise ValueError(
                f"accumulation: got a batch of {x.shape[0]} clips, expected a multiple "
                f"of {parts} parts of equal size"
            )
        return jnp.swapaxes(jnp.reshape(x, (rows, parts, *x.shape[1:])), 0, 1)

    return jax.tree.map(one, tree)


def row(part: int, index: int, parts: int) -> int:
    """Which row of the batch is row `index` of a part; see `split`."""
    return index * parts + part


def mean(
    f: Callable[[Any, Any], Means],
    parts: int,
    given: Any,
    keep: Callable[[Means], Means] = lambda found: found,
) -> Means:
    """The mean of f(n, given[n]) over the parts n.

    Args:
        f: from the number of a part and the part to arrays.
        parts: N; of one there is no scan.
        given: arrays [N ...].
        keep: says where the sums lie.
    """
    if parts == 1:
        return f(0, jax.tree.map(lambda x: x[0], given))
    numbers = jnp.arange(parts, dtype=jnp.int32)
    first = jax.tree.map(lambda x: x[0], (numbers, given))
    like = jax.eval_shape(f, *first)

    def add(total: Means, each: tuple[Any, Any]) -> tuple[Means, None]:
        return keep(jax.tree.map(jnp.add, total, f(*each))), None

    zeros = keep(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like))
    total, _ = jax.lax.scan(add, zeros, (numbers, given))
    return jax.tree.map(lambda x: x / parts, total)

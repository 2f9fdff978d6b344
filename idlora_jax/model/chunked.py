"""Attention where no fused kernel serves: a few heads and queries at a time.

Scores of all heads and queries at once are written to memory and read again by every
operation of the softmax. Those of a chunk stay in a cache, and only they exist: by
default 2 MB on a CPU, elsewhere as much as keeps the device busy. The backward pass
makes the scores of a chunk again, as fused kernels do. What is small is one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CPU_BYTES, OTHER_BYTES = 2 * 2**20, 256 * 2**20
"""Float32 scores of one chunk."""
LEAST = 128
"""Queries of a chunk at least: products of fewer rows are slow."""


def plain(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    bias: Float[Array, "B 1 T S"] | None = None,
    length: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N K"]:
    """All scores at once."""
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias, key_value_seq_lengths=length, implementation="xla"
    )


def _heads_at_once(heads: int, most: int) -> int:
    """The largest divisor of `heads` up to `most`."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(1, most))


def _by_queries(
    call: Callable[..., Array],
    count: int,
    q: Float[Array, "B T n K"],
    k: Float[Array, "B S n K"],
    v: Float[Array, "B S n K"],
    bias: Float[Array, "B 1 T S"] | None,
) -> Float[Array, "B T n K"]:
    """At most `count` queries at a time, in equal chunks (the last is filled up)."""
    batch, rows = q.shape[:2]
    if count >= rows:
        return call(q, k, v, bias)
    count = -(-rows // -(-rows // count))
    pad = -rows % count
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(batch, -1, count, *q.shape[2:]), 1, 0)
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, pad), (0, 0)))
        bias = bias.reshape(*bias.shape[:2], -1, count, bias.shape[-1])
        bias = jnp.moveaxis(bias, 2, 0)
    out = jax.lax.map(lambda part: call(part[0], k, v, part[1]), (q, bias))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :rows]


def chunked(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    bias: Float[Array, "B 1 T S"] | None = None,
    length: Int[Array, " B"] | None = None,
    *,
    budget: int | None = None,
) -> Float[Array, "B T N K"]:
    """As `plain`, with at most `budget` bytes of scores (or `LEAST` queries) at a time.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the scores, equal for all heads.
        length: valid keys per sample.
        budget: bytes (default: those of the platform).
    """
    if budget is None:
        budget = CPU_BYTES if jax.default_backend() == "cpu" else OTHER_BYTES
    batch, rows, heads, _ = q.shape
    row = 4 * batch * k.shape[1]
    if heads * rows * row <= budget:
        return plain(q, k, v, bias, length)
    n = _heads_at_once(heads, budget // (rows * row))
    call = jax.checkpoint(functools.partial(plain, length=length))
    count = max(LEAST, budget // (n * row))

    def some(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, n, x.shape[-1]), 2, 0)

    def step(part: tuple[Array, Array, Array]) -> Array:
        return _by_queries(call, count, *part, bias)

    out = jax.lax.map(step, (some(q), some(k), some(v)))
    return jnp.moveaxis(out, 0, 2).reshape(q.shape)

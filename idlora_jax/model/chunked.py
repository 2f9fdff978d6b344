"""Attention where no fused kernel serves: a few heads and queries at a time.

Scores of all heads and queries at once are written to memory and read again by every
operation of the softmax. Those of a chunk stay in a cache, and only they exist: by
default 2 MB on a CPU, elsewhere as much as keeps the device busy. The backward pass
makes the scores of a chunk again, as fused kernels do. What is small is one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

CPU_BYTES, OTHER_BYTES = 2 * 2**20, 256 * 2**20
"""Float32 scores of one chunk."""
HIDDEN = -1e30
"""The score of a key that is not seen, where there are others."""
LEAST = 128
"""Queries of a chunk at least: products of fewer rows are slow."""


def _wide(x: Array) -> Any:
    """Of sums: float32, or float64 where that is asked for."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _scores(q: Array, k: Array) -> Array:
    scores = jnp.einsum("bntk,bnsk->bnts", q, k, preferred_element_type=_wide(q))
    return scores * q.shape[-1] ** -0.5


def _product(weights: Array, v: Array) -> Array:
    weights = weights.astype(v.dtype)
    return jnp.einsum("bnts,bnsk->bntk", weights, v, preferred_element_type=_wide(v))


def _softmax(
    q: Array, k: Array, bias: Array | None, length: Array | None
) -> tuple[Array, Array]:
    """Exponentials of the scores [B N T S] and their sums [B N T 1]."""
    scores = _scores(q, k)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if length is not None:
        at = jnp.arange(k.shape[2])[None, None, None]
        scores = jnp.where(at < length[:, None, None, None], scores, HIDDEN)
    exps = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return exps, jnp.sum(exps, axis=-1, keepdims=True)


@jax.custom_jvp
def _attended(
    q: Float[Array, "B n T K"],
    k: Float[Array, "B n S K"],
    v: Float[Array, "B n S K"],
    bias: Float[Array, "B 1 T S"] | None,
    length: Int[Array, " B"] | None,
) -> Float[Array, "B n T K"]:
    """All scores at once, in float32.

    Exponentials are multiplied with the values before they are divided by their sum:
    there are fewer of the products than of the scores. The gradient reads the quotients
    themselves, so that what makes scores again need not make the products again.
    """
    exps, total = _softmax(q, k, bias, length)
    return (_product(exps, v) / total).astype(v.dtype)


def _attended_jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    """dp = p (ds - sum of p ds), of p = softmax(s); no products of what stays."""
    q, k, v, bias, length = primals
    dq, dk, dv, dbias, _ = tangents
    moves = lambda x: x is not None and not isinstance(x, SymbolicZero)
    exps, total = _softmax(q, k, bias, length)
    p, out = exps / total, (_product(exps, v) / total).astype(v.dtype)
    ds, tangent = [], jnp.zeros(out.shape, p.dtype)
    if moves(dq):
        ds.append(_scores(dq, k))
    if moves(dk):
        ds.append(_scores(q, dk))
    if moves(dbias):
        ds.append(dbias.astype(p.dtype))
    if ds:
        dp = p * sum(ds)
        tangent += _product(dp - p * jnp.sum(dp, axis=-1, keepdims=True), v)
    if moves(dv):
        tangent += _product(p, dv)
    return out, tangent.astype(v.dtype)


_attended.defjvp(_attended_jvp, symbolic_zeros=True)


def _heads_at_once(heads: int, most: int) -> int:
    """The largest divisor of `heads` up to `most`."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= max(1, most))


def _by_queries(
    call: Callable[..., Array],
    count: int,
    q: Float[Array, "B n T K"],
    k: Float[Array, "B n S K"],
    v: Float[Array, "B n S K"],
    bias: Float[Array, "B 1 T S"] | None,
) -> Float[Array, "B n T K"]:
    """At most `count` queries at a time, in equal chunks (the last is filled up)."""
    rows = q.shape[2]
    if count >= rows:
        return call(q, k, v, bias)
    count = -(-rows // -(-rows // count))

    def some(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -rows % count), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, count, x.shape[-1]), 2, 0)

    parts = some(q), None if bias is None else some(bias)
    out = jax.lax.map(lambda part: call(part[0], k, v, part[1]), parts)
    out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*q.shape[:2], -1, q.shape[-1])[:, :, :rows]


def _in_chunks(
    budget: int,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    length: Array | None,
) -> Array:
    """As `_attended`, with at most `budget` bytes of scores at a time."""
    batch, heads, rows, _ = q.shape
    row = 4 * batch * k.shape[2]
    if heads * rows * row <= budget:
        return _attended(q, k, v, bias, length)
    n = _heads_at_once(heads, budget // (rows * row))
    call = jax.checkpoint(lambda *args: _attended(*args, length))
    count = max(LEAST, budget // (n * row))

    def some(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, -1, n, *x.shape[2:]), 1, 0)

    def step(part: tuple[Array, Array, Array]) -> Array:
        return _by_queries(call, count, *part, bias)

    out = jax.lax.map(step, (some(q), some(k), some(v)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def chunked(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    bias: Float[Array, "B 1 T S"] | None = None,
    length: Int[Array, " B"] | None = None,
    *,
    budget: int | None = None,
) -> Float[Array, "B T N K"]:
    """softmax(q k^T / sqrt(K) + bias) v, softmax in float32, a part at a time.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the scores, equal for all heads.
        length: valid keys per sample.
        budget: bytes of scores at a time, or `LEAST` queries (default: those of the
            platform).
    """
    if budget is None:
        budget = CPU_BYTES if jax.default_backend() == "cpu" else OTHER_BYTES
    # Products by samples and heads take matrices that lie together.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(_in_chunks(budget, q, k, v, bias, length), 1, 2)

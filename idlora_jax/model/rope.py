"""Rotary position embeddings over seconds and pixels, negative times included.

With positions p (the middle of [start, end)), extent m and frequencies f_j the angle is

    angle_j = f_j (2 p / m - 1),   f_j = theta^(j / (n - 1)) pi / 2,   j = 0 .. n-1

for each of A axes, n = D // 2A. Angles of one frequency stand side by side, axis
fastest; where 2 A n < D the front is filled with the identity (cos 1, sin 0).
Frequencies are made on the host in float64; positions -> (cos, sin) is jitted, so a new
temporal offset, also a negative one, does not retrace.

Source: ltx_core/model/transformer/rope.py: precompute_freqs_cis.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from idlora_jax.types import Numerics

Kind = Literal["split", "interleaved"]


class Rope(NamedTuple):
    """cos and sin, each [B T N K/2]."""

    cos: Float[Array, "B T N K2"]
    sin: Float[Array, "B T N K2"]

    def of(self, rows: slice) -> Rope:
        """The tables of some tokens."""
        return Rope(self.cos[:, rows], self.sin[:, rows])


def frequencies(
    theta: float, count: int, *, float64: bool = True, numerics: Numerics = "exact"
) -> np.ndarray:
    """`count` frequencies as float32 [count].

    Args:
        theta: the largest frequency is `theta * pi / 2`.
        count: how many.
        float64: the checkpoint's own choice of grid; only `numerics="reference"`
            follows a float32 choice, "exact" always builds in float64.
        numerics: "reference" repeats the reference's float32 order of operations.

    Source: ltx_core/model/transformer/rope.py: generate_freq_grid_{np,pytorch}.
    """
    if float64 or numerics == "exact":
        grid = np.power(theta, np.linspace(0.0, 1.0, count)) * np.pi / 2
        return grid.astype(np.float32)
    step = np.float32(1.0) / np.float32(max(count - 1, 1))
    i = np.arange(count, dtype=np.float64)
    # Ascending from 0 in the first half, descending from 1 in the second, one rounding.
    line = np.where(i < count // 2, i * step, 1.0 - float(step) * (count - 1 - i))
    exponents = line.astype(np.float32)
    if count == 1:
        exponents = np.zeros(1, np.float32)
    grid = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return (grid * np.float32(np.pi)) / np.float32(2)


def _rounded(x: Array, bf16: bool) -> Array:
    # reduce_precision, since XLA may keep the excess precision of bf16 arithmetic.
    return jax.lax.reduce_precision(x, 8, 7) if bf16 else x


@functools.partial(jax.jit, static_argnames=("width", "heads"))
def _tables(
    pos: Array, freqs: Array, max_pos: Array, offset: Array, width: int, heads: int
) -> Rope:
    bf16 = pos.dtype == jnp.bfloat16
    pos = pos.astype(jnp.float32).at[:, 0].add(offset)
    middle = _rounded((pos[..., 0] + pos[..., 1]), bf16) / 2 if pos.ndim == 4 else pos
    # XLA turns division by a scalar into multiplication by its reciprocal, which
    # moves the phases by up to 2e-3; behind the barrier it sees an array and divides.
    extents = jnp.broadcast_to(max_pos[None, :, None], middle.shape)
    fraction = _rounded(middle / jax.lax.optimization_barrier(extents), bf16)
    centred = _rounded(_rounded(fraction * 2, bf16) - 1, bf16)
    angle = jnp.swapaxes(centred, 1, 2)[:, :, None, :] * freqs[None, None, :, None]
    angle = angle.reshape(*angle.shape[:2], -1)
    pad = ((0, 0), (0, 0), (width // 2 - angle.shape[-1], 0))
    cos = jnp.pad(jnp.cos(angle), pad, constant_values=1.0)
    sin = jnp.pad(jnp.sin(angle), pad)
    shape = (*angle.shape[:2], heads, width // 2 // heads)
    return Rope(cos.reshape(shape), sin.reshape(shape))


def tables(
    pos: Float[Array, "B A T ..."],
    max_pos: tuple[float, ...],
    *,
    width: int,
    heads: int,
    theta: float = 10000.0,
    float64: bool = True,
    numerics: Numerics = "exact",
    offset_s: float | Float[Array, ""] = 0.0,
) -> Rope:
    """Positions -> (cos, sin) in float32.

    Args:
        pos: [B A T 2] bounds (the middle is used) or [B A T] points; seconds on the
            first axis, pixels after it. bfloat16 positions are rounded after each step
            as the reference rounds them.
        max_pos: the extent of each axis.
        width: D, the width that is rotated.
        heads: N.
        theta: see the module.
        float64: see `frequencies`.
        numerics: see `frequencies`.
        offset_s: added to the times (traced: a new value does not recompile).

    Source: ltx_core/model/transformer/rope.py: precompute_freqs_cis.
    """
    if pos.shape[1] != len(max_pos):
        raise ValueError(
            f"rope.tables: got positions with {pos.shape[1]} axes, expected "
            f"{len(max_pos)} (the length of max_pos {max_pos})"
        )
    count = width // (2 * len(max_pos))
    freqs = frequencies(theta, count, float64=float64, numerics=numerics)
    extents = jnp.asarray(np.asarray(max_pos, np.float32))
    offset = jnp.asarray(offset_s, jnp.float32)
    return _tables(pos, jnp.asarray(freqs), extents, offset, width, heads)


def rotate(x: Float[Array, "B T D"], rope: Rope, kind: Kind) -> Float[Array, "B T D"]:
    """Rotate pairs of channels in each of the table's N heads.

    `split` pairs channel j of a head with j + K/2, `interleaved` 2j with 2j + 1.

    Source: ltx_core/model/transformer/rope.py: apply_rotary_emb.
    """
    heads, half = rope.cos.shape[-2:]
    h = x.reshape(*x.shape[:-1], heads, 2 * half)
    if kind == "split":
        a, b = h[..., :half], h[..., half:]
    else:
        a, b = h[..., 0::2], h[..., 1::2]
    out = (a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin)
    joined = (
        jnp.concatenate(out, axis=-1) if kind == "split" else jnp.stack(out, axis=-1)
    )
    return joined.reshape(x.shape).astype(x.dtype)

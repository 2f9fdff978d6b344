"""Adam whose two moments are held in 8 bits: a quarter of the memory.

A moment is cut into blocks of up to 256 neighbours along one axis. A block is held as
its largest absolute value s, in float32, and codes q of one byte:

    first moment    m = s sign(q) |q / 127|^3
    second moment   v = s (q / 255)^4

Small values keep relative precision: sqrt(v) down to 1.5e-5 of the largest, m to 5e-7.
Rounding is random and without bias, by the step's number. Rounding to the nearest code
would never let a value move that changes by less than half a code in a step, as each
second moment does: on a noisy quadratic the loss ended 1.4 times that of float32, with
random rounding 1.00 times (measured).

Codes have the parameter's own shape, so that they are divided over devices as it is.
Parameters of few elements keep float32.

Source: arXiv 2110.02861, section 2 (blocks, non-linear codes); AdamW as in optax.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped

BLOCK = 256
FEWEST = 4096
"""Elements from which a parameter's moments are held in 8 bits."""
_SIGNED, _UNSIGNED = 127, 255
_POWER = {_SIGNED: 3, _UNSIGNED: 4}
Moment = Any
"""Of one parameter: `Blocks`, or a float32 array."""


class Blocks(NamedTuple):
    """A quantised array.

    Attributes:
        codes: int8 (signed) or uint8, of the array's shape.
        scale: float32; the axis of blocks has one value for each.
    """

    codes: Shaped[Array, "*n"]
    scale: Float[Array, "*n"]


class State(NamedTuple):
    """Of `scale_by_adam`: number of updates, and a `Moment` for each parameter."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


def axis_of(shape: tuple[int, ...]) -> int:
    """The axis cut into blocks: the longer one of the last two."""
    last = len(shape) - 1
    return last - 1 if last > 0 and shape[-2] > shape[-1] else last


def _cut(x: Array, axis: int) -> Array:
    """[.. n ..] -> [.. blocks 256 ..], zeros behind."""
    n = x.shape[axis]
    size = min(BLOCK, n)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -n % size)
    shape = (*x.shape[:axis], -(-n // size), size, *x.shape[axis + 1 :])
    return jnp.pad(x, widths).reshape(shape)


def _uncut(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    whole = x.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(whole, 0, shape[axis], axis=axis)


def _value(code: Array, levels: int) -> Array:
    return (code / levels) ** _POWER[levels]


def _root(part: Array, levels: int) -> Array:
    """The inverse of `_value`, before rounding."""
    root = jnp.cbrt(part) if _POWER[levels] == 3 else jnp.sqrt(jnp.sqrt(part))
    return levels * root


def coins(shape: tuple[int, ...], seed: Int[Array, ""]) -> tuple[Array, Array]:
    """Two numbers in [0, 1) for each element, from its index and the seed.

    An integer hash, which is all that rounding needs: unlike `jax.random` it becomes
    part of the loop that uses it, and halves an update's temporary memory (measured).

    Source: lowbias32 of github.com/skeeto/hash-prospector.
    """
    x = seed.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) & 0xFFFFFFFF)
        x = x + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x = x ^ (x >> 16)
    return (x >> 16) / 65536.0, (x & 0xFFFF) / 65536.0  # pyright: ignore


def quantize(
    x: Float[Array, "*n"], coin: Float[Array, "*n"], *, signed: bool
) -> Blocks:
    """To 8 bits, each value to one of the two codes beside it, its mean exact.

    Args:
        x: at least one axis; 0 or more where not `signed`.
        coin: random numbers in [0, 1) that round up or down.
        signed: which of the two codes.
    """
    axis, levels = axis_of(x.shape), _SIGNED if signed else _UNSIGNED
    cut = _cut(x, axis)
    scale = jnp.max(jnp.abs(cut), axis=axis + 1, keepdims=True)
    part = jnp.abs(cut) / jnp.where(scale > 0, scale, 1.0)
    below = jnp.minimum(jnp.floor(_root(part, levels)), levels - 1)
    low, high = _value(below, levels), _value(below + 1, levels)
    code = below + (_cut(coin, axis) < (part - low) / (high - low))
    if not signed:
        # A second moment of 0 beside a first one that is not would divide by eps.
        code = jnp.where(part > 0, jnp.maximum(code, 1), 0)
    dtype = jnp.int8 if signed else jnp.uint8
    code = (jnp.sign(cut) * code).astype(dtype)
    return Blocks(_uncut(code, x.shape, axis), jnp.squeeze(scale, axis + 1))


def dequantize(blocks: Blocks) -> Float[Array, "*n"]:
    """Back to float32."""
    shape = blocks.codes.shape
    axis = axis_of(shape)
    signed = blocks.codes.dtype == jnp.int8
    code = _cut(blocks.codes, axis).astype(jnp.float32)
    value = _value(jnp.abs(code), _SIGNED if signed else _UNSIGNED)
    value = jnp.sign(code) * value * jnp.expand_dims(blocks.scale, axis + 1)
    return _uncut(value, shape, axis)


def _zeros(x: Any, *, signed: bool) -> Moment:
    """A moment at the start, on the devices that the parameter is on."""
    if math.prod(x.shape) < FEWEST:
        return jnp.zeros_like(x, jnp.float32)
    axis = axis_of(x.shape)
    one_each = jnp.max(_cut(x, axis), axis=axis + 1)
    codes = jnp.zeros_like(x, jnp.int8 if signed else jnp.uint8)
    return Blocks(codes, jnp.zeros_like(one_each, jnp.float32))


def _opened(moment: Moment) -> Array:
    return dequantize(moment) if isinstance(moment, Blocks) else moment


def _closed(x: Array, like: Moment, coin: Array, *, signed: bool) -> Moment:
    return quantize(x, coin, signed=signed) if isinstance(like, Blocks) else x


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments in 8 bits; an update is made before rounding.

    Args:
        b1: decay of the first moment.
        b2: decay of the second one.
        eps: added to the root of the second one.
    """

    def init(params: Any) -> State:
        mu = jax.tree.map(lambda p: _zeros(p, signed=True), params)
        nu = jax.tree.map(lambda p: _zeros(p, signed=False), params)
        return State(jnp.zeros((), jnp.int32), mu, nu)

    def update(grads: Any, state: State, params: Any = None) -> tuple[Any, State]:
        del params
        leaves, tree = jax.tree.flatten(grads)
        count = jnp.asarray(optax.safe_increment(state.count))
        done = []
        moments = map(tree.flatten_up_to, (state.mu, state.nu))
        for n, (g, mu, nu) in enumerate(zip(leaves, *moments, strict=True)):
            g = g.astype(jnp.float32)
            m = b1 * _opened(mu) + (1 - b1) * g
            v = b2 * _opened(nu) + (1 - b2) * g * g
            root = jnp.sqrt(v / (1 - b2**count)) + eps
            step = m / (1 - b1**count) / root
            first, second = coins(g.shape, count * len(leaves) + n)
            mu = _closed(m, mu, first, signed=True)
            nu = _closed(v, nu, second, signed=False)
            done.append((step, mu, nu))
        step, mu, nu = (tree.unflatten(part) for part in zip(*done, strict=True))
        return step, State(count, mu, nu)

    return optax.GradientTransformation(init, update)  # pyright: ignore

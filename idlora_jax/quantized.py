"""Kernels kept in 8 bits: what a stack of layers looks like when some are quantised.

`Quantized` is what float8 checkpoints hold, one scale per layer and only some layers:

    kernel[l] = values[row[l]] * scale[row[l]]      where row[l] >= 0
    kernel[l] = wide[-1 - row[l]]                   elsewhere

`Int8` is what we make, one scale per layer and output channel o, and all layers:

    kernel[l, i, o] = values[l, i, o] * scales[l, 0, o]

Both stand in a tree of parameters where a plain array would, with the same shape, so
what only looks at shapes takes them as they are. The forward pass cuts one layer out
(`layer`). It widens a layer of `Quantized`; a layer of `Int8` stays in its parts, since
a scale per output channel can follow the matrix product (`product`), so that no widened
kernel has to be in memory. `plain` widens what is not stacked. Memory holds one byte
per quantised parameter and at most one layer of widened ones.

Values of float8 are bytes until one layer is cut out: where XLA cannot slice float8, as
on CPU, it would widen the whole stack before the loop (2 bytes a parameter, measured).

Both candidates for a layer are cut out and one is selected: a branch on a value that
lives on the device would make the host wait for it once per kernel.

Source: ltx_core/quantization/fp8_scaled_mm.py: weight times weight_scale; LLM.int8(),
arXiv 2208.07339, section 2.1 (absolute-maximum quantisation, by column of the weight).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from idlora_jax import hosted
from idlora_jax.types import Tree


class Quantized(NamedTuple):
    """A parameter [L ...] of which some layers are quantised, or one [...] that is.

    Attributes:
        wide: the other layers [Lw ...], Lw >= 0; its dtype is what layers widen to.
        values: the quantised layers as bytes, uint8 [L8 ...]; L8 >= 1.
        like: [0], of the dtype that the bytes are read in, e.g. float8_e4m3fn.
        scale: float32 [L8], or None where values stand for themselves.
        input_scale: float32 [L8] or None; only kept for export.
        row: int32 [L]: a layer's row in `values`, or -1 minus its row in `wide`. A
            parameter that is not stacked has row 0 of rank 0.
    """

    wide: Any
    values: Any
    like: Any
    scale: Any
    input_scale: Any
    row: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the plain parameter."""
        return (*self.row.shape, *self.values.shape[1:])

    @property
    def ndim(self) -> int:
        """That of the plain parameter."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """What layers are widened to."""
        return self.wide.dtype


class Int8(NamedTuple):
    """A kernel [L I O], or [I O] of one layer, in int8.

    Attributes:
        values: int8 [L I O] in [-127, 127].
        scales: float32 [L 1 O], 0 or more.
        like: [0], of the dtype that the kernel widens to.
    """

    values: Any
    scales: Any
    like: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the plain parameter."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """That of the plain parameter."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """What the kernel is widened to."""
        return self.like.dtype


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is kept in 8 bits, for `is_leaf`."""
    return isinstance(node, Quantized | Int8)


def any_in(tree: Tree) -> bool:
    """Whether a tree has kernels kept in 8 bits."""
    return any(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))


def rows(quantized: np.ndarray) -> np.ndarray:
    """The `row` table, int32 [L], of layers of which a bool [L] says which are."""
    before = np.where(quantized, np.cumsum(quantized) - 1, -np.cumsum(~quantized))
    return before.astype(np.int32)


def _cut(stack: Array, index: Array) -> Array:
    """A row of a stack; of one in host memory, on the device."""
    return hosted.fetched(jax.lax.dynamic_index_in_dim(stack, index, keepdims=False))


def _at(q: Quantized, row: Int[Array, ""]) -> Array:
    """The parameter that a row stands for, widened."""
    narrow = jnp.maximum(row, 0)
    values = jax.lax.bitcast_convert_type(_cut(q.values, narrow), q.like.dtype)
    values = values.astype(jnp.float32)
    if q.scale is not None:
        values = values * _cut(q.scale, narrow)
    values = values.astype(q.dtype)
    if not q.wide.shape[0]:
        return values
    wide = _cut(q.wide, jnp.maximum(-1 - row, 0))
    return jax.lax.select(row >= 0, values, wide)


def layer(stack: Array | Quantized | Int8, index: Int[Array, ""]) -> Array | Int8:
    """One layer [...] of a stack [L ...]; one in int8 in its parts."""
    if isinstance(stack, Int8):
        parts = _cut(stack.values, index), _cut(stack.scales, index)
        return Int8(*parts, stack.like)
    if not isinstance(stack, Quantized):
        return _cut(stack, index)
    return _at(stack, _cut(stack.row, index))


def product(
    x: Float[Array, "... I"],
    kernel: Float[Array, "I O"] | Float[np.ndarray, "I O"] | Int8,
) -> Float[Array, "... O"]:
    """`x @ kernel` in the dtype of x; int8 is scaled after the product.

    Values up to 127 are exact in bfloat16, so that only scaling rounds.
    """
    if not isinstance(kernel, Int8):
        return x @ kernel.astype(x.dtype)
    y = (x @ kernel.values.astype(x.dtype)).astype(jnp.float32)
    scales = kernel.scales.reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * scales).astype(x.dtype)


def whole(node: Array | np.ndarray | Quantized | Int8) -> Array | np.ndarray:
    """The plain parameter, all layers widened."""
    if isinstance(node, Int8):
        wide = jnp.asarray(node.values).astype(jnp.float32) * node.scales
        return wide.astype(node.dtype)
    if not isinstance(node, Quantized):
        return node
    if node.row.ndim == 0:
        return _at(node, node.row)
    return jax.vmap(_at, in_axes=(None, 0))(node, node.row)


def plain(tree: Tree) -> Tree:
    """A tree with all that is kept in 8 bits widened."""
    return jax.tree.map(whole, tree, is_leaf=is_quantized)

"""Channel-last convolutions for the latent networks, in one to three dimensions.

Activations are [B *space C], kernels [*K I O]. Padding is explicit, one `Pad` per axis,
since the networks mix causal, replicated, reflected and zero borders. The computation
runs in the dtype of the activations; parameters are cast to it at use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from idlora_jax.types import Tree

Mode = Literal["zeros", "edge", "reflect", "wrap"]


@dataclass(frozen=True)
class Pad:
    """What one axis is extended by on each side, and with what."""

    before: int = 0
    after: int = 0
    mode: Mode = "zeros"


def pad(x: Float[Array, "B *X C"], pads: Sequence[Pad]) -> Float[Array, "B *Y C"]:
    """Extend the axes between batch and channels by their non-zero pads.

    Zero pads are left to the convolution, which needs no copy for them.
    """
    for axis, p in enumerate(pads, start=1):
        if p.mode != "zeros":
            widths = [(0, 0)] * x.ndim
            widths[axis] = (p.before, p.after)
            x = jnp.pad(x, widths, mode=p.mode)
    return x


def _numbers(ndim: int) -> tuple[str, str, str]:
    space = "DHW"[5 - ndim :]
    return f"N{space}C", f"{space}IO", f"N{space}C"


def conv(
    x: Float[Array, "B *X I"],
    kernel: Float[Array, "*K I O"],
    bias: Float[Array, " O"] | None,
    pads: Sequence[Pad],
    *,
    stride: int | tuple[int, ...] = 1,
    dilation: int = 1,
) -> Float[Array, "B *Y O"]:
    """Convolve; a stride or dilation that is one number holds along every axis."""
    space = x.ndim - 2
    strides = stride if isinstance(stride, tuple) else (stride,) * space
    zeros = [(p.before, p.after) if p.mode == "zeros" else (0, 0) for p in pads]
    y = jax.lax.conv_general_dilated(
        pad(x, pads),
        kernel.astype(x.dtype),
        strides,
        zeros,
        rhs_dilation=(dilation,) * space,
        dimension_numbers=_numbers(x.ndim),
    )
    if bias is None:
        return y
    return y + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def conv_transpose(
    x: Float[Array, "B T I"],
    kernel: Float[Array, "K I O"],
    bias: Float[Array, " O"],
    stride: int,
) -> Float[Array, "B N O"]:
    """Upsample along time: sample n adds `x[n] @ kernel` at `n * stride - crop`.

    `crop` is (K - stride) // 2, so that N = T * stride when K - stride is even.
    """
    size = kernel.shape[0]
    border = size - 1 - (size - stride) // 2
    y = jax.lax.conv_general_dilated(
        x,
        kernel[::-1].astype(x.dtype),
        (1,),
        [(border, border)],
        lhs_dilation=(stride,),
        dimension_numbers=_numbers(3),
    )
    return y + bias.astype(x.dtype)[None, None]


class Conv(nn.Module):
    """`conv` with its parameters, `kernel` and `bias` (unless `use_bias` is False)."""

    features: int
    size: tuple[int, ...]
    pads: tuple[Pad, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B *X I"]) -> Float[Array, "B *Y O"]:
        """Map the channels to `features`."""
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (self.features,)) if self.use_bias else None
        strides = {"stride": self.stride, "dilation": self.dilation}
        return conv(x, kernel, bias, self.pads, **strides)


class ConvTranspose(nn.Module):
    """`conv_transpose` with its parameters, `kernel` and `bias`."""

    features: int
    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B N O"]:
        """Map the channels to `features`, time to `stride` times as many."""
        shape = (self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv_transpose(x, kernel, bias, self.stride)


def init(
    module: nn.Module, key: PRNGKeyArray, shape: tuple[int, ...], *others: Any
) -> Tree:
    """Random float32 parameters of a module that maps an array of this shape.

    `others` are its further arguments, or things with their shapes.

    Kernels are normal with variance 1 / fan-in, biases 0. All kernels come from one
    draw: compiling a draw per shape takes fifteen times as long on CPU (measured).
    """
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(module.init, key, x, *others)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    draw = jax.random.normal(key, (sum(s.size for s in leaves),))
    out, start = [], 0
    for s in leaves:
        values = draw[start : start + s.size].reshape(s.shape)
        scale = math.prod(s.shape[:-1]) ** -0.5 if len(s.shape) > 1 else 0.0
        out.append(scale * values)
        start += s.size
    return jax.tree.unflatten(structure, out)


def run(
    module: Any, params: Tree, x: Float[Array, "B *X I"], *others: Any
) -> Float[Array, "B *Y O"]:
    """Apply a Linen module to one array, and its further arguments."""
    return module.apply({"params": params}, x, *others)

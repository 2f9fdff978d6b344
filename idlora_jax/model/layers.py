"""Layers shared by all networks: `Dense` is the only place where LoRA acts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt

from idlora_jax import quantized


def along_last(v: Array | np.ndarray, x: Float[Array, "... D"]) -> Array:
    """A vector over the last axis of `x`, in its rank and dtype."""
    return jnp.asarray(v, x.dtype).reshape((1,) * (x.ndim - 1) + v.shape)


def dropped(
    x: Float[Array, "... I"], key: UInt[Array, " _"], rate: Float[Array, ""]
) -> Float[Array, "... I"]:
    """Each value 0 with probability `rate`, else divided by 1 - rate."""
    stays = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
    return jnp.where(stays, x / (1 - rate).astype(x.dtype), 0)


class Dense(nn.Module):
    """`x @ kernel + bias`, plus `(x @ a) @ b` where the `lora` collection has the path.

    The computation runs in the dtype of `x`; parameters are cast to it at use. A kernel
    may be one layer in int8 (`quantized.Int8`).
    """

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Map the last axis from I to `features`."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        y = quantized.product(x, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + along_last(bias, y)
        if self.has_variable("lora", "kernel"):
            lora = self.get_variable("lora", "kernel")
            h = dropped(x, lora["key"], lora["rate"]) if "key" in lora else x
            y = y + (h @ lora["a"].astype(x.dtype)) @ lora["b"].astype(x.dtype)
        return y


def rms_norm(x: Float[Array, "... D"], eps: float = 1e-6) -> Float[Array, "... D"]:
    """Divide by the root mean square of the last axis (no weight), in float32."""
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return h.astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight per channel."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, self.eps) * along_last(scale, x)


class FeedForward(nn.Module):
    """Dense to `mult * D`, tanh GELU, Dense back to D."""

    mult: int = 4

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Map [... D] to [... D]."""
        h = Dense(self.mult * x.shape[-1], name="up")(x)
        h = checkpoint_name(h, "ff")
        return Dense(x.shape[-1], name="down")(jax.nn.gelu(h, approximate=True))

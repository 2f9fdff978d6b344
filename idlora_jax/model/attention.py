"""Attention with normalised queries and keys, per-head gates, and no mask tensors.

"Does not see the reference" is a slice of the keys made by the caller; "rows that see
no text" is the mean of the values (what a softmax over equal finite fills gives). So
the fast kernels, which take no masks, serve every shipped call; additive biases exist
for research and take the plain path.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from idlora_jax.config import BlindGradient
from idlora_jax.model.chunked import chunked
from idlora_jax.model.layers import Dense, RMSNorm
from idlora_jax.model.rope import Kind, Rope, rotate

Backend = Literal["auto", "xla", "cudnn"]


@functools.cache
def _note(choice: str, reason: str) -> None:
    logging.getLogger(__name__).info("attention: %s (%s)", choice, reason)


def _ineligible(q: Array, bias: Array | None) -> str | None:
    """Why cuDNN cannot take this call, or None."""
    if jax.default_backend() not in ("gpu", "cuda"):
        return f"no CUDA device, the backend is {jax.default_backend()}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 or float16, got {q.dtype}"
    capability = float(getattr(jax.devices()[0], "compute_capability", 0))
    widest = 256 if capability >= 9 else 128
    if q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"cuDNN takes head widths of 8k <= {widest} here, got {q.shape[-1]}"
    return None if bias is None else "an additive bias was given"


def choose(backend: Backend, q: Array, bias: Array | None) -> Literal["xla", "cudnn"]:
    """The kernel for one call; the choice and its reason are logged once.

    Raises:
        ValueError: if cuDNN is demanded and cannot take the call.
    """
    if backend == "xla":
        return "xla"
    reason = _ineligible(q, bias)
    if reason is None:
        _note("cudnn", "eligible")
        return "cudnn"
    if backend == "cudnn":
        raise ValueError(f"attention='cudnn': {reason}; use 'auto' or 'xla'")
    _note("xla", reason)
    return "xla"


def attend(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    *,
    bias: Float[Array, "B T S"] | None = None,
    length: Int[Array, " B"] | None = None,
    backend: Backend = "auto",
    chunks: bool = True,
) -> Float[Array, "B T N K"]:
    """softmax(q k^T / sqrt(K) + bias) v, softmax in float32.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the scores, equal for all heads.
        length: valid keys per sample; keys from there on are not seen.
        backend: `auto` takes cuDNN where it is eligible, else XLA.
        chunks: whether `chunked` takes the place of jax's own attention on XLA.
    """
    bias4 = None if bias is None else bias[:, None].astype(q.dtype)
    kernel = choose(backend, q, bias)
    if kernel == "xla" and chunks:
        return chunked(q, k, v, bias4, length)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=bias4,
        query_seq_lengths=None if length is None else jnp.full_like(length, q.shape[1]),
        key_value_seq_lengths=length,
        implementation=kernel,
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def blind(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N K"],
    gradient: BlindGradient = "softmax",
) -> Float[Array, "B T N K"]:
    """`attend` where one huge bias swallows every score: the mean of the values.

    The rounding that makes the scores equal is not differentiated, so that queries and
    keys have the gradient of a softmax at equal scores. `fused` multiplies the gradient
    by S: a fused kernel recomputes the probabilities in its backward pass from a stored
    log-sum-exp, in which the bias has swallowed log S, and gets 1 instead of 1 / S.

    Source: torch.nn.functional.scaled_dot_product_attention, which the reference calls.
    """
    mean = jnp.mean(v, axis=1, keepdims=True)
    return jnp.broadcast_to(mean, (*q.shape[:3], v.shape[-1]))


@blind.defjvp
def _blind_jvp(
    gradient: BlindGradient, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    (q, k, v), (dq, dk, dv) = primals, tangents
    mean = functools.partial(jnp.mean, axis=1, keepdims=True)
    centred = (v - mean(v)) / (v.shape[1] * q.shape[-1] ** 0.5)

    def through(q: Array, k: Array) -> Array:
        moved = jnp.einsum("bsnk,bsnc->bnkc", k, centred)
        return jnp.einsum("btnk,bnkc->btnc", q, moved)

    tangent = mean(dv) + through(dq, k) + through(q, dk)
    gain = v.shape[1] if gradient == "fused" else 1
    return blind(q, k, v, gradient), gain * tangent


def _reordered(
    order: Array, k: Array, v: Array, bias: Array | None
) -> tuple[Array, Array, Array | None]:
    """Keys, values and the columns of the bias in another order per sample."""
    rows = order[:, :, None, None]
    k, v = (jnp.take_along_axis(x, rows, axis=1) for x in (k, v))
    if bias is not None:
        bias = jnp.take_along_axis(bias, order[:, None], axis=2)
    return k, v, bias


class KeysValues(NamedTuple):
    """What queries attend to: [B S N K] each, keys normalised and rotated."""

    k: Any
    v: Any


class Attention(nn.Module):
    """Multi-head attention; q and k are normalised over the full inner width.

    Attributes:
        heads: N.
        head_dim: K.
        out_width: width of the result.
        gated: per-head gates 2 sigmoid(Dense(x)) on the attention output.
        rope: how pairs of channels are rotated.
        eps: of the norms.
        backend: see `attend`.
        chunks: see `attend`.

    Source: ltx_core/model/transformer/attention.py: Attention.
    """

    heads: int
    head_dim: int
    out_width: int
    gated: bool = False
    rope: Kind = "split"
    eps: float = 1e-6
    backend: Backend = "auto"
    chunks: bool = True

    def setup(self) -> None:
        """Create the projections, norms and the optional gate."""
        inner = self.heads * self.head_dim
        self.q, self.k, self.v = Dense(inner), Dense(inner), Dense(inner)
        self.q_norm, self.k_norm = RMSNorm(self.eps), RMSNorm(self.eps)
        self.out = Dense(self.out_width)
        if self.gated:
            self.gate = Dense(self.heads)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, self.head_dim)

    def _finish(self, x: Array, attended: Array) -> Array:
        # Before the gates, whose gradient reads it: it is not made again for them.
        attended = checkpoint_name(attended, "attention")
        if self.gated:
            gates = 2.0 * jax.nn.sigmoid(self.gate(x))
            attended = attended * gates[..., None]
        merged = attended.reshape(*attended.shape[:-2], self.heads * self.head_dim)
        return self.out(merged)

    def values_only(self, x: Float[Array, "B T D"]) -> Float[Array, "B T O"]:
        """Self-attention that is skipped but passes its values through."""
        return self._finish(x, self._heads(self.v(x)))

    def keys_values(
        self, context: Float[Array, "B S E"], rope: Rope | None = None
    ) -> KeysValues:
        """What others attend to in `context`; `rope` rotates the keys."""
        k = self.k_norm(self.k(context))
        if rope is not None:
            k = rotate(k, rope, self.rope)
        return KeysValues(self._heads(k), self._heads(self.v(context)))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: KeysValues | None = None,
        *,
        rope: Rope | None = None,
        bias: Float[Array, "B T S"] | None = None,
        length: Int[Array, " B"] | None = None,
        order: Int[Array, "B S"] | None = None,
        blind_from: int | None = None,
        blind_gradient: BlindGradient = "softmax",
        passes: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B T O"]:
        """Attend from `x` to what is `seen` (default: `x` itself).

        Args:
            x: query side.
            seen: from `keys_values`.
            rope: rotates the queries (and the keys of `x` itself).
            bias: additive scores bias.
            length: valid keys per sample.
            order: keys per sample with the valid ones first, where they lie otherwise.
            blind_from: query rows from here on get the mean of the values.
            blind_gradient: see `blind`.
            passes: samples that get their own values instead, as of `values_only`.
        """
        k, v = self.keys_values(x, rope) if seen is None else seen
        own, q = v, self.q_norm(self.q(x))
        if rope is not None:
            q = rotate(q, rope, self.rope)
        q = self._heads(q)
        if order is not None:
            k, v, bias = _reordered(order, k, v, bias)
        sees = slice(blind_from)
        bias = None if bias is None else bias[:, sees]
        how = {"backend": self.backend, "chunks": self.chunks}
        out = attend(q[:, sees], k, v, bias=bias, length=length, **how)
        if blind_from is not None:
            mean = blind(q[:, blind_from:], k, v, blind_gradient)
            out = jnp.concatenate([out, mean], axis=1)
        if passes is not None:
            out = jnp.where(passes[:, None, None, None], own, out)
        return self._finish(x, out)

"""The Gemma-3 text tower, returning every hidden state.

Token ids [B S], padded on the left, become L + 1 states [B S D]:

    h_0 = sqrt(D) E[ids]
    h_l = layer_l(h_{l-1}),   l = 1 .. L

given as h_0 .. h_{L-1}, norm(h_L). A layer is x += n2(attention(n1(x))), then
x += n4(mlp(n3(x))), with RMS norms n of weight 1 + scale. A global layer sees all
earlier tokens, a local one the last `window`; they differ also in their rotary base and
in a divisor of the positions, which count from the first column, padding included. All
layers run in one scan over the layer index; the kind of layer is scanned data, so there
is one layer body to compile.

Data flow: tokenize -> `hidden_states` -> text_connector.features -> connect -> Prompt.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from idlora_jax.config_text import TextEncoderConfig
from idlora_jax.model.layers import Dense, rms_norm
from idlora_jax.types import Tree


class OffsetNorm(nn.Module):
    """RMS norm times `1 + scale`, rounded once to the dtype of its input."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalise the last axis."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        weight = 1 + jnp.expand_dims(scale, range(x.ndim - 1)).astype(jnp.float32)
        return (rms_norm(x.astype(jnp.float32), self.eps) * weight).astype(x.dtype)


def rope_table(
    length: int, head_dim: int, theta: float, factor: float
) -> Float[np.ndarray, "2 S K2"]:
    """cos and sin of `p / factor * theta^(-2j / K)` for positions p, from float64."""
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim) / factor
    angle = np.arange(length)[:, None] * frequency[None, :]
    return np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


def rotate(
    x: Float[Array, "B S N K"], table: Float[Array, "2 S K2"]
) -> Float[Array, "B S N K"]:
    """Rotate channel j with channel j + K/2 of every head."""
    cos, sin = table[:, None, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class SelfAttention(nn.Module):
    """Grouped-query attention with per-head norms of queries and keys."""

    cfg: TextEncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        table: Float[Array, "2 S K2"],
        seen: Bool[Array, "B S S"],
    ) -> Float[Array, "B S D"]:
        """Attend to the keys `seen` (True) by each query."""
        cfg = self.cfg

        def project(name: str, heads: int) -> Array:
            y = Dense(heads * cfg.head_dim, use_bias=False, name=name)(x)
            return y.reshape(*x.shape[:-1], heads, cfg.head_dim)

        q = OffsetNorm(cfg.norm_eps, name="q_norm")(project("q", cfg.heads))
        k = OffsetNorm(cfg.norm_eps, name="k_norm")(project("k", cfg.kv_heads))
        # Softmax in float32; hidden keys get a finite score, so that rows that see
        # nothing (padding) stay finite.
        out = jax.nn.dot_product_attention(
            rotate(q, table),
            rotate(k, table),
            project("v", cfg.kv_heads),
            mask=seen[:, None],
            scale=cfg.query_scalar**-0.5,
            implementation="xla",
        )
        merged = out.reshape(*x.shape[:-1], cfg.heads * cfg.head_dim)
        return Dense(cfg.width, use_bias=False, name="out")(merged)


class GatedMLP(nn.Module):
    """gelu(gate(x)) * up(x), then down; tanh form of the GELU."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Map [B S D] to [B S D]."""
        gate = Dense(self.width, use_bias=False, name="gate")(x)
        up = Dense(self.width, use_bias=False, name="up")(x)
        down = Dense(x.shape[-1], use_bias=False, name="down")
        return down(jax.nn.gelu(gate, approximate=True) * up)


class Layer(nn.Module):
    """One layer: each branch is normalised going in and coming out."""

    cfg: TextEncoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        table: Float[Array, "2 S K2"],
        seen: Bool[Array, "B S S"],
    ) -> Float[Array, "B S D"]:
        """Apply attention and MLP."""
        norm = functools.partial(OffsetNorm, self.cfg.norm_eps)
        attend = SelfAttention(self.cfg, name="attn")
        mlp = GatedMLP(self.cfg.mlp_width, name="mlp")
        x = x + norm(name="attn_post")(attend(norm(name="attn_pre")(x), table, seen))
        return x + norm(name="mlp_post")(mlp(norm(name="mlp_pre")(x)))


def init(cfg: TextEncoderConfig, key: Array) -> dict[str, Any]:
    """Random parameters: `embed`, `layers` (stacked on a leading axis), `norm`."""
    embed_key, layers_key = jax.random.split(key)
    table = jnp.zeros((2, 1, cfg.head_dim // 2))
    args = (jnp.zeros((1, 1, cfg.width)), table, jnp.ones((1, 1, 1), bool))
    layers = jax.vmap(lambda k: Layer(cfg).init(k, *args)["params"])(
        jax.random.split(layers_key, cfg.layers)
    )
    embedding = 0.02 * jax.random.normal(embed_key, (cfg.vocab, cfg.width))
    norm = {"scale": jnp.zeros(cfg.width)}
    return {"embed": {"embedding": embedding}, "layers": layers, "norm": norm}


def visibility(
    valid: Bool[Array, "B S"], window: int | None = None
) -> Bool[Array, "B S S"]:
    """True where query (second axis) sees key (last axis): causal, valid, in window."""
    step = jnp.arange(valid.shape[1])
    behind = step[:, None] - step[None, :]
    near = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return near[None] & valid[:, None, :]


def hidden_states(
    cfg: TextEncoderConfig,
    params: Tree,
    ids: Int[ArrayLike, "B S"],
    mask: Bool[ArrayLike, "B S"] | Int[ArrayLike, "B S"],
) -> Float[Array, "L1 B S D"]:
    """All L + 1 states, in the dtype of the embedding table.

    Args:
        cfg: the tower.
        params: as from `init`.
        ids: token ids, padded on the left.
        mask: True (1) for tokens, False (0) for padding.

    Returns:
        The scaled embeddings, the outputs of layers 1 .. L-1, the normalised output of
        the last; rows of padding are zero.

    Source: transformers, models/gemma3: Gemma3TextModel with output_hidden_states;
    ltx_core/text_encoders/gemma/encoders/base_encoder.py: encode.
    """
    embedding = params["embed"]["embedding"]
    valid = jnp.asarray(mask).astype(bool)
    length, dim = valid.shape[1], cfg.head_dim
    x = embedding[jnp.asarray(ids)] * jnp.asarray(math.sqrt(cfg.width), embedding.dtype)
    everything, nearby = visibility(valid), visibility(valid, cfg.window)
    global_table = rope_table(length, dim, cfg.global_theta, cfg.global_rope_factor)
    local_table = rope_table(length, dim, cfg.local_theta, cfg.local_rope_factor)

    def step(x: Array, layer: tuple[Array, Array]) -> tuple[Array, Array]:
        index, is_global = layer
        # Indexing inside the scan: a stack that is sliced outside would be copied.
        own = jax.tree.map(
            lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False),
            params["layers"],
        )
        table = jnp.where(is_global, global_table, local_table)
        seen = jnp.where(is_global, everything, nearby)
        return Layer(cfg).apply({"params": own}, x, table, seen), x  # pyright: ignore

    scanned = (jnp.arange(cfg.layers), jnp.asarray(cfg.is_global))
    last, states = jax.lax.scan(step, x, scanned)
    last = OffsetNorm(cfg.norm_eps).apply({"params": params["norm"]}, last)
    states = jnp.concatenate([states, last[None]])  # pyright: ignore
    return jnp.where(valid[None, :, :, None], states, jnp.zeros((), states.dtype))

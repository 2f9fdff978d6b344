"""Hidden states of the text encoder -> the prompt the transformer attends to.

Two steps, since the result of the first is what a data set stores:

1. `features`: the L + 1 states of a token are normalised, set side by side (index
   d * (L + 1) + l) and projected. Generation 2.0 ("range") takes, per sample and state,
   8 (x - mean) / (max - min) over all valid tokens and channels, and one projection
   serves both modalities. 2.3 ("rms") divides each token's state by its root mean
   square, times sqrt(D_out / D), and has a projection for each modality.
2. `connect`: valid tokens move to the front, learned registers fill the rest (position
   p takes register p mod n), and a small transformer with 1-D rotary positions runs
   over all S tokens, once for video and once for audio. Every token is then valid.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from idlora_jax.config_text import ConnectorConfig, TextConnectorConfig
from idlora_jax.model import rope
from idlora_jax.model.attention import Attention
from idlora_jax.model.layers import Dense, FeedForward, rms_norm
from idlora_jax.types import AV, Numerics, Prompt, Tree, each

_EPS = 1e-6


class ConnectorBlock(nn.Module):
    """Self-attention and feed-forward, each after a weightless RMS norm."""

    cfg: TextConnectorConfig
    own: ConnectorConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], table: rope.Rope
    ) -> Float[Array, "B S D"]:
        """Apply both branches; `table` rotates queries and keys."""
        attend = Attention(
            heads=self.own.heads,
            head_dim=self.own.head_dim,
            out_width=self.own.width,
            gated=self.cfg.gated_attention,
            rope=self.cfg.rope,
            eps=_EPS,
            name="attn",
        )
        x = x + attend(rms_norm(x, _EPS), rope=table)
        return x + FeedForward(name="ff")(rms_norm(x, _EPS))


def _table(
    cfg: TextConnectorConfig, own: ConnectorConfig, length: int, numerics: Numerics
) -> rope.Rope:
    """cos and sin of the token index; no token is in the middle of anything here."""
    return rope.tables(
        jnp.arange(length, dtype=jnp.float32)[None, None],
        (cfg.max_pos,),
        width=own.width,
        heads=own.heads,
        float64=cfg.rope_float64,
        numerics=numerics,
    )


def _init_projection(cfg: TextConnectorConfig, key: Array) -> dict[str, Any]:
    flat = jnp.zeros((1, cfg.text_width * cfg.text_states))
    if cfg.features == "range":
        dense = Dense(cfg.text_width, use_bias=False)
        return {"shared": dense.init(key, flat)["params"]}
    widths = {"video": cfg.video.width, "audio": cfg.audio.width}
    keys = zip(widths, jax.random.split(key), strict=True)
    return {name: Dense(widths[name]).init(k, flat)["params"] for name, k in keys}


def _init_connector(
    cfg: TextConnectorConfig, own: ConnectorConfig, key: Array
) -> dict[str, Any]:
    block_key, register_key = jax.random.split(key)
    block, x = ConnectorBlock(cfg, own), jnp.zeros((1, 1, own.width))
    table = _table(cfg, own, 1, "exact")
    blocks = jax.vmap(lambda k: block.init(k, x, table)["params"])(
        jax.random.split(block_key, own.layers)
    )
    size = (cfg.registers, own.width)
    registers = jax.random.uniform(register_key, size, minval=-1.0)
    return {"registers": registers, "blocks": blocks}


def init(cfg: TextConnectorConfig, key: Array) -> dict[str, Any]:
    """Random parameters: `projection`, and per modality `registers` and `blocks`.

    `projection` holds `shared` ("range") or `video` and `audio` ("rms").
    """
    first, *rest = jax.random.split(key, 3)
    sizes = AV(cfg.video, cfg.audio)
    both = each(lambda own, k: _init_connector(cfg, own, k), sizes, AV(*rest))
    return {"projection": _init_projection(cfg, first), **both._asdict()}


def normalise_range(
    hidden: Float[Array, "L1 B S D"], valid: Bool[Array, "B S"]
) -> Float[Array, "L1 B S D"]:
    """8 (x - mean) / (max - min) per sample and state over valid tokens, in float32.

    Source: ltx_core/text_encoders/gemma/encoders/base_encoder.py (2.0):
    _norm_and_concat_padded_batch.
    """
    x, keep = hidden.astype(jnp.float32), valid[None, :, :, None]

    def over(reduce: Any, fill: float) -> Array:
        return reduce(jnp.where(keep, x, fill), axis=(2, 3), keepdims=True)

    count = valid.sum(axis=1)[None, :, None, None] * x.shape[-1]
    mean = over(jnp.sum, 0.0) / (count + _EPS)
    extent = over(jnp.max, -jnp.inf) - over(jnp.min, jnp.inf)
    return 8 * (x - mean) / (extent + _EPS)


def _check_states(cfg: TextConnectorConfig, shape: tuple[int, ...]) -> None:
    if (shape[0], shape[-1]) != (cfg.text_states, cfg.text_width):
        raise ValueError(
            f"text features: got {shape[0]} states of width {shape[-1]}, expected "
            f"{cfg.text_states} of width {cfg.text_width}; the checkpoint needs the "
            "text encoder it was trained with (gemma-3-12b-it for LTX-2)"
        )


def features(
    cfg: TextConnectorConfig,
    params: Tree,
    hidden: Float[ArrayLike, "L1 B S D"],
    mask: Bool[ArrayLike, "B S"] | Int[ArrayLike, "B S"],
) -> AV:
    """Normalise and project the states: what a data set stores for a caption.

    Args:
        cfg: the connectors.
        params: as from `init`.
        hidden: all states of the text encoder.
        mask: True (1) for tokens, False (0) for padding, whose content is not read.

    Returns:
        AV of [B S D_out] in the dtype of `hidden`; under "range" both are one array.
        Rows of padding hold the projection's bias (zero without one).

    Raises:
        ValueError: if the states are not those of the expected text encoder.

    Source: ltx_core/text_encoders/gemma/feature_extractor.py: FeatureExtractorV1, V2.
    """
    hidden, valid = jnp.asarray(hidden), jnp.asarray(mask).astype(bool)
    _check_states(cfg, hidden.shape)
    ranged = cfg.features == "range"
    x = normalise_range(hidden, valid) if ranged else rms_norm(hidden, _EPS)
    x = jnp.where(valid[None, :, :, None], x, 0.0).astype(hidden.dtype)
    x = jnp.moveaxis(x, 0, -1).reshape(*valid.shape, -1)
    projection = params["projection"]
    if ranged:
        dense = Dense(cfg.text_width, use_bias=False)
        shared = dense.apply({"params": projection["shared"]}, x)
        return AV(shared, shared)

    def project(own: ConnectorConfig, p: Tree) -> Array:
        scaled = x * math.sqrt(own.width / cfg.text_width)
        return Dense(own.width).apply({"params": p}, scaled)  # pyright: ignore

    sizes = AV(cfg.video, cfg.audio)
    return each(project, sizes, AV(projection["video"], projection["audio"]))


def fill_padding(
    x: Float[Array, "B S D"],
    valid: Bool[Array, "B S"],
    registers: Float[Array, "R D"],
) -> Float[Array, "B S D"]:
    """Valid tokens first, in order; position p behind them is register p mod R.

    Source: ltx_core/text_encoders/gemma/embeddings_connector.py:
    Embeddings1DConnector._replace_padded_with_learnable_registers.
    """
    order = jnp.argsort(~valid, axis=1, stable=True)
    front = jnp.take_along_axis(x, order[..., None], axis=1)
    position = jnp.arange(x.shape[1])
    filler = registers.astype(x.dtype)[position % registers.shape[0]]
    taken = position[None, :] < valid.sum(axis=1)[:, None]
    return jnp.where(taken[..., None], front, filler[None])


def connect(
    cfg: TextConnectorConfig,
    params: Tree,
    features: AV,
    mask: Bool[ArrayLike, "B S"] | Int[ArrayLike, "B S"],
    *,
    numerics: Numerics = "exact",
) -> Prompt:
    """Run the connectors on features; any batch, each sample for itself.

    Args:
        cfg: the connectors.
        params: as from `init`.
        features: AV of [B S D], padded on the left; a modality may be None.
        mask: True (1) for tokens, False (0) for padding, whose content is not read.
        numerics: how the rotary frequencies are built.

    Returns:
        Prompt of [B S D] and [B S Da]; its mask is None: all S tokens are valid.

    Source: ltx_core/text_encoders/gemma/embeddings_connector.py: Embeddings1DConnector.
    """
    valid = jnp.asarray(mask).astype(bool)

    def one(x: Array, own: ConnectorConfig, p: Tree) -> Array:
        x = fill_padding(jnp.asarray(x), valid, jnp.asarray(p["registers"]))
        table = _table(cfg, own, x.shape[1], numerics)

        def step(x: Array, index: Array) -> tuple[Array, None]:
            layer = jax.tree.map(
                lambda w: jax.lax.dynamic_index_in_dim(w, index, keepdims=False),
                p["blocks"],
            )
            block = ConnectorBlock(cfg, own)
            return block.apply({"params": layer}, x, table), None  # pyright: ignore

        out, _ = jax.lax.scan(step, x, jnp.arange(own.layers))
        return rms_norm(out, _EPS)

    sizes = AV(cfg.video, cfg.audio)
    return Prompt(*each(one, features, sizes, AV(params["video"], params["audio"])))

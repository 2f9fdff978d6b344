"""The video VAE: pixels [B F H W 3] in [-1, 1] <-> latents [B f h w C], normalised.

    encode  pixels -> 4x4 patches as channels -> blocks -> means -> (x - mean) / std
    decode  x * std + mean -> blocks -> patches back to pixels

The blocks are in `video_blocks`. F = 8k + 1 frames become f = k + 1 latent frames, the
first of which stands for the first frame alone. The encoder is causal: convolutions see
the past, extended by repeating the first frame, and a halving first repeats that frame.
The decoder sees both sides (unless the file says causal), and drops the first frame
after each doubling.

A decoder may be a last denoising step: it mixes noise into the latent, is told the
timestep, and injects noise between its layers. All of it comes in as `Draws`, from
`draw` or recorded.

Long or large clips go through tiles: see `video_tiles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, PRNGKeyArray, UInt8

from idlora_jax.config_video_vae import VideoVAEConfig
from idlora_jax.model import conv
from idlora_jax.model.conv import Conv
from idlora_jax.model.ends import timestep_frequencies
from idlora_jax.model.video_blocks import (
    SIZE,
    Down,
    Maps,
    Style,
    TimeEmbedding,
    Up,
    modulation,
    normed,
    run_block,
)
from idlora_jax.types import Tree

DECODE_TIMESTEP = 0.05
"""The noise level that a timestep-conditioned decoder is told, unless given."""
DECODE_NOISE = 0.025
"""How much of the latent such a decoder replaces with noise."""
TIMESTEP_SCALE = 1000.0


class Draws(NamedTuple):
    """The noise that a decoder uses, normal with unit variance.

    `latent` [B f h w C] is mixed into the latent (None where the decoder has no
    timestep); `maps` are injected one after the other, the same for all frames and
    clips, each [k h, k w] with k from `VideoVAEConfig.noise_factors`.
    """

    latent: Float[Array, "B f h w C"] | None
    maps: tuple[Float[Array, "_ _"], ...]


def draw(key: PRNGKeyArray, cfg: VideoVAEConfig, shape: tuple[int, ...]) -> Draws:
    """Draw what decoding a latent of this shape [B f h w C] needs; often nothing."""
    sizes = [(n * shape[2], n * shape[3]) for n in cfg.noise_factors]
    if not cfg.timestep_conditioning:
        return Draws(None, _normal(key, sizes))
    latent, *maps = _normal(key, [shape, *sizes])
    return Draws(latent, tuple(maps))


def _normal(
    key: PRNGKeyArray, shapes: Sequence[tuple[int, ...]]
) -> tuple[Float[Array, "*_"], ...]:
    keys = jax.random.split(key, len(shapes)) if shapes else ()
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


class Encoder(nn.Module):
    """Pixels [B F H W 3] -> means and log-variances [B f h w C+]."""

    cfg: VideoVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        """Encode without normalising."""
        cfg = self.cfg
        style = Style(True, cfg.encoder_padding, cfg.norm)
        pattern = "b f (h q) (w r) c -> b f h w (c r q)"
        h = rearrange(x, pattern, q=cfg.patch, r=cfg.patch)
        h = Conv(cfg.latent_channels, SIZE, style.pads, name="conv_in")(h)
        for n, block in enumerate(cfg.encoder):
            h = run_block(block, h, style=style, name=f"blocks_{n}", resample=Down)
        features = cfg.latent_channels + cfg.log_var_channels
        h = jax.nn.silu(normed(h, cfg.norm, "norm_out"))
        return Conv(features, SIZE, style.pads, name="conv_out")(h)


class Decoder(nn.Module):
    """Latents [B f h w C], not normalised -> pixels [B F H W 3]."""

    cfg: VideoVAEConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F H W I"],
        timestep: Float[Array, " B"] | None = None,
        maps: Maps = (),
    ) -> Float[Array, "B f h w O"]:
        """Decode, unclamped; `timestep` and `maps` where the config asks for them."""
        cfg = self.cfg
        style = Style(cfg.causal_decoder, cfg.decoder_padding, cfg.norm)
        t = None if timestep is None else self._sinusoids(timestep).astype(x.dtype)
        h = Conv(cfg.decoder_width, SIZE, style.pads, name="conv_in")(x)
        for n, block in enumerate(cfg.decoder):
            count = block.maps
            own, maps = maps[:count], maps[count:]
            more = {"sinusoids": t, "maps": own, "resample": Up}
            h = run_block(block, h, style=style, name=f"blocks_{n}", **more)
        h = normed(h, cfg.norm, "norm_out")
        if t is not None:
            table = self.param("table", nn.initializers.zeros, (2, h.shape[-1]))
            embedded = TimeEmbedding(2 * h.shape[-1], name="time")(t)
            shift, scale = modulation(table, embedded)
            h = h * (1 + scale) + shift
        features = cfg.out_channels * cfg.patch**2
        h = Conv(features, SIZE, style.pads, name="conv_out")(jax.nn.silu(h))
        pattern = "b f h w (c r q) -> b f (h q) (w r) c"
        return rearrange(h, pattern, q=cfg.patch, r=cfg.patch)

    def _sinusoids(self, timestep: Float[Array, " B"]) -> Float32[Array, "B E"]:
        scale = self.param("timestep_scale", nn.initializers.ones, ())
        scaled = timestep.astype(jnp.float32) * scale.astype(jnp.float32)
        angle = scaled[:, None] * jnp.asarray(timestep_frequencies())[None]
        return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _known(path: Sequence[Any], leaf: Array) -> Array:
    """Parameters that do not start at random."""
    name = str(path[-1].key)
    if name == "scale":
        return jnp.ones_like(leaf)
    return jnp.full_like(leaf, TIMESTEP_SCALE) if name == "timestep_scale" else leaf


def init(cfg: VideoVAEConfig, key: PRNGKeyArray) -> dict[str, Tree]:
    """Random parameters, float32: `encoder`, `decoder`, `stats`."""
    side = cfg.space_factor
    encoder_key, decoder_key = jax.random.split(key)
    pixels = (1, 1, side, side, cfg.in_channels)
    latent = (1, 1, 1, 1, cfg.latent_channels)
    like = jax.eval_shape(lambda k: draw(k, cfg, latent), key)
    timestep = jax.ShapeDtypeStruct((1,), jnp.float32)
    more = (timestep if cfg.timestep_conditioning else None, like.maps)
    decoder = conv.init(Decoder(cfg), decoder_key, latent, *more)
    stats = {n: jnp.ones(cfg.latent_channels) for n in cfg.statistics}
    return {
        "encoder": jax.tree_util.tree_map_with_path(
            _known, conv.init(Encoder(cfg), encoder_key, pixels)
        ),
        "decoder": jax.tree_util.tree_map_with_path(_known, decoder),
        "stats": stats | {"mean": jnp.zeros(cfg.latent_channels)},
    }


def normalize(
    stats: Tree, latent: Float[Array, "B f h w C"]
) -> Float[Array, "B f h w C"]:
    """(latent - mean) / std per channel: what the transformer sees."""
    mean, std = (stats[n].astype(latent.dtype) for n in ("mean", "std"))
    return (latent - mean[None, None, None, None]) / std[None, None, None, None]


def unnormalize(
    stats: Tree, latent: Float[Array, "B f h w C"]
) -> Float[Array, "B f h w C"]:
    """Latent * std + mean per channel: the inverse of `normalize`."""
    mean, std = (stats[n].astype(latent.dtype) for n in ("mean", "std"))
    return latent * std[None, None, None, None] + mean[None, None, None, None]


def check_pixels(cfg: VideoVAEConfig, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a video of this shape [B F H W C] can be encoded."""
    frames, *sides = shape[1:4]
    step, unit = cfg.time_factor, cfg.space_factor
    if frames < 1 or (frames - 1) % step:
        nearest = 1 + step * max(0, round((frames - 1) / step))
        raise ValueError(
            f"video_vae.encode: frames must be {step}k+1, got {frames} (use {nearest}, "
            "or crop_frames)"
        )
    for name, side in zip(("height", "width"), sides, strict=True):
        if side < unit or side % unit:
            nearest = unit * max(1, round(side / unit))
            raise ValueError(
                f"video_vae.encode: {name} must be a multiple of {unit}, got {side} "
                f"(use {nearest})"
            )


def crop_frames(
    cfg: VideoVAEConfig, video: Float[Array, "B F H W I"]
) -> Float[Array, "B G H W I"]:
    """Drop the last frames, down to the next valid count (8k+1).

    Source: `ltx_core/model/video_vae/video_vae.py: VideoEncoder.forward` (2.3).
    """
    return video[:, : video.shape[1] - (video.shape[1] - 1) % cfg.time_factor]


def encode(
    cfg: VideoVAEConfig, params: Tree, video: Float[Array, "B F H W I"]
) -> Float[Array, "B f h w C"]:
    """Encode to the normalised means of the latent distribution.

    Args:
        cfg: static.
        params: needs `encoder` and `stats`.
        video: pixels in [-1, 1]; F = 8k+1 frames, sides multiples of 32.

    Returns:
        Latents with f = (F-1)/8 + 1, h = H/32, w = W/32, in the dtype of `video`.

    Raises:
        ValueError: naming the nearest valid size.

    Source: `ltx_core/model/video_vae/video_vae.py: VideoEncoder`.
    """
    check_pixels(cfg, video.shape)
    moments = conv.run(Encoder(cfg), params["encoder"], video)
    return normalize(params["stats"], moments[..., : cfg.latent_channels])


def check_latent(
    cfg: VideoVAEConfig, shape: tuple[int, ...], draws: Draws | None
) -> None:
    """Raise ValueError unless a latent of this shape [B f h w C] can be decoded."""
    if shape[-1] != cfg.latent_channels:
        raise ValueError(
            f"video_vae.decode: latent must be [B f h w {cfg.latent_channels}], "
            f"got shape {shape}"
        )
    expected = jax.eval_shape(lambda: draw(jax.random.key(0), cfg, shape))
    noises = (draws or Draws(None, ()), expected)
    got, want = ([x.shape for x in jax.tree.leaves(noise)] for noise in noises)
    if got != want:
        raise ValueError(
            f"video_vae.decode: this decoder needs noise of shapes {want}, got {got} "
            "(use video_vae.draw)"
        )


def _mixed(
    latent: Float[Array, "B f h w C"], noise: Float[Array, "B f h w C"]
) -> Float[Array, "B f h w C"]:
    return DECODE_NOISE * noise.astype(latent.dtype) + (1 - DECODE_NOISE) * latent


def decode(
    cfg: VideoVAEConfig,
    params: Tree,
    latent: Float[Array, "B f h w C"],
    *,
    draws: Draws | None = None,
    timestep: Float[Array, " B"] | None = None,
) -> Float[Array, "B F H W O"]:
    """Decode normalised latents to pixels, around [-1, 1] but not clamped.

    Args:
        cfg: static.
        params: needs `decoder` and `stats`.
        latent: as `encode` gives them.
        draws: the noise, from `draw`; None for a decoder that uses none.
        timestep: noise level in [0, 1] that a conditioned decoder is told; by default
            `DECODE_TIMESTEP`.

    Returns:
        Video with F = 8(f-1)+1, H = 32h, W = 32w, in the dtype of `latent`.

    Raises:
        ValueError: if the latent has another number of channels, or the decoder needs
            other noise than given.

    Source: `ltx_core/model/video_vae/video_vae.py: VideoDecoder`.
    """
    check_latent(cfg, latent.shape, draws)
    draws = draws or Draws(None, ())
    if not cfg.timestep_conditioning:
        timestep = None
    elif timestep is None:
        timestep = jnp.full(latent.shape[:1], DECODE_TIMESTEP, jnp.float32)
    if draws.latent is not None:
        latent = _mixed(latent, draws.latent)
    h = unnormalize(params["stats"], latent)
    return conv.run(Decoder(cfg), params["decoder"], h, timestep, draws.maps)


def to_uint8(video: Float[Array, "B F H W C"]) -> UInt8[Array, "B F H W C"]:
    """Pixels in [-1, 1], clamped, to 0..255; fractions are cut off, not rounded.

    Source: `ltx_core/model/video_vae/video_vae.py: decode_video`.
    """
    return (jnp.clip((video + 1) / 2, 0, 1) * 255).astype(jnp.uint8)

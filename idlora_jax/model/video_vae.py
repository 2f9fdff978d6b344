"""The video VAE: pixels [B F H W 3] in [-1, 1] <-> latents [B f h w C], normalised.

    encode  pixels -> 4x4 patches as channels -> stages -> means -> (x - mean) / std
    decode  x * std + mean -> stages -> patches back to pixels

A stage is residual blocks (pixel norm, SiLU, 3x3x3 convolution, twice) or a resampling.
Resampling rearranges instead of striding: after a convolution, blocks of p x q x r
cells become channels (down) or channels become such blocks (up). On the way down, and
on the way up where the file says so, the input rearranged alike is added: as the mean
of channel groups, or repeated, so that its channel count fits.

Time. F = 8k + 1 frames become f = k + 1 latent frames, the first of which stands for
the first frame alone. The encoder is causal: convolutions see the past, extended by
repeating the first frame, and a halving first repeats that frame. The decoder sees both
sides (unless the file says causal), and drops the first frame after each doubling.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from idlora_jax.config_codecs import (
    Block,
    Resample,
    Residual,
    SpatialPadding,
    Stride,
    VideoVAEConfig,
)
from idlora_jax.model import conv
from idlora_jax.model.conv import Conv, Pad
from idlora_jax.model.layers import rms_norm
from idlora_jax.types import Tree

EPS = 1e-8
SIZE = (3, 3, 3)
Pads = tuple[Pad, Pad, Pad]


def _pads(causal: bool, spatial: SpatialPadding) -> Pads:
    time = Pad(2, 0, "edge") if causal else Pad(1, 1, "edge")
    return time, Pad(1, 1, spatial), Pad(1, 1, spatial)


def space_to_depth(
    x: Float[Array, "B F H W C"], stride: Stride
) -> Float[Array, "B f h w D"]:
    """Blocks of `stride` cells -> channels, [B F/p H/q W/r C*p*q*r], block fastest."""
    p, q, r = stride
    pattern = "b (f p) (h q) (w r) c -> b f h w (c p q r)"
    return rearrange(x, pattern, p=p, q=q, r=r)


def depth_to_space(
    x: Float[Array, "B f h w D"], stride: Stride
) -> Float[Array, "B F H W C"]:
    """The inverse of `space_to_depth`."""
    p, q, r = stride
    pattern = "b f h w (c p q r) -> b (f p) (h q) (w r) c"
    return rearrange(x, pattern, p=p, q=q, r=r)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the width kept."""

    pads: Pads

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W D"]) -> Float[Array, "B F H W D"]:
        """Map [B F H W D] to the same shape."""
        h = x
        for name in ("conv1", "conv2"):
            h = jax.nn.silu(rms_norm(h, EPS))
            h = Conv(x.shape[-1], SIZE, self.pads, name=name)(h)
        return x + h


class Stage(nn.Module):
    """Residual blocks one after the other."""

    block: Residual
    pads: Pads

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W D"]) -> Float[Array, "B F H W D"]:
        """Map [B F H W D] to the same shape."""
        for n in range(self.block.layers):
            x = ResBlock(self.pads, name=f"res_{n}")(x)
        return x


class Down(nn.Module):
    """Convolution, then `space_to_depth`, plus the grouped means of the input."""

    block: Resample
    pads: Pads

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        """Reduce [B F H W I] by the block's stride; an odd F is extended in front."""
        stride, width = self.block.stride, self.block.width_out
        if stride[0] == 2:
            x = jnp.concatenate([x[:, :1], x], axis=1)
        y = Conv(width // math.prod(stride), SIZE, self.pads, name="conv")(x)
        y = space_to_depth(y, stride)
        skip = space_to_depth(x, stride)
        return y + skip.reshape(*y.shape, -1).mean(-1)


class Up(nn.Module):
    """Convolution, then `depth_to_space`, plus the repeated input where asked."""

    block: Resample
    pads: Pads

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        """Enlarge [B F H W I] by the block's stride; F becomes 2F - 1."""
        stride, width = self.block.stride, self.block.width_out
        y = Conv(width * math.prod(stride), SIZE, self.pads, name="conv")(x)
        y = depth_to_space(y, stride)
        if self.block.shortcut:
            skip = depth_to_space(x, stride)
            y = y + jnp.tile(skip, width // skip.shape[-1])
        return y[:, 1:] if stride[0] == 2 else y


def _blocks(
    block: Block, resample: type[Down] | type[Up], pads: Pads, name: str
) -> Stage | Down | Up:
    if isinstance(block, Residual):
        return Stage(block, pads, name=name)
    return resample(block, pads, name=name)


class Encoder(nn.Module):
    """Pixels [B F H W 3] -> means and log-variances [B f h w C+]."""

    cfg: VideoVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        """Encode without normalising."""
        cfg, pads = self.cfg, _pads(True, self.cfg.encoder_padding)
        pattern = "b f (h q) (w r) c -> b f h w (c r q)"
        h = rearrange(x, pattern, q=cfg.patch, r=cfg.patch)
        h = Conv(cfg.latent_channels, SIZE, pads, name="conv_in")(h)
        for n, block in enumerate(cfg.encoder):
            h = _blocks(block, Down, pads, f"blocks_{n}")(h)
        features = cfg.latent_channels + cfg.log_var_channels
        h = jax.nn.silu(rms_norm(h, EPS))
        return Conv(features, SIZE, pads, name="conv_out")(h)


class Decoder(nn.Module):
    """Latents [B f h w C], not normalised -> pixels [B F H W 3]."""

    cfg: VideoVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        """Decode, unclamped."""
        cfg, pads = self.cfg, _pads(self.cfg.causal_decoder, self.cfg.decoder_padding)
        first = cfg.decoder[0]
        width = first.width if isinstance(first, Residual) else first.width_in
        h = Conv(width, SIZE, pads, name="conv_in")(x)
        for n, block in enumerate(cfg.decoder):
            h = _blocks(block, Up, pads, f"blocks_{n}")(h)
        features = cfg.out_channels * cfg.patch**2
        h = jax.nn.silu(rms_norm(h, EPS))
        h = Conv(features, SIZE, pads, name="conv_out")(h)
        pattern = "b f h w (c r q) -> b f (h q) (w r) c"
        return rearrange(h, pattern, q=cfg.patch, r=cfg.patch)


def _refuse_conditioning(cfg: VideoVAEConfig) -> None:
    noisy = any(isinstance(b, Residual) and b.inject_noise for b in cfg.decoder)
    if cfg.timestep_conditioning or noisy:
        raise ValueError(
            "video VAE: this checkpoint's decoder asks for timestep_conditioning = "
            f"{cfg.timestep_conditioning}, inject_noise = {noisy}; only a decoder "
            "without either is supported yet"
        )


def init(cfg: VideoVAEConfig, key: PRNGKeyArray) -> dict[str, Tree]:
    """Random parameters, float32: `encoder`, `decoder`, `stats`.

    Raises:
        ValueError: if the decoder is timestep-conditioned (not supported yet).
    """
    _refuse_conditioning(cfg)
    side = cfg.space_factor
    encoder_key, decoder_key = jax.random.split(key)
    pixels = (1, 1, side, side, cfg.in_channels)
    latent = (1, 1, 1, 1, cfg.latent_channels)
    stats = {n: jnp.ones(cfg.latent_channels) for n in cfg.statistics}
    return {
        "encoder": conv.init(Encoder(cfg), encoder_key, pixels),
        "decoder": conv.init(Decoder(cfg), decoder_key, latent),
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


def _check_pixels(cfg: VideoVAEConfig, shape: tuple[int, ...]) -> None:
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
    _check_pixels(cfg, video.shape)
    moments = conv.run(Encoder(cfg), params["encoder"], video)
    return normalize(params["stats"], moments[..., : cfg.latent_channels])


def decode(
    cfg: VideoVAEConfig, params: Tree, latent: Float[Array, "B f h w C"]
) -> Float[Array, "B F H W O"]:
    """Decode normalised latents to pixels, around [-1, 1] but not clamped.

    Args:
        cfg: static.
        params: needs `decoder` and `stats`.
        latent: as `encode` gives them.

    Returns:
        Video with F = 8(f-1)+1, H = 32h, W = 32w, in the dtype of `latent`.

    Raises:
        ValueError: if the decoder is timestep-conditioned (not supported yet), or the
            latent has another number of channels.

    Source: `ltx_core/model/video_vae/video_vae.py: VideoDecoder`.
    """
    _refuse_conditioning(cfg)
    if latent.shape[-1] != cfg.latent_channels:
        raise ValueError(
            f"video_vae.decode: latent must be [B f h w {cfg.latent_channels}], "
            f"got shape {latent.shape}"
        )
    h = unnormalize(params["stats"], latent)
    return conv.run(Decoder(cfg), params["decoder"], h)


def to_uint8(video: Float[Array, "B F H W C"]) -> UInt8[Array, "B F H W C"]:
    """Pixels in [-1, 1], clamped, to 0..255; fractions are cut off, not rounded.

    Source: `ltx_core/model/video_vae/video_vae.py: decode_video`.
    """
    return (jnp.clip((video + 1) / 2, 0, 1) * 255).astype(jnp.uint8)

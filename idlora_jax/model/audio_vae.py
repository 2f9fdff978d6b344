"""The audio VAE: log-mel [B T M 2] <-> latents [B t m C], normalised.

A picture of time by mel bins goes through three resolution levels, each halving both
axes; T mel frames give t = ceil(T/4) latent frames, and t latent frames give 4t - 3 mel
frames. Every convolution is causal in time (zeros before the first frame) and centred
in frequency; after each doubling the first frame is dropped, which undoes the padding
of the halving. Norms are pixel norms over the channels, without weights.

The statistics are per (channel, bin) pair, channel slowest: [C * m].
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from idlora_jax.config_codecs import AudioVAEConfig
from idlora_jax.model import conv
from idlora_jax.model.conv import Conv, Pad
from idlora_jax.model.layers import rms_norm
from idlora_jax.types import Tree

EPS = 1e-6
SIZE = (3, 3)
CAUSAL = (Pad(2, 0), Pad(1, 1))
HALVING = (Pad(2, 0), Pad(0, 1))
NONE = (Pad(), Pad())


def _act(x: Float[Array, "B T M D"]) -> Float[Array, "B T M D"]:
    return jax.nn.silu(rms_norm(x, EPS))


class ResBlock(nn.Module):
    """Two causal convolutions beside a shortcut (1x1 where the width changes)."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T M I"]) -> Float[Array, "B T M O"]:
        """Map the channels to `width`."""
        h = Conv(self.width, SIZE, CAUSAL, name="conv1")(_act(x))
        h = Conv(self.width, SIZE, CAUSAL, name="conv2")(_act(h))
        if x.shape[-1] != self.width:
            x = Conv(self.width, (1, 1), NONE, name="shortcut")(x)
        return x + h


class Attention(nn.Module):
    """One head of self-attention over all T * M positions, added to the input."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T M D"]) -> Float[Array, "B T M D"]:
        """Map [B T M D] to the same shape."""
        h, width = rms_norm(x, EPS), x.shape[-1]
        flat = (x.shape[0], -1, width)
        q, k, v = (
            Conv(width, (1, 1), NONE, name=name)(h).reshape(flat) for name in "qkv"
        )
        weights = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) * width**-0.5)
        h = jnp.einsum("bqk,bkd->bqd", weights, v).reshape(x.shape)
        return x + Conv(width, (1, 1), NONE, name="out")(h)


class Level(nn.Module):
    """Residual blocks, each followed by attention if asked, then a change of size."""

    width: int
    blocks: int
    attention: bool
    resample: Literal["down", "up"] | None

    @nn.compact
    def __call__(self, x: Float[Array, "B T M I"]) -> Float[Array, "B t m O"]:
        """Map the channels to `width`; halve (rounding up) or double T and M."""
        for n in range(self.blocks):
            x = ResBlock(self.width, name=f"res_{n}")(x)
            x = Attention(name=f"attn_{n}")(x) if self.attention else x
        if self.resample == "down":
            x = Conv(self.width, SIZE, HALVING, stride=2, name="resample")(x)
        if self.resample == "up":
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = Conv(self.width, SIZE, CAUSAL, name="resample")(x)[:, 1:]
        return x


class Mid(nn.Module):
    """Residual block, optional attention, residual block."""

    attention: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T M D"]) -> Float[Array, "B T M D"]:
        """Map [B T M D] to the same shape."""
        x = ResBlock(x.shape[-1], name="res_1")(x)
        x = Attention(name="attn_1")(x) if self.attention else x
        return ResBlock(x.shape[-1], name="res_2")(x)


class Encoder(nn.Module):
    """Log-mel [B T M 2] -> means and log-variances [B t m 2C]."""

    cfg: AudioVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T M I"]) -> Float[Array, "B t m O"]:
        """Encode without normalising."""
        cfg = self.cfg
        h = Conv(cfg.width, SIZE, CAUSAL, name="conv_in")(x)
        last = len(cfg.multipliers) - 1
        for n, multiplier in enumerate(cfg.multipliers):
            size = "down" if n < last else None
            width, blocks = cfg.width * multiplier, cfg.res_blocks
            h = Level(width, blocks, cfg.attention[n], size, name=f"down_{n}")(h)
        h = Mid(cfg.mid_attention, name="mid")(h)
        return Conv(2 * cfg.latent_channels, SIZE, CAUSAL, name="conv_out")(_act(h))


class Decoder(nn.Module):
    """Latents [B t m C], not normalised -> log-mel [B 4t-3 4m 2]."""

    cfg: AudioVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T M I"]) -> Float[Array, "B t m O"]:
        """Decode to the log-mel spectrogram."""
        cfg = self.cfg
        h = Conv(cfg.width * cfg.multipliers[-1], SIZE, CAUSAL, name="conv_in")(x)
        h = Mid(cfg.mid_attention, name="mid")(h)
        for n in reversed(range(len(cfg.multipliers))):
            size = "up" if n > 0 else None
            width, blocks = cfg.width * cfg.multipliers[n], cfg.res_blocks + 1
            h = Level(width, blocks, cfg.attention[n], size, name=f"up_{n}")(h)
        return Conv(cfg.out_channels, SIZE, CAUSAL, name="conv_out")(_act(h))


def init(cfg: AudioVAEConfig, key: PRNGKeyArray) -> dict[str, Tree]:
    """Random parameters, float32: `encoder`, `decoder`, `stats`."""
    encoder_key, decoder_key = jax.random.split(key)
    bins = cfg.mel_bins // cfg.factor
    pairs = bins * cfg.latent_channels
    mel = (1, 1, cfg.mel_bins, cfg.in_channels)
    latent = (1, 1, bins, cfg.latent_channels)
    return {
        "encoder": conv.init(Encoder(cfg), encoder_key, mel),
        "decoder": conv.init(Decoder(cfg), decoder_key, latent),
        "stats": {"mean": jnp.zeros(pairs), "std": jnp.ones(pairs)},
    }


def _per_bin(stats: Tree, name: str, like: Float[Array, "B t m C"]) -> Array:
    """One statistic as [1 1 m C]."""
    bins, channels = like.shape[2:]
    table = stats[name].astype(like.dtype).reshape(channels, bins)
    return table.T[None, None]


def normalize(stats: Tree, latent: Float[Array, "B t m C"]) -> Float[Array, "B t m C"]:
    """(latent - mean) / std per channel and bin: what the transformer sees."""
    mean, std = (_per_bin(stats, name, latent) for name in ("mean", "std"))
    return (latent - mean) / std


def unnormalize(
    stats: Tree, latent: Float[Array, "B t m C"]
) -> Float[Array, "B t m C"]:
    """Latent * std + mean per channel and bin: the inverse of `normalize`."""
    mean, std = (_per_bin(stats, name, latent) for name in ("mean", "std"))
    return latent * std + mean


def _check(name: str, shape: tuple[int, ...], bins: int, channels: int) -> None:
    if shape[1] < 1 or shape[2:] != (bins, channels):
        raise ValueError(
            f"audio_vae.{name}: expected [B T {bins} {channels}] with T >= 1, "
            f"got shape {shape}"
        )


def encode(
    cfg: AudioVAEConfig, params: Tree, mel: Float[Array, "B T M I"]
) -> Float[Array, "B t m C"]:
    """Encode to the normalised means of the latent distribution.

    Args:
        cfg: static.
        params: needs `encoder` and `stats`.
        mel: log-mel spectrogram, natural logarithm, left and right channel.

    Returns:
        Latents with t = ceil(T/4), m = M/4, in the dtype of `mel`.

    Raises:
        ValueError: naming the expected number of mel bins and channels.

    Source: `ltx_core/model/audio_vae/audio_vae.py: AudioEncoder`.
    """
    _check("encode", mel.shape, cfg.mel_bins, cfg.in_channels)
    moments = conv.run(Encoder(cfg), params["encoder"], mel)
    return normalize(params["stats"], moments[..., : cfg.latent_channels])


def decode(
    cfg: AudioVAEConfig, params: Tree, latent: Float[Array, "B t m C"]
) -> Float[Array, "B T M O"]:
    """Decode normalised latents to a log-mel spectrogram.

    Args:
        cfg: static.
        params: needs `decoder` and `stats`.
        latent: as `encode` gives them.

    Returns:
        Log-mel with T = 4t-3 frames and M = 4m bins, in the dtype of `latent`.

    Raises:
        ValueError: naming the expected number of bins and channels.

    Source: `ltx_core/model/audio_vae/audio_vae.py: AudioDecoder`.
    """
    bins = cfg.mel_bins // cfg.factor
    _check("decode", latent.shape, bins, cfg.latent_channels)
    h = unnormalize(params["stats"], latent)
    return conv.run(Decoder(cfg), params["decoder"], h)

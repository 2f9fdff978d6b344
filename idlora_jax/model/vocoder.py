"""The vocoder of generation 2.0: log-mel [B T M 2] -> waveform [B 2 N].

HiFi-GAN (Kong et al. 2020, arXiv:2010.05646). Both channels enter as one row of 2M
features. Each stage upsamples by a transposed convolution, halves the width, and
averages residual blocks of several kernel sizes, each of which is pairs of a dilated
and an undilated convolution. tanh bounds the waveform. N = T * product of the rates.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from idlora_jax.config_codecs import VocoderConfig
from idlora_jax.model import conv
from idlora_jax.model.conv import Conv, ConvTranspose, Pad
from idlora_jax.types import Tree

SLOPE = 0.1
LAST_SLOPE = 0.01
ENDS = 7


def _same(size: int, dilation: int = 1) -> tuple[Pad]:
    border = dilation * (size - 1)
    return (Pad(border // 2, border - border // 2),)


def _act(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    return jax.nn.leaky_relu(x, SLOPE)


class ResBlock(nn.Module):
    """Pairs of a dilated and an undilated convolution, each pair added to its input."""

    size: int
    dilations: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Map [B N D] to the same shape."""
        size, width = (self.size,), x.shape[-1]
        for n, d in enumerate(self.dilations):
            dilated = Conv(
                width, size, _same(self.size, d), dilation=d, name=f"dilated_{n}"
            )
            plain = Conv(width, size, _same(self.size), name=f"plain_{n}")
            x = x + plain(_act(dilated(_act(x))))
        return x


class Vocoder(nn.Module):
    """Features [B T 2M] -> waveform [B N 2]."""

    cfg: VocoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B N 2"]:
        """Synthesize."""
        cfg, width = self.cfg, self.cfg.width
        h = Conv(width, (ENDS,), _same(ENDS), name="conv_in")(x)
        blocks = tuple(zip(cfg.kernels, cfg.dilations, strict=True))
        for n, (rate, size) in enumerate(zip(cfg.rates, cfg.up_kernels, strict=True)):
            width //= 2
            h = ConvTranspose(width, size, rate, name=f"up_{n}")(_act(h))
            # Files number the residual blocks through all stages.
            first = n * len(blocks)
            outs = [
                ResBlock(*block, name=f"res_{first + k}")(h)
                for k, block in enumerate(blocks)
            ]
            h = jnp.stack(outs).mean(0)
        h = jax.nn.leaky_relu(h, LAST_SLOPE)
        return jnp.tanh(Conv(2, (ENDS,), _same(ENDS), name="conv_out")(h))


def init(cfg: VocoderConfig, key: PRNGKeyArray) -> Tree:
    """Random parameters, float32."""
    return conv.init(Vocoder(cfg), key, (1, 1, 2 * cfg.mel_bins))


def synthesize(
    cfg: VocoderConfig, params: Tree, mel: Float[Array, "B T M 2"]
) -> Float[Array, "B 2 N"]:
    """Turn a log-mel spectrogram into sound.

    Args:
        cfg: static; the waveform has `cfg.sample_rate`.
        params: as `init` gives them.
        mel: log-mel, left and right channel, as `audio_vae.decode` gives it.

    Returns:
        Waveform in (-1, 1) with N = T * `cfg.factor` samples, in the dtype of `mel`.

    Raises:
        ValueError: naming the expected number of mel bins.

    Source: `ltx_core/model/audio_vae/vocoder.py: Vocoder`.
    """
    if mel.shape[1] < 1 or mel.shape[2] != cfg.mel_bins:
        raise ValueError(
            f"vocoder.synthesize: expected [B T {cfg.mel_bins} 2] with T >= 1, "
            f"got shape {mel.shape}"
        )
    batch, frames = mel.shape[:2]
    features = mel.transpose(0, 1, 3, 2).reshape(batch, frames, -1)
    wave = conv.run(Vocoder(cfg), params, features)
    return wave.transpose(0, 2, 1)

"""The vocoder: log-mel [B T M 2] -> waveform [B 2 N].

A generator of the HiFi-GAN family (Kong et al. 2020, arXiv:2010.05646). Both channels
enter as one row of 2M features. Each stage upsamples by a transposed convolution,
halves the width, and averages residual blocks of several kernel sizes, each of which is
pairs of a dilated and an undilated convolution. The two generations differ in pieces:

    2.0   leaky ReLU, tanh at the end                          24 kHz
    2.3   anti-aliased snake (`antialias`), clamped at the end  16 kHz
          then extended to 48 kHz by the same network again:

    wave = clamp(resample(low) + generator(log_mel(low)))

where `log_mel` and `resample` are those of `bandwidth`. Parameters are those of the one
generator, or {"base", "bwe", "stft"} of the two and the spectrogram between them. Long
sounds are made piece by piece (`sound_chunks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from idlora_jax.config_vocoder import (
    Activation,
    Bound,
    ExtensionConfig,
    GeneratorConfig,
    VocoderConfig,
)
from idlora_jax.model import antialias, bandwidth, conv, sound_chunks
from idlora_jax.model.antialias import Snake
from idlora_jax.model.conv import Conv, ConvTranspose, Pad
from idlora_jax.model.sound_chunks import ENDS
from idlora_jax.types import Tree

SLOPE = 0.1
LAST_SLOPE = 0.01
CHUNK = 1024
"""Mel frames that are synthesized at once: ten seconds, 0.3 GB of work."""
_BOUNDS: dict[Bound, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "clamp": lambda x: jnp.clip(x, -1, 1),
    "none": lambda x: x,
}


def _same(size: int, dilation: int = 1) -> tuple[Pad]:
    border = dilation * (size - 1)
    return (Pad(border // 2, border - border // 2),)


def _leaky(x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    return jax.nn.leaky_relu(x, SLOPE)


class ResBlock(nn.Module):
    """Pairs of a dilated and an undilated convolution, each pair added to its input."""

    size: int
    dilations: tuple[int, ...]
    activation: Activation = "leaky"

    def _act(self, name: str) -> Callable[[jax.Array], jax.Array]:
        if self.activation == "leaky":
            return _leaky
        return Snake(self.activation == "snakebeta", name=f"{name}_act")

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Map [B N D] to the same shape."""
        size, width = (self.size,), x.shape[-1]
        for n, d in enumerate(self.dilations):
            names = f"dilated_{n}", f"plain_{n}"
            pads = _same(self.size, d), _same(self.size)
            dilated = Conv(width, size, pads[0], dilation=d, name=names[0])
            plain = Conv(width, size, pads[1], name=names[1])
            h = dilated(self._act(names[0])(x))
            x = x + plain(self._act(names[1])(h))
        return x


class Generator(nn.Module):
    """Features [B T 2M] -> waveform [B N 2]."""

    cfg: GeneratorConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B N 2"]:
        """Synthesize."""
        cfg, width = self.cfg, self.cfg.width
        leaky = cfg.activation == "leaky"
        h = Conv(width, (ENDS,), _same(ENDS), name="conv_in")(x)
        blocks = tuple(zip(cfg.kernels, cfg.dilations, strict=True))
        for n, (rate, size) in enumerate(zip(cfg.rates, cfg.up_kernels, strict=True)):
            width //= 2
            # Snakes act inside the residual blocks alone.
            h = _leaky(h) if leaky else h
            h = ConvTranspose(width, size, rate, name=f"up_{n}")(h)
            # Files number the residual blocks through all stages.
            first = n * len(blocks)
            outs = [
                ResBlock(*block, cfg.activation, name=f"res_{first + k}")(h)
                for k, block in enumerate(blocks)
            ]
            h = jnp.stack(outs).mean(0)
        # The last snake has a beta of its own whatever the others have.
        h = jax.nn.leaky_relu(h, LAST_SLOPE) if leaky else Snake(name="act_out")(h)
        out = Conv(2, (ENDS,), _same(ENDS), use_bias=cfg.bias, name="conv_out")(h)
        return _BOUNDS[cfg.bound](out)


def with_buffers(cfg: VocoderConfig, params: Tree) -> Tree:
    """Parameters in which what a file holds as constants has its true values.

    These are the filters around each snake, and the bases of the spectrogram.
    """

    def one(path: tuple[Any, ...], x: Any) -> Any:
        *_, leaf = (entry.key for entry in path)
        if not leaf.endswith("_filter"):
            return x
        return antialias.lowpass().astype(x.dtype)

    out = jax.tree_util.tree_map_with_path(one, params)
    if cfg.extension is None:
        return out
    made = bandwidth.bases(cfg.extension)
    return {**out, "stft": {k: made[k].astype(x.dtype) for k, x in out["stft"].items()}}


def init(cfg: VocoderConfig, key: PRNGKeyArray) -> Tree:
    """Random parameters, float32; filters and bases have their true values."""

    def generator(cfg: GeneratorConfig, key: PRNGKeyArray) -> Tree:
        return conv.init(Generator(cfg), key, (1, 1, 2 * cfg.mel_bins))

    first, second = jax.random.split(key)
    out = generator(cfg.generator, first)
    if cfg.extension is not None:
        after = generator(cfg.extension.generator, second)
        out = {"base": out, "bwe": after, "stft": bandwidth.bases(cfg.extension)}
    return jax.tree.map(jnp.asarray, with_buffers(cfg, out))


def generate(
    cfg: GeneratorConfig, params: Tree, mel: Float[Array, "B T M 2"]
) -> Float[Array, "B N 2"]:
    """One generator: N = T `cfg.factor` samples of both channels."""
    batch, frames = mel.shape[:2]
    features = mel.transpose(0, 1, 3, 2).reshape(batch, frames, -1)
    return conv.run(Generator(cfg), params, features)


def extend(
    cfg: ExtensionConfig, params: Tree, low: Float[Array, "B N 2"]
) -> Float[Array, "B P 2"]:
    """Raise the rate of a generator's sound, and add what the low rate cannot hold.

    Args:
        cfg: static.
        params: "bwe" and "stft" as `init` gives them.
        low: at `cfg.input_rate`.

    Returns:
        P = N `cfg.ratio` samples in [-1, 1].

    Source: `ltx_core/model/audio_vae/vocoder.py: VocoderWithBWE`.
    """
    samples = low.shape[1]
    whole = jnp.pad(low, ((0, 0), (0, -samples % cfg.hop), (0, 0)))
    heard = bandwidth.log_mel(cfg, params["stft"], whole)
    residual = generate(cfg.generator, params["bwe"], heard)
    sound = jnp.clip(residual + bandwidth.resample(cfg, whole), -1, 1)
    return sound[:, : samples * cfg.ratio]


def synthesize(
    cfg: VocoderConfig,
    params: Tree,
    mel: Float[Array, "B T M 2"],
    chunk: int | None = CHUNK,
) -> Float[Array, "B 2 N"]:
    """Turn a log-mel spectrogram into sound.

    Args:
        cfg: static; the waveform has `cfg.sample_rate`.
        params: as `init` gives them.
        mel: log-mel, left and right channel, as `audio_vae.decode` gives it.
        chunk: frames of it that are worked on at a time, with what their sound depends
            on besides: the sound is the same up to rounding. None: all at once.

    Returns:
        Waveform in [-1, 1] with N = T * `cfg.factor` samples, in the dtype of `mel`.
        float32 is computed as such on every device, at no reduced precision of its
        matrix units.

    Raises:
        ValueError: naming the expected number of mel bins, or for a chunk below 1.

    Source: `ltx_core/model/audio_vae/vocoder.py: Vocoder`, `VocoderWithBWE`.
    """
    if mel.shape[1] < 1 or mel.shape[2] != cfg.mel_bins:
        raise ValueError(
            f"vocoder.synthesize: expected [B T {cfg.mel_bins} 2] with T >= 1, "
            f"got shape {mel.shape}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"vocoder.synthesize: got chunk {chunk}, expected 1 or more")

    def whole(mel: Float[Array, "B T M 2"]) -> Float[Array, "B N 2"]:
        if cfg.extension is None:
            return generate(cfg.generator, params, mel)
        low = generate(cfg.generator, params["base"], mel)
        return extend(cfg.extension, params, low)

    with jax.default_matmul_precision("highest"):
        if chunk is None:
            wave = whole(mel)
        else:
            wave = sound_chunks.pieces(cfg, whole, mel, chunk)
    return wave.transpose(0, 2, 1)

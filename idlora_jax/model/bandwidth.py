"""Around the second generator of bandwidth extension: what it hears, what it adds to.

    sound f32 [B N 2] at the low rate --log_mel--> [B T M 2]      T = N / hop
    sound f32 [B N 2] --resample--> [B P 2] at the high rate      P = N ratio

The spectrogram is causal: frame t ends with sample (t + 1) hop, and silence precedes
the sound. Its bases are buffers of the checkpoint, rounded as it was trained with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from idlora_jax import mel
from idlora_jax.config_vocoder import ExtensionConfig
from idlora_jax.model import antialias
from idlora_jax.model.conv import Pad, conv


def bases(cfg: ExtensionConfig) -> dict[str, np.ndarray]:
    """Buffers such as a file holds: Fourier bases under a Hann window, mel filters.

    Returns:
        "forward" and "inverse" [n_fft 1 2F], real parts before imaginary ones of
        F = n_fft/2 + 1 frequencies; "mel" [F M]. The inverse is not used, and 0.
    """
    size, bins = cfg.n_fft, cfg.generator.mel_bins
    angle = 2 * np.pi / size * np.outer(np.arange(size), np.arange(size // 2 + 1))
    both = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    forward = (both * mel.hann_window(size)[:, None]).astype(np.float32)[:, None]
    with warnings.catch_warnings():
        # A short transform has fewer frequencies than low bands: some stay empty.
        warnings.simplefilter("ignore", UserWarning)
        filters = np.asarray(mel.mel_filters(cfg.input_rate, size, bins))
    return {"forward": forward, "inverse": np.zeros_like(forward), "mel": filters}


def log_mel(
    cfg: ExtensionConfig, buffers: Mapping[str, Array], sound: Float[Array, "B N 2"]
) -> Float[Array, "B T M 2"]:
    """Causal log-mel spectrogram of both channels.

    Args:
        cfg: static.
        buffers: as `bases` gives them.
        sound: at `cfg.input_rate`; N is a multiple of `cfg.hop`.

    Source: `ltx_core/model/audio_vae/vocoder.py: MelSTFT`.
    """
    batch, samples, channels = sound.shape
    rows = sound.transpose(0, 2, 1).reshape(batch * channels, samples, 1)
    before = (Pad(max(0, cfg.n_fft - cfg.hop), 0),)
    parts = conv(rows, buffers["forward"], None, before, stride=cfg.hop)
    real, imaginary = jnp.split(parts, 2, axis=-1)
    magnitude = jnp.sqrt(real**2 + imaginary**2)
    bands = magnitude @ buffers["mel"].astype(sound.dtype)
    logs = jnp.log(jnp.maximum(bands, mel.FLOOR))
    return logs.reshape(batch, channels, *logs.shape[1:]).transpose(0, 2, 3, 1)


def resample(
    cfg: ExtensionConfig, sound: Float[Array, "B N 2"]
) -> Float[Array, "B P 2"]:
    """Raise the rate `cfg.ratio` times by a windowed sinc; edge values are repeated.

    Its kernel is in no file: made on the host in float64, rounded once.

    Source: `ltx_core/model/audio_vae/vocoder.py: UpSample1d`, window "hann".
    """
    kernel = mel.resample_kernel(cfg.input_rate, cfg.input_rate * cfg.ratio)
    return antialias.interpolate(sound, jnp.asarray(kernel.T))

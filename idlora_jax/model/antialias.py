"""Activations that do not alias, of BigVGAN (Lee et al. 2023, arXiv:2206.04658).

A pointwise function makes overtones above the highest frequency that samples can hold,
which come back as lower ones. So the signal is raised to twice its rate, the function
applied there, and the result low-passed and brought back:

    u[2n + p] = sum_i x[n + i - 3] up[i, p]           p = 0, 1: the two phases
    y[n]      = sum_ip f(u)[2 (n + i - 3) + p] down[i, p]

where `down` is one low-pass filter of 12 taps cut into its phases, `up` another one
reversed and doubled. Edge values are repeated outside the signal. Both filters are
buffers of the checkpoint. A filter acts on each channel alone and is the same for all,
so that 16 samples at a time are a product with one banded matrix, mostly of zeros but
dense: 15 times as fast on CPU as a convolution (measured).
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

RATIO, TAPS = 2, 12
BLOCK = 16
EPSILON = 1e-9


@functools.cache
def lowpass() -> Float32[np.ndarray, "K 1 1"]:
    """The filter that files hold: a sinc at half the Nyquist frequency, 12 taps.

    It lies under a Kaiser window made for a transition 1.2 pi wide, and sums to 1.

    Source: Kaiser's formulas for length and beta (Oppenheim & Schafer, section 7.5).
    """
    cutoff, transition = 0.5 / RATIO, 4 * 0.6 / RATIO
    attenuation_db = 2.285 * (TAPS // 2 - 1) * math.pi * transition + 7.95
    beta = 0.1102 * (attenuation_db - 8.7)  # holds above 50 dB
    time = np.arange(TAPS) - (TAPS - 1) / 2
    taps = np.kaiser(TAPS, beta) * np.sinc(2 * cutoff * time)
    return (taps / taps.sum()).astype(np.float32)[:, None, None]


def phases(kernel: Float[Array, "K 1 1"]) -> Float[Array, "I P"]:
    """Cut a filter of `TAPS` taps into its two phases; the outer two entries are 0."""
    return jnp.pad(kernel[:, 0, 0], 1).reshape(-1, RATIO)


def _windows(
    x: Float[Array, "B N D"], size: int, extra: int
) -> Float[Array, "B n I D"]:
    """Blocks of `size` samples, with `extra` of their neighbours, half on each side."""
    batch, samples, width = x.shape
    count = -(-samples // size)
    before = extra // 2
    after = (count + 1) * size - before - samples
    x = jnp.pad(x, ((0, 0), (before, after), (0, 0)), mode="edge")
    blocks = x.reshape(batch, count + 1, size, width)
    return jnp.concatenate([blocks[:, :-1], blocks[:, 1:, :extra]], axis=2)


def _band(taps: Float[Array, "I P"]) -> Float[Array, "W S P"]:
    """The filters at each of the S = `BLOCK` places of a block, W = S + I - 1."""
    last = BLOCK - 1
    return jnp.stack(
        [jnp.pad(taps, ((s, last - s), (0, 0))) for s in range(BLOCK)], axis=1
    )


def interpolate(
    x: Float[Array, "B N D"], taps: Float[Array, "I P"]
) -> Float[Array, "B M D"]:
    """Raise the rate P times: sample P n + p is `x[n - I//2 ..] @ taps[:, p]`.

    Args:
        x: edge values are repeated outside it.
        taps: a filter for each phase, over an odd number I <= `BLOCK` + 1 of samples.

    Returns:
        M = N P samples.
    """
    (batch, samples, width), (size, many) = x.shape, taps.shape
    band = _band(taps.astype(x.dtype)).reshape(BLOCK + size - 1, -1)
    y = jnp.einsum("bnid,io->bnod", _windows(x, BLOCK, size - 1), band)
    return y.reshape(batch, -1, width)[:, : many * samples]


def decimate(
    x: Float[Array, "B M D"], taps: Float[Array, "I P"]
) -> Float[Array, "B N D"]:
    """Lower the rate P times: the adjoint of `interpolate` but for reversed taps.

    Args:
        x: edge values are repeated outside it; M is a multiple of P.
        taps: of phase p for the samples P (n + i - I//2) + p.

    Returns:
        N = M / P samples.
    """
    (batch, samples, width), (size, many) = x.shape, taps.shape
    band = _band(taps.astype(x.dtype)).transpose(0, 2, 1).reshape(-1, BLOCK)
    windows = _windows(x, BLOCK * many, (size - 1) * many)
    y = jnp.einsum("bnid,io->bnod", windows, band)
    return y.reshape(batch, -1, width)[:, : samples // many]


def snake(
    x: Float[Array, "B N D"], alpha: Float[Array, " D"], beta: Float[Array, " D"]
) -> Float[Array, "B N D"]:
    """x + sin^2(e^alpha x) / e^beta: the identity with a ripple, channel by channel.

    Source: `ltx_core/model/audio_vae/vocoder.py: SnakeBeta`.
    """
    frequency, damping = (jnp.exp(p.astype(x.dtype))[None, None] for p in (alpha, beta))
    return x + jnp.sin(frequency * x) ** 2 / (damping + EPSILON)


class Snake(nn.Module):
    """`snake` at twice the rate; without `own_beta`, beta is alpha."""

    own_beta: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """Map [B N D] to the same shape."""
        zeros, width = nn.initializers.zeros, (x.shape[-1],)
        alpha = self.param("alpha", zeros, width)
        beta = self.param("beta", zeros, width) if self.own_beta else alpha
        up, down = (
            phases(self.param(f"{way}_filter", lambda _: jnp.asarray(lowpass())))
            for way in ("up", "down")
        )
        high = snake(interpolate(x, RATIO * up[::-1]), alpha, beta)
        return decimate(high, down)

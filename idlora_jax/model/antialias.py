"""Activations that do not alias, of BigVGAN (Lee et al. 2023, arXiv:2206.04658).

A pointwise function makes overtones above the highest frequency that samples can hold,
which come back as lower ones. So the signal is raised to twice its rate, the function
applied there, and the result low-passed and brought back:

    u[2n + p] = sum_i x[n + i - 3] up[i, p]           p = 0, 1: the two phases
    y[n]      = sum_ip f(u)[2 (n + i - 3) + p] down[i, p]

where `down` is one low-pass filter of 12 taps cut into its phases, `up` another one
reversed and doubled. Edge values are repeated outside the signal. Both filters are
buffers of the checkpoint. A filter acts on each channel alone and is the same for all:
the convolutions here have the phases as channels, and the channels as a second axis of
space (twice as fast on CPU as one group a channel, measured).
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

RATIO, TAPS = 2, 12
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


def _edges(x: Float[Array, "B N D"], width: int) -> Float[Array, "B M D"]:
    return jnp.pad(x, ((0, 0), (width, width), (0, 0)), mode="edge")


def _convolve(
    x: Float[Array, "B N I D"], kernel: Float[Array, "K I O"]
) -> Float[Array, "B M O D"]:
    numbers = ("NHCW", "HWIO", "NHCW")
    kernel = kernel[:, None].astype(x.dtype)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(0, 0), (0, 0)], dimension_numbers=numbers
    )


def interpolate(
    x: Float[Array, "B N D"], taps: Float[Array, "I P"]
) -> Float[Array, "B M D"]:
    """Raise the rate P times: sample P n + p is `x[n - I//2 ..] @ taps[:, p]`.

    Args:
        x: edge values are repeated outside it.
        taps: a filter for each phase, over an odd number I of samples.

    Returns:
        M = N P samples.
    """
    size, many = taps.shape
    y = _convolve(_edges(x, size // 2)[:, :, None], taps[:, None])
    return y.reshape(len(x), many * x.shape[1], x.shape[2])


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
    size, many = taps.shape
    x = _edges(x, size // 2 * many)
    split = x.reshape(len(x), x.shape[1] // many, many, x.shape[2])
    return _convolve(split, taps[:, :, None])[:, :, 0]


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

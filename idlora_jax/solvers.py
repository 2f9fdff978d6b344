"""Integrating dx/dsigma = (x - x0)/sigma from noise to data: solvers as data.

A solver is a table of coefficients, built on the host in float64, and one function that
applies a row of it. Each row is **one call of the model**: the sampler scans over the
rows, denoises the current x at the row's sigma and hands x and x0 to `step`. A solver
of two calls per step therefore has two rows per step, and whatever `table` is asked for
(eta, gamma, other sigmas) never recompiles.

Euler moves from sigma to sigma' along the line through x and x0:
`x' = x0 + r (x - x0)`, `r = sigma'/sigma`. Gradient estimation first moves x0 along the
change of the velocity since the last step.

res_2s is the exponential two-stage Runge-Kutta method in `h = log(sigma/sigma')` with
the middle at `sqrt(sigma sigma')`. With `phi1(z) = (e^z - 1)/z` and
`phi2(z) = (e^z - 1 - z)/z^2` its tableau is `b2 = 2 phi2(-h)`, `b1 = phi1(-h) - b2`,
and since h phi1(-h) = 1 - r,

    middle  a + h a21 (d1 - a)                  = d1 + sqrt(r) (a - d1)
    next    a + h b1 (d1 - a) + h b2 (d2 - a)   = d2 + r (a - d2) + h b1 (d1 - d2)

for the anchor a (x at the start of the step) and the two denoised values: one formula
`t = x0 + r (a - x0) + b (d1 - x0)`. Both points then swap part of their noise for fresh
noise: with `up = eta sigma'`, `keep = sqrt(sigma'^2 - up^2)`,
`alpha = 1 - sigma' + keep` and `down = keep/alpha`, x' = alpha (t + j (a - t)) + up n,
`j = (down - sigma')/(sigma - sigma')`. After the middle m, where h < 0.5 and
sigma > 0.03, the anchor becomes the point from which the noisy m would have been
reached: the fixed point a = m + g (m - d1), g = c/(1 - c), c = 1 - sqrt(r). A last
sigma of 0 is replaced by 0.0011, from where one more call gives the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from idlora_jax.types import AV, each

SMALLEST_SIGMA = 0.0011
REFINE_BELOW_H, REFINE_ABOVE_SIGMA = 0.5, 0.03


class Table(NamedTuple):
    """One row per model call: its sigma, the step it belongs to, the coefficients."""

    sigma: Any
    step: Any
    rows: Any


@dataclass(frozen=True)
class Solver:
    """What `denoise.sample` scans.

    Attributes:
        table: sigmas [n+1] -> `Table`, on the host.
        init: x -> carry.
        step: (x, x0, carry, row, noise) -> (x, carry), all pairs `AV`.
        noisy: whether `step` needs noise; if not, it gets None.
    """

    table: Callable[[np.ndarray], Table]
    init: Callable[[AV], Any]
    step: Callable[[AV, AV, Any, Any, AV | None], tuple[AV, Any]]
    noisy: bool = False


def _checked(sigmas: Any) -> np.ndarray:
    """The sigmas in float64; raises unless they fall to 0 or above."""
    s = np.asarray(sigmas, np.float64)
    if s.ndim != 1 or len(s) < 2:
        raise ValueError(
            f"sigmas: expected one axis of at least 2 values, got shape {s.shape}"
        )
    if not (np.all(np.diff(s) <= 0) and s[-2] > 0 and s[-1] >= 0):
        raise ValueError(
            f"sigmas: must fall and be positive (only the last may be 0), got {s}"
        )
    return s


def _table(sigma: np.ndarray, step: np.ndarray, rows: Any) -> Table:
    rows = jax.tree.map(lambda a: a if a.dtype == bool else a.astype(np.float32), rows)
    return Table(sigma.astype(np.float32), step.astype(np.int32), rows)


class EulerRow(NamedTuple):
    """ratio: next sigma over this one."""

    ratio: Any


def euler() -> Solver:
    """First order, deterministic.

    Source: ltx_core/components/diffusion_steps.py: EulerDiffusionStep.
    """
    return Solver(_euler_table, _no_carry, _euler_step)


def _euler_table(sigmas: np.ndarray) -> Table:
    s = _checked(sigmas)
    return _table(s[:-1], np.arange(len(s) - 1), EulerRow(s[1:] / s[:-1]))


def _no_carry(x: AV) -> tuple[()]:
    return ()


def _euler_step(
    x: AV, x0: AV, carry: tuple[()], row: EulerRow, noise: AV | None
) -> tuple[AV, tuple[()]]:
    return each(lambda x, x0: x0 + row.ratio * (x - x0), x, x0), carry


class GradientRow(NamedTuple):
    """ratio as in Euler; extra: sigma (gamma - 1), 0 in the first and a last row."""

    ratio: Any
    sigma: Any
    extra: Any


def gradient_estimation(gamma: float | int = 2.0) -> Solver:
    """Euler with the velocity extrapolated by its change since the last step.

    Source: openreview.net/pdf?id=o2ND9v0CeK; ltx_pipelines/utils/samplers.py:
        gradient_estimating_euler_denoising_loop.
    """
    return Solver(partial(_gradient_table, gamma), _zeros, _gradient_step)


def _gradient_table(gamma: float | int, sigmas: np.ndarray) -> Table:
    s = _checked(sigmas)
    extra = (gamma - 1) * s[:-1] * (s[1:] > 0)
    extra[0] = 0.0
    row = GradientRow(s[1:] / s[:-1], s[:-1], extra)
    return _table(s[:-1], np.arange(len(s) - 1), row)


def _zeros(x: AV) -> AV:
    return each(jnp.zeros_like, x)


def _gradient_step(
    x: AV, x0: AV, carry: AV, row: GradientRow, noise: AV | None
) -> tuple[AV, AV]:
    velocity = each(lambda x, x0: (x - x0) / row.sigma, x, x0)
    x0 = each(lambda x0, v, last: x0 - row.extra * (v - last), x0, velocity, carry)
    return each(lambda x, x0: x0 + row.ratio * (x - x0), x, x0), velocity


class NoiseCoefficients(NamedTuple):
    """Swapping noise: `alpha (t + j (a - t)) + up noise`."""

    alpha: Any
    j: Any
    up: Any


class Res2sRow(NamedTuple):
    """One of the two calls of a step (see the module's text).

    fresh: the anchor starts anew from x, moved by `g` away from the last x0.
    """

    fresh: Any
    g: Any
    ratio: Any
    b: Any
    noise: NoiseCoefficients


def res2s(eta: float | int = 0.5, bong: bool = True) -> Solver:
    """Second order with fresh noise: 2n calls, and one more when the last sigma is 0.

    Args:
        eta: share of each point's noise that is fresh, in [0, 1); 0 is deterministic.
        bong: refine the anchor after the middle.

    Source: ltx_pipelines/utils/samplers.py: res2s_audio_video_denoising_loop.
    """
    if not 0 <= eta < 1:
        raise ValueError(f"res2s: eta must be in [0, 1), got {eta} (use 0.5)")
    table = partial(_res2s_table, eta, bong)
    return Solver(table, _res2s_init, _res2s_step, noisy=eta > 0)


def res2s_coefficients(h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a21, b1, b2) of the step h = log(sigma / next sigma), float64.

    Source: ltx_pipelines/utils/res2s.py: get_res2s_coefficients.
    """
    phi1 = -np.expm1(-h) / h
    phi2 = (np.expm1(-h) + h) / h**2
    return -np.expm1(-h / 2) / h, phi1 - 2 * phi2, 2 * phi2


def sde_coefficients(
    sigma_next: np.ndarray, eta: float | int = 0.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(alpha, sigma_down, sigma_up): what keeps the variance when noise is swapped.

    Source: ltx_core/components/diffusion_steps.py: Res2sDiffusionStep.get_sde_coeff.
    """
    up = sigma_next * min(eta, 0.9999)
    keep = np.sqrt(sigma_next**2 - up**2)
    alpha = 1 - sigma_next + keep
    return alpha, keep / alpha, up


def noise_coefficients(
    sigma: np.ndarray, sigma_next: np.ndarray, eta: float | int = 0.5
) -> NoiseCoefficients:
    """The coefficients of `swap_noise` between two noise levels, float64."""
    alpha, down, up = sde_coefficients(sigma_next, eta)
    return NoiseCoefficients(alpha, (down - sigma_next) / (sigma - sigma_next), up)


def swap_noise(
    target: Float[Array, "B T C"],
    anchor: Float[Array, "B T C"],
    noise: Float[Array, "B T C"] | None,
    c: NoiseCoefficients,
) -> Float[Array, "B T C"]:
    """Replace part of the noise of `target`, reached from `anchor`, by `noise`.

    Source: ltx_core/components/diffusion_steps.py: Res2sDiffusionStep.step.
    """
    x = c.alpha * (target + c.j * (anchor - target))
    return x if noise is None else x + c.up * noise


def normalise(noise: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    """Zero mean and unit (unbiased) deviation over the last two axes.

    The reference normalises the whole tensor first, which this undoes.
    """
    centred = noise - jnp.mean(noise, axis=(-2, -1), keepdims=True)
    return centred / jnp.std(centred, axis=(-2, -1), ddof=1, keepdims=True)


def _interleave(*columns: np.ndarray) -> np.ndarray:
    return np.stack(columns, axis=1).reshape(-1)


def _res2s_table(eta: float | int, bong: bool, sigmas: np.ndarray) -> Table:
    s = _checked(sigmas)
    if np.any(np.diff(s) == 0):
        raise ValueError(
            f"res2s: sigmas must fall strictly, got {s}; build the table with "
            "numerics='exact' or take fewer steps"
        )
    ends_at_zero = s[-1] == 0
    if ends_at_zero:
        s = np.append(s[:-1], SMALLEST_SIGMA)
    sigma, after = s[:-1], s[1:]
    middle = np.sqrt(sigma * after)
    h = np.log(sigma / after)
    _, b1, _ = res2s_coefficients(h)
    none, c = np.zeros_like(h), -np.expm1(-h / 2)
    refine = bong & (h < REFINE_BELOW_H) & (sigma > REFINE_ABOVE_SIGMA)
    first = noise_coefficients(sigma, middle, eta)
    second = noise_coefficients(sigma, after, eta)
    rows = Res2sRow(
        fresh=_interleave(np.ones_like(refine), refine),
        g=_interleave(none, np.where(refine, c / (1 - c), 0.0)),
        ratio=_interleave(1 - c, after / sigma),
        b=_interleave(none, h * b1),
        noise=NoiseCoefficients(*map(_interleave, first, second)),
    )
    call = _interleave(sigma, middle)
    step = np.repeat(np.arange(len(sigma)), 2)
    if ends_at_zero:
        last = Res2sRow(np.True_, 0.0, 0.0, 0.0, NoiseCoefficients(1.0, 0.0, 0.0))
        rows = jax.tree.map(lambda a, end: np.append(a, end), rows, last)
        call, step = np.append(call, s[-1]), np.append(step, step[-1])
    return _table(call, step, rows)


def _res2s_init(x: AV) -> tuple[AV, AV]:
    return _zeros(x), _zeros(x)


def _res2s_step(
    x: AV, x0: AV, carry: tuple[AV, AV], row: Res2sRow, noise: AV | None
) -> tuple[AV, tuple[AV, AV]]:
    """One call. carry: the anchor and the x0 of the row before."""
    anchor, last = carry
    anchor = each(
        lambda x, d, a: jnp.where(row.fresh, x + row.g * (x - d), a), x, last, anchor
    )
    target = each(
        lambda x0, a, d: x0 + row.ratio * (a - x0) + row.b * (d - x0), x0, anchor, last
    )
    noise = AV(None, None) if noise is None else each(normalise, noise)
    x = each(partial(swap_noise, c=row.noise), target, anchor, noise)
    return x, (anchor, x0)

"""Noise levels and learning rates, both as functions of the step.

A sigma table holds steps + 1 falling noise levels from 1 (noise) to 0 (data), built on
the host: sampling scans over it, so another table of the same length never recompiles.
`ltx2` shifts an even grid s towards noise, `e / (e + 1/s - 1)` with `e = exp(mu)` and
mu growing with the number of tokens, and stretches it so that the last level above zero
is `terminal`. Learning-rate schedules are optax's where it has them, under the names of
the training configuration.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from scipy.special import betaincinv

Real = float | int
FEW_TOKENS, MANY_TOKENS = 1024, 4096
DISTILLED = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
STAGE2_DISTILLED = (0.909375, 0.725, 0.421875, 0.0)


def _check_steps(name: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"{name}: steps must be at least 1, got {steps} (use 30)")


def shift(tokens: int, base: Real = 0.95, maximum: Real = 2.05) -> float:
    """mu: `base` at 1024 tokens, `maximum` at 4096, linear inside and beyond.

    Source: ltx_core/components/schedulers.py: LTX2Scheduler.
    """
    slope = (maximum - base) / (MANY_TOKENS - FEW_TOKENS)
    return tokens * slope + (base - slope * FEW_TOKENS)


def ltx2(
    steps: int,
    *,
    tokens: int = MANY_TOKENS,
    base_shift: Real = 0.95,
    max_shift: Real = 2.05,
    terminal: Real = 0.1,
    numerics: Literal["exact", "reference"] = "exact",
) -> Float[np.ndarray, " N"]:
    """The default schedule of LTX-2: `steps + 1` sigmas, the last one 0.

    Args:
        steps: number of steps, at least 1.
        tokens: latent tokens that set the shift; the one- and two-stage pipelines use
            4096 whatever the size.
        base_shift: mu at 1024 tokens.
        max_shift: mu at 4096 tokens.
        terminal: the last sigma above zero.
        numerics: "exact" rounds once from float64; "reference" repeats the float32
            operation order, which cancels visibly for many tokens.

    Source: ltx_core/components/schedulers.py: LTX2Scheduler.
    """
    _check_steps("ltx2", steps)
    mu = shift(tokens, base_shift, max_shift)
    if numerics == "reference":
        return _ltx2_float32(steps, math.exp(mu), terminal)
    sigma = np.arange(steps, 0, -1) / steps
    # 1 - e / (e + 1/s - 1) without its cancellation.
    clean = (1 / sigma - 1) / (math.exp(mu) + 1 / sigma - 1)
    if steps > 1:
        clean *= (1 - terminal) / clean[-1]
    return np.append(1 - clean, 0.0).astype(np.float32)


def _ltx2_float32(steps: int, e: float, terminal: Real) -> np.ndarray:
    one = np.float32(1)
    # The even grid counts from both ends, each value rounded once.
    step = np.float64(np.float32(-1) / np.float32(steps))
    i = np.arange(steps)
    sigma = np.where(i < (steps + 1) // 2, 1 + step * i, -step * (steps - i))
    sigma = sigma.astype(np.float32)
    # A scalar over an array is the array's reciprocal times the scalar.
    sigma = one / (np.float32(e) + (one / sigma - one)) * np.float32(e)
    clean = one - sigma
    if clean[-1] > 0:
        clean = clean / (clean[-1] / np.float32(1 - terminal))
    return np.append(one - clean, np.float32(0))


def distilled() -> Float[np.ndarray, " N"]:
    """The eight steps the distilled checkpoints were trained for."""
    return np.array(DISTILLED, np.float32)


def stage2_distilled() -> Float[np.ndarray, " N"]:
    """The three steps of the second stage."""
    return np.array(STAGE2_DISTILLED, np.float32)


def linear_quadratic(
    steps: int, linear_steps: int | None = None, *, threshold: Real = 0.025
) -> Float[np.ndarray, " N"]:
    """Sigmas falling linearly by `threshold`, then along a parabola to 0.

    The parabola `a i^2 + b i + c` in the noise removed meets the line with its value
    and slope at `linear_steps` (default: half of the steps).

    Raises:
        ValueError: unless 1 <= linear_steps <= steps.

    Source: ltx_core/components/schedulers.py: LinearQuadraticScheduler.
    """
    _check_steps("linear_quadratic", steps)
    if steps == 1:
        return np.array([1.0, 0.0], np.float32)
    n = steps // 2 if linear_steps is None else linear_steps
    if not 1 <= n <= steps:
        raise ValueError(
            f"linear_quadratic: linear_steps must be in 1..{steps}, got {n} "
            f"(use {steps // 2})"
        )
    i = np.arange(steps, dtype=np.float64)
    removed = i * threshold / n
    if n < steps:
        rest = (n - threshold * steps) / (steps - n) ** 2
        a, b = rest / n, threshold / n - 2 * rest
        removed = np.where(i < n, removed, a * i**2 + b * i + a * n**2)
    return np.append(1 - removed, 0.0).astype(np.float32)


def beta(
    steps: int,
    *,
    alpha: Real = 0.6,
    beta: Real = 0.6,
    mu: Real = 2.37,
    levels: int = 10000,
) -> Float[np.ndarray, " N"]:
    """Sigmas at the quantiles of a beta distribution, shifted by mu, then 0.

    Equal neighbours on the grid of `levels` noise levels are kept once, so that very
    many steps give a shorter table.

    Source: arXiv 2407.12173; ltx_core/components/schedulers.py: BetaScheduler.
    """
    _check_steps("beta", steps)
    quantile = 1 - np.linspace(0, 1, steps, endpoint=False)
    index = np.rint(betaincinv(alpha, beta, quantile) * (levels - 1))
    t = (np.array(list(dict.fromkeys(index))) + 1) / levels
    e = math.exp(mu)
    return np.append(e / (e + 1 / t - 1), 0.0).astype(np.float32)


def constant(lr: Real) -> optax.Schedule:
    """The same learning rate at every step."""
    return optax.constant_schedule(lr)


def linear_decay(lr: Real, steps: int, end_factor: Real = 0.1) -> optax.Schedule:
    """From `lr` to `lr * end_factor` over `steps`, constant afterwards.

    Source: ltx_trainer/trainer.py: LinearLR, the default schedule.
    """
    _check_steps("linear_decay", steps)
    return optax.linear_schedule(lr, lr * end_factor, steps)


def cosine(lr: Real, steps: int, *, end_factor: Real = 0.0) -> optax.Schedule:
    """From `lr` to `lr * end_factor` along half a cosine, constant afterwards.

    Source: ltx_trainer/trainer.py: CosineAnnealingLR.
    """
    _check_steps("cosine", steps)
    return optax.cosine_decay_schedule(lr, steps, alpha=end_factor)


def restarts(
    lr: Real, steps: int, *, cycle: int, growth: int = 1, end_factor: Real = 0.0
) -> optax.Schedule:
    """Half cosines from `lr` down, one after the other.

    Args:
        lr: at the begin of each.
        steps: for which there are cycles.
        cycle: steps of the first one, at least 1.
        growth: each next one is this many times as long.
        end_factor: a cycle falls towards `lr * end_factor`.

    Source: ltx_trainer/trainer.py: CosineAnnealingWarmRestarts; arXiv 1608.03983.
    """
    _check_steps("restarts", min(cycle, steps))
    starts, lengths = [0], [cycle]
    while starts[-1] + lengths[-1] <= steps:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * growth)
    begins, sizes = jnp.asarray(starts), jnp.asarray(lengths)

    def rate(count: Any) -> Array:
        at = jnp.searchsorted(begins, count, side="right") - 1
        part = (count - begins[at]) / sizes[at]
        fall = 0.5 * (1 + jnp.cos(jnp.pi * part))
        return lr * (end_factor + (1 - end_factor) * fall)

    return rate


def polynomial(
    lr: Real, steps: int, *, power: Real = 1.0, end_factor: Real = 0.0
) -> optax.Schedule:
    """From `lr` to `lr * end_factor` as (1 - t / steps)^power, constant afterwards.

    Source: ltx_trainer/trainer.py: PolynomialLR.
    """
    _check_steps("polynomial", steps)
    return optax.polynomial_schedule(lr, lr * end_factor, power, steps)


def warmed(after: optax.Schedule, warmup: int) -> optax.Schedule:
    """Rise from 0 to a schedule's first value over `warmup` steps, then follow it."""
    if warmup == 0:
        return after
    up = optax.linear_schedule(0.0, np.asarray(after(0)).item(), warmup)
    return optax.join_schedules([up, after], [warmup])

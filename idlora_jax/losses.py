"""The training loss and the noise levels it is taken at.

The network predicts the velocity `noise - clean`; the loss is its mean squared error
over the tokens that are denoised. Noise levels are drawn from a logit-normal, shifted
towards noise as the number of tokens grows. Draws (`SigmaDraws`) are values, so that
recorded ones run through the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from idlora_jax.schedules import shift


def masked_mse(
    pred: Float[Array, "B T C"],
    target: Float[Array, "B T C"],
    mask: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Mean squared error over the tokens where `mask` is True, in float32.

    0 if no token is. Masked tokens may hold anything, also NaN: neither the loss nor
    its gradient sees them.

    Source: ltx_trainer/training_strategies/audio_ref_only_ic.py: compute_loss.
    """
    keep = mask[..., None]
    diff = pred.astype(jnp.float32) - target.astype(jnp.float32)
    diff = jnp.where(keep, diff, 0.0)
    count = jnp.sum(mask) * pred.shape[-1]
    return jnp.sum(diff * diff) / jnp.maximum(count, 1)


def by_level(
    name: str, values: Float[Array, " n"], sigmas: Sequence[float]
) -> dict[str, float]:
    """A loss at each noise level, by names such as `video_loss@0.25`.

    Args:
        name: of the loss.
        values: what it is at each level.
        sigmas: the levels.
    """
    pairs = zip(sigmas, values, strict=True)
    return {f"{name}@{sigma:g}": float(value) for sigma, value in pairs}


class SigmaDraws(NamedTuple):
    """What a noise level is made of, [B] each: a normal and two uniforms in [0, 1)."""

    normal: Float[Array, " B"]
    uniform: Float[Array, " B"]
    prob: Float[Array, " B"]


def sigma_draws(key: PRNGKeyArray, batch: int) -> SigmaDraws:
    """Draw for `batch` samples."""
    normal, uniform, prob = jax.random.split(key, 3)
    return SigmaDraws(
        jax.random.normal(normal, (batch,)),
        jax.random.uniform(uniform, (batch,)),
        jax.random.uniform(prob, (batch,)),
    )


def uniform(
    draws: SigmaDraws, low: float | int = 0.0, high: float | int = 1.0
) -> Float[Array, " B"]:
    """Sigmas uniform in [low, high)."""
    return low + (high - low) * draws.uniform


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def shifted_logit_normal(
    draws: SigmaDraws,
    tokens: int,
    generation: Literal["2.0", "2.3"],
    *,
    eps: float = 1e-3,
    uniform_prob: float = 0.1,
) -> Float[Array, " B"]:
    """Sigmas `sigmoid(normal + mu)`, mu from the number of (video) tokens.

    Generation 2.3 stretches the values so that the 0.5 and 99.9 percentiles become 0
    and 1, reflects what falls below `eps`, clamps, and replaces a share `uniform_prob`
    by uniform values in [eps, 1).

    Source: ltx_trainer/timestep_samplers.py: ShiftedLogitNormalTimestepSampler of
        either generation.
    """
    mu = shift(tokens)
    sigma = jax.nn.sigmoid(draws.normal + mu)
    if generation == "2.0":
        return sigma
    low, high = _sigmoid(mu - 2.5758), _sigmoid(mu + 3.0902)
    sigma = (sigma - low) / (high - low)
    sigma = jnp.where(sigma >= eps, sigma, 2 * eps - sigma)
    sigma = jnp.clip(sigma, 0.0, 1.0)
    return jnp.where(draws.prob > uniform_prob, sigma, uniform(draws, eps, 1.0))

"""Small streams and models with known answers, shared by the sampling tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from idlora_jax import denoise
from idlora_jax.types import AV, Branch, Stream, each, stream

MEAN, DEVIATION = 0.4, 0.6


def toy_stream(seed: int, tokens: int, fixed: int = 0, channels: int = 4) -> Stream:
    """Noise everywhere except in the last `fixed` tokens, which are 3."""
    shape = (2, tokens, channels)
    x = jax.random.normal(jax.random.key(seed), shape)
    denoised = jnp.broadcast_to(jnp.arange(tokens) < tokens - fixed, shape[:2])
    clean = jnp.full(shape, 3.0)
    x = jnp.where(denoised[..., None], x, clean)
    return stream(x, clean, denoised, jnp.zeros((2, 1, tokens, 2)))


def toy_pair(fixed: int = 0) -> AV:
    """Six video tokens and five audio tokens."""
    return AV(toy_stream(0, 6, fixed), toy_stream(1, 5, fixed))


def gaussian_x0(x: jax.Array, sigma: Any) -> jax.Array:
    """E[x0 | x] for data from N(MEAN, DEVIATION^2): the exact denoiser."""
    signal = (1 - sigma) * DEVIATION**2
    gain = signal / ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2)
    return MEAN + gain * (x - (1 - sigma) * MEAN)


def gaussian(streams: AV, sigma: Any, weights: Any, memory: Any) -> tuple[AV, Any]:
    """`gaussian_x0` as a `Denoise`."""
    return each(lambda s: gaussian_x0(s.x, sigma), streams), memory


def gaussian_path(x: jax.Array, sigma: float) -> jax.Array:
    """Where the exact flow takes x (at sigma 1) at `sigma`."""
    deviation = ((1 - sigma) ** 2 * DEVIATION**2 + sigma**2) ** 0.5
    return (1 - sigma) * MEAN + deviation * x


def apply(
    variables: Any,
    prepared: Any,
    streams: AV,
    sigma: AV,
    branches: tuple[Branch, ...],
    *,
    targets: AV,
    mode: denoise.Mode,
) -> tuple[AV, ...]:
    """A stand-in for the transformer: every property of a branch moves the answer."""

    def velocity(branch: Branch, s: Stream, level: jax.Array) -> jax.Array:
        change = variables["scale"] * (1 + branch.prompt) + 0.1 * len(branch.skip)
        v = jnp.tanh(change * s.x) + prepared["bias"] + level[:, None, None]
        if branch.use_ref:
            return v + 0.3 * jnp.mean(s.x, axis=1, keepdims=True)
        # What a pass without the reference returns on its rows is arbitrary.
        return jnp.where(s.is_ref[..., None], jnp.nan, v)

    return tuple(
        each(lambda s, level, b=b: velocity(b, s, level), streams, sigma)
        for b in branches
    )


def variables(scale: float = 0.5) -> dict[str, jax.Array]:
    return {"scale": jnp.array(scale)}


def prepared(bias: float = 0.1) -> dict[str, jax.Array]:
    return {"bias": jnp.array(bias)}

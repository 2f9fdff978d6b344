"""Random numbers for a batch: from one key, or from one key per sample.

With one key per sample, a sample gets the same numbers in any company.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

Keys = Key[Array, ""] | Key[Array, " B"] | UInt32[Array, "2"]
"""One key for all samples, or one for each."""


def per_sample(key: Keys) -> bool:
    """Whether this is one key per sample."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 1


def split(key: Keys, count: int) -> Array:
    """`count` times as many keys, on a new first axis."""
    if not per_sample(key):
        return jax.random.split(key, count)
    return jax.vmap(lambda k: jax.random.split(k, count), out_axes=1)(key)


def normal(key: Keys, shape: Sequence[int]) -> Float[Array, "B ..."]:
    """Standard normal float32 of a shape whose first axis counts the samples.

    Raises:
        ValueError: if there is not one key per sample.
    """
    if not per_sample(key):
        return jax.random.normal(key, shape, jnp.float32)
    if len(key) != shape[0]:
        raise ValueError(f"keys: {len(key)} for {shape[0]} samples; give one for each")
    draw = jax.vmap(lambda k: jax.random.normal(k, shape[1:], jnp.float32))
    return draw(key)

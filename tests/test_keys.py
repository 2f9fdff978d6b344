"""Numbers for a batch, from one key or from one for each sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import keys

BOTH = jax.vmap(jax.random.key)(jnp.array([1, 2]))


def test_a_sample_gets_the_numbers_of_its_own_key():
    found = keys.normal(BOTH, (2, 3, 4))
    for n in range(2):
        alone = keys.normal(BOTH[n], (1, 3, 4))
        np.testing.assert_array_equal(found[n : n + 1], alone)
        np.testing.assert_array_equal(keys.normal(BOTH[n : n + 1], (1, 3, 4)), alone)


def test_keys_are_split_one_by_one():
    found = keys.split(BOTH, 3)
    assert found.shape == (3, 2)
    for n in range(2):
        alone = keys.split(BOTH[n], 3)
        assert jnp.array_equal(found[:, n], alone)


def test_a_raw_key_is_one_key():
    raw = jax.random.PRNGKey(0)
    assert not keys.per_sample(raw) and keys.split(raw, 3).shape == (3, 2)
    assert keys.normal(raw, (3, 2)).shape == (3, 2)


def test_there_is_one_key_for_each_sample():
    with pytest.raises(ValueError, match="2 for 3 samples; give one for each"):
        keys.normal(BOTH, (3, 4))

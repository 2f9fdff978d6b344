"""The one dense layer, and dropout on its adapter's path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idlora_jax import adapters
from idlora_jax.model.layers import Dense, dropped


def test_dropout_keeps_the_mean_and_leaves_out_its_share():
    x = jnp.full((100, 200), 2.0)
    key = jax.random.key_data(jax.random.key(0))
    y = np.asarray(dropped(x, key, jnp.asarray(0.25)))
    np.testing.assert_allclose(np.unique(y), [0, 2 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 2.0, rtol=0.02)
    np.testing.assert_allclose((y == 0).mean(), 0.25, atol=0.02)


def test_dropout_keeps_the_dtype():
    key = jax.random.key_data(jax.random.key(0))
    y = dropped(jnp.ones((4, 8), jnp.bfloat16), key, jnp.asarray(0.5))
    assert y.dtype == jnp.bfloat16


def test_a_dense_layer_drops_inputs_of_the_adapter_alone():
    layer, x = Dense(8), jnp.ones((2, 16))
    params = layer.init(jax.random.key(0), x)["params"]
    adapter = adapters.init(jax.random.key(1), {"up": params}, 4, ("up",))
    adapter = jax.tree.map(jnp.ones_like, adapter)

    def y(lora: Any) -> jax.Array:
        return layer.apply({"params": params, "lora": lora["up"]}, x)  # pyright: ignore

    with_rate = lambda r: adapters.with_dropout(adapter, jax.random.key(2), r)
    np.testing.assert_array_equal(y(with_rate(0.0)), y(adapter))
    base = layer.apply({"params": params}, x)
    changed = np.asarray(y(with_rate(0.5)) - base)  # pyright: ignore
    # Each of the 16 inputs adds 4 to the change, or 8, or nothing.
    assert set(np.unique(np.round(changed, 3) % 8)) == {0.0}
    assert 0 < changed.mean() < 2 * 64
    assert (changed != np.asarray(y(adapter) - base)).any()  # pyright: ignore

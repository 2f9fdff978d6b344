"""Masked loss and noise-level samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import losses


def pair(key: int = 0) -> tuple[jax.Array, jax.Array]:
    return tuple(jax.random.normal(jax.random.key(key), (2, 2, 6, 4)))


def test_loss_of_half_a_mask_is_the_mse_of_that_half():
    pred, target = pair()
    mask = jnp.arange(6)[None].repeat(2, 0) < 3
    want = jnp.mean((pred[:, :3] - target[:, :3]) ** 2)
    np.testing.assert_allclose(losses.masked_mse(pred, target, mask), want, rtol=1e-6)


def test_loss_equals_both_forms_of_the_reference():
    pred, target = pair(1)
    mask = jnp.array([[1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1]], bool)
    m = mask[..., None].astype(jnp.float32)
    divided = jnp.mean((pred - target) ** 2 * m / jnp.mean(m))
    np.testing.assert_allclose(
        losses.masked_mse(pred, target, mask), divided, rtol=1e-6
    )
    everything = losses.masked_mse(pred, target, jnp.ones_like(mask))
    np.testing.assert_allclose(everything, jnp.mean((pred - target) ** 2), rtol=1e-6)


def test_empty_mask_gives_zero_and_no_gradient():
    pred, target = pair(2)
    mask = jnp.zeros((2, 6), bool)
    loss, grad = jax.value_and_grad(losses.masked_mse)(pred, target, mask)
    assert loss == 0
    np.testing.assert_array_equal(grad, 0)


def test_masked_tokens_may_hold_nan():
    pred, target = pair(3)
    mask = jnp.arange(6)[None].repeat(2, 0) < 3
    spoiled = pred.at[:, 3:].set(jnp.nan)
    loss, grad = jax.value_and_grad(losses.masked_mse)(spoiled, target, mask)
    assert loss == losses.masked_mse(pred, target, mask)
    assert jnp.all(grad[:, 3:] == 0)
    assert jnp.all(jnp.isfinite(grad))


def test_loss_of_bf16_inputs_is_float32():
    pred, target = (x.astype(jnp.bfloat16) for x in pair(4))
    assert losses.masked_mse(pred, target, jnp.ones((2, 6), bool)).dtype == jnp.float32


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_sigmas_lie_in_the_unit_interval_and_grow_with_tokens(generation: str):
    draws = losses.sigma_draws(jax.random.key(0), 4096)
    few, many = (
        losses.shifted_logit_normal(draws, n, generation) for n in (1024, 4096)
    )
    for sigma in (few, many):
        assert jnp.all((sigma > 0) & (sigma <= 1))
    assert jnp.all(many >= few - 1e-6) or generation == "2.3"
    assert jnp.mean(many) > jnp.mean(few) + 0.1


def test_older_sampler_is_a_shifted_sigmoid():
    draws = losses.SigmaDraws(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2))
    sigma = losses.shifted_logit_normal(draws, 4096, "2.0")
    np.testing.assert_allclose(sigma, 1 / (1 + np.exp(-2.05)), rtol=1e-6)


def test_newer_sampler_stretches_reflects_clamps_and_mixes():
    normal = jnp.array([3.0902, -2.5758, 9.0, -9.0, 0.0])
    prob = jnp.array([0.5, 0.5, 0.5, 0.5, 0.05])
    draws = losses.SigmaDraws(normal, jnp.full(5, 0.25), prob)
    sigma = losses.shifted_logit_normal(draws, 1024, "2.3")
    np.testing.assert_allclose(sigma[:2], [1, 2e-3], atol=1e-6)
    assert sigma[2] == 1
    np.testing.assert_allclose(sigma[3], 0.2025, atol=1e-4)
    np.testing.assert_allclose(sigma[4], 1e-3 + 0.999 * 0.25, rtol=1e-6)


def test_uniform_fills_its_interval():
    draws = losses.sigma_draws(jax.random.key(1), 4096)
    sigma = losses.uniform(draws, 0.2, 0.8)
    assert jnp.all((sigma >= 0.2) & (sigma < 0.8))
    np.testing.assert_allclose(jnp.mean(sigma), 0.5, atol=0.02)


def test_same_key_draws_the_same():
    a, b = (losses.sigma_draws(jax.random.key(7), 3) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not jnp.allclose(a.uniform, a.prob)


def test_losses_by_level_are_named_after_their_level():
    named = losses.by_level("video_loss", jnp.array([1.0, 2.0]), (0.0625, 0.5))
    assert named == {"video_loss@0.0625": 1.0, "video_loss@0.5": 2.0}
    with pytest.raises(ValueError, match="zip"):
        losses.by_level("loss", jnp.zeros(3), (0.5,))

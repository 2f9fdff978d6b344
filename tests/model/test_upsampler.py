import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.config_upsampler import SCALES, UpsamplerConfig
from idlora_jax.model import upsampler

CHANNELS = 3
PLAIN = UpsamplerConfig(CHANNELS, 32, 1, 3, (2, 1), 1, False)
RATIONAL = UpsamplerConfig(CHANNELS, 32, 1, 3, (2, 1), 1, True)
PICTURES = UpsamplerConfig(CHANNELS, 32, 1, 2, (3, 2), 1, True)
BOTH = UpsamplerConfig(CHANNELS, 32, 0, 3, (2, 1), 2, False)
FORMS = [
    UpsamplerConfig(CHANNELS, 32, 2, dims, space, 1, True)
    for dims, space in itertools.product((2, 3), SCALES.values())
] + [
    UpsamplerConfig(CHANNELS, 32, 1, 2, (2, 1), 1, False),
    UpsamplerConfig(CHANNELS, 32, 1, 3, (1, 1), 2, False),
    PLAIN,
    BOTH,
]

UPSAMPLE = jax.jit(partial(upsampler.upsample, PLAIN))


@functools.cache
def network(cfg):
    """(parameters without zeros, compiled function)."""
    params = upsampler.init(cfg, jax.random.key(0))
    keys = itertools.count(1)
    shift = lambda x: x + 0.1 * jax.random.normal(jax.random.key(next(keys)), x.shape)
    params = jax.tree.map(lambda x: shift(x) if x.ndim == 1 else x, params)
    return params, jax.jit(partial(upsampler.apply, cfg))


def latent(frames=2, batch=1, seed=7):
    return jax.random.normal(jax.random.key(seed), (batch, frames, 3, 4, CHANNELS))


@pytest.mark.parametrize("cfg", FORMS)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7)])
def test_the_size_is_what_the_config_says(cfg, size):
    params = jax.eval_shape(lambda: upsampler.init(cfg, jax.random.key(0)))
    x = jax.ShapeDtypeStruct((2, *size, CHANNELS), jnp.bfloat16)
    y = jax.eval_shape(partial(upsampler.apply, cfg), params, x)
    assert y.shape == (2, *cfg.size(*size), CHANNELS)
    assert y.dtype == jnp.bfloat16


def test_channels_become_blocks_with_the_last_axis_fastest():
    x = jnp.arange(8.0).reshape(1, 1, 1, 8)
    y = upsampler.shuffle(x, (2, 2))
    np.testing.assert_array_equal(y[0, :, :, 0], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(y[0, :, :, 1], [[4, 5], [6, 7]])
    z = upsampler.shuffle(jnp.arange(12.0).reshape(1, 1, 1, 2, 6), (3, 1, 1))
    np.testing.assert_array_equal(z[0, :, 0, :, 0], [[0, 6], [1, 7], [2, 8]])
    assert z.shape == (1, 3, 1, 2, 2)


def test_the_blur_spreads_a_cell_binomially_and_keeps_every_second():
    kernel = upsampler.init(PICTURES, jax.random.key(0))["rational"]["blur"]["kernel"]
    x = jnp.zeros((1, 5, 5, 2)).at[0, 2, 2, 1].set(256.0)
    y = upsampler.blur(x, kernel, 2)
    assert y.shape == (1, 3, 3, 2)
    np.testing.assert_array_equal(y[0, :, :, 0], 0)
    np.testing.assert_array_equal(y[0, 1, :, 1], [6, 36, 6])
    np.testing.assert_array_equal(y[0, 0, :, 1], [1, 6, 1])


def test_statistics_of_zero_and_one_change_nothing():
    params, apply = network(PLAIN)
    zero, one = jnp.zeros(CHANNELS), jnp.ones(CHANNELS)
    found = UPSAMPLE(params, latent(), zero, one)
    np.testing.assert_allclose(found, apply(params, latent()), rtol=1e-5, atol=1e-5)


def test_normalised_latents_are_upsampled_as_the_vae_made_them():
    params, apply = network(PLAIN)
    mean, std = jnp.array([1.0, -2, 0.5]), jnp.array([0.5, 2, 3])
    wide = lambda s: s[None, None, None, None]
    normalised = (latent() - wide(mean)) / wide(std)
    found = UPSAMPLE(params, normalised, mean, std)
    want = apply(params, latent())
    np.testing.assert_allclose(
        found * wide(std) + wide(mean), want, rtol=1e-4, atol=1e-4
    )


def test_the_rational_form_at_scale_two_is_the_plain_one():
    params, apply = network(PLAIN)
    conv = params["shuffle"]
    rest = {name: value for name, value in params.items() if name != "shuffle"}
    blur = {"kernel": jnp.full((5, 5, 1, 1), jnp.nan)}
    renamed = rest | {"rational": {"conv": conv, "blur": blur}}
    found = network(RATIONAL)[1](renamed, latent())
    np.testing.assert_array_equal(found, apply(params, latent()))


def test_in_two_dimensions_frames_are_independent_pictures():
    params, apply = network(PICTURES)
    x = latent(frames=3)
    whole = apply(params, x)
    parts = [apply(params, x[:, n : n + 1]) for n in range(3)]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_in_three_dimensions_every_frame_matters_to_every_other():
    params, apply = network(PLAIN)
    x = latent(frames=4)
    change = jnp.abs(apply(params, x.at[:, -1].add(1.0)) - apply(params, x))
    assert bool((change.max(axis=(2, 3, 4)) > 1e-4).all())


def test_clips_of_a_batch_do_not_mix():
    params, apply = network(PLAIN)
    x = latent(batch=2)
    parts = [apply(params, x[n : n + 1]) for n in range(2)]
    np.testing.assert_allclose(jnp.concatenate(parts), apply(params, x), atol=1e-5)


def test_the_norm_takes_away_the_scale_of_what_it_follows():
    params, apply = network(BOTH)
    louder = params | {"conv_in": jax.tree.map(lambda w: 8 * w, params["conv_in"])}
    np.testing.assert_allclose(
        apply(louder, latent()), apply(params, latent()), atol=1e-3
    )


def test_a_single_picture_stays_one_when_time_is_doubled():
    params, apply = network(BOTH)
    assert apply(params, latent(frames=1)).shape == (1, 1, 6, 8, CHANNELS)


def test_fresh_norms_do_nothing_and_the_blur_sums_to_one():
    params = upsampler.init(PICTURES, jax.random.key(0))
    for norm in (params["norm_in"], params["after_0"]["norm2"]):
        np.testing.assert_array_equal(norm["scale"], 1)
        np.testing.assert_array_equal(norm["bias"], 0)
    kernel = params["rational"]["blur"]["kernel"]
    assert float(kernel.sum()) == 1.0
    np.testing.assert_array_equal(256 * kernel[0, :, 0, 0], [1, 4, 6, 4, 1])


@pytest.mark.parametrize("shape", [(1, 2, 3, 4, 5), (1, 0, 3, 4, CHANNELS)])
def test_a_latent_that_does_not_fit_is_refused(shape):
    params, _ = network(PLAIN)
    with pytest.raises(ValueError, match=r"must be \[B F H W 3\]"):
        upsampler.apply(PLAIN, params, jnp.zeros(shape))

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_sections import TINY_VOCODER

from idlora_jax.config_vocoder import vocoder_config
from idlora_jax.model import vocoder

CFG = vocoder_config({"vocoder": TINY_VOCODER})


@pytest.fixture(scope="module")
def params():
    return vocoder.init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def synthesize():
    return jax.jit(partial(vocoder.synthesize, CFG))


@pytest.fixture(scope="module")
def mel():
    return 4 * jax.random.normal(jax.random.key(1), (2, 5, 64, 2))


def test_the_waveform_is_stereo_bounded_and_as_long_as_the_rates_say(
    synthesize, params, mel
):
    wave = synthesize(params, mel)
    assert wave.shape == (2, 2, 5 * 3 * 2)
    assert CFG.factor == 6
    assert 0 < float(jnp.abs(wave).max()) < 1


def test_tanh_bounds_loud_input_too(synthesize, params, mel):
    assert float(jnp.abs(synthesize(params, 100 * mel)).max()) <= 1


def test_silent_weights_give_silence(synthesize, params, mel):
    zeros = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_array_equal(synthesize(zeros, mel), 0)


def test_the_left_channel_feeds_the_first_half_of_the_features(synthesize, params, mel):
    kernel = params["conv_in"]["kernel"]
    swapped = {
        "kernel": jnp.roll(kernel, 64, axis=1),
        "bias": jnp.zeros(CFG.generator.width),
    }
    other = synthesize(params | {"conv_in": swapped}, mel[..., ::-1])
    np.testing.assert_allclose(other, synthesize(params, mel), atol=1e-6)


def test_samples_do_not_depend_on_distant_frames(synthesize, params):
    mel = jax.random.normal(jax.random.key(1), (1, 24, 64, 2))
    before, after = synthesize(params, mel), synthesize(params, mel.at[:, -1].add(1))
    np.testing.assert_array_equal(before[..., :30], after[..., :30])
    assert bool((before[..., -6:] != after[..., -6:]).any())


def test_a_residual_block_without_weights_passes_its_input():
    block = vocoder.ResBlock(3, (1, 3))
    x = jax.random.normal(jax.random.key(0), (1, 7, 2))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    np.testing.assert_array_equal(block.apply(zeros, x), x)


def test_the_computation_runs_in_the_dtype_of_the_input(params):
    mel = jax.ShapeDtypeStruct((1, 2, 64, 2), jnp.bfloat16)
    wave = jax.eval_shape(partial(vocoder.synthesize, CFG, params), mel)
    assert wave.dtype == jnp.bfloat16


def test_another_number_of_mel_bins_is_refused(params):
    with pytest.raises(ValueError, match=r"expected \[B T 64 2\] with T >= 1, got"):
        vocoder.synthesize(CFG, params, jnp.zeros((1, 3, 80, 2)))

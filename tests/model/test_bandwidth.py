import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_sections import LTX_2_3

from idlora_jax import mel
from idlora_jax.config_vocoder import vocoder_config
from idlora_jax.model import bandwidth

CFG = vocoder_config(LTX_2_3).extension
BUFFERS = {k: jnp.asarray(v) for k, v in bandwidth.bases(CFG).items()}


def noise(samples):
    return 0.1 * jax.random.normal(jax.random.key(0), (1, samples, 2))


def test_the_buffers_have_the_published_shapes():
    shapes = {name: array.shape for name, array in BUFFERS.items()}
    assert shapes == {
        "forward": (512, 1, 514),
        "inverse": (512, 1, 514),
        "mel": (257, 64),
    }


def test_a_short_transform_has_bases_too():
    short = bandwidth.bases(dataclasses.replace(CFG, n_fft=32))
    assert short["mel"].shape == (17, 64) and np.isfinite(short["mel"]).all()


def test_a_frame_is_the_spectrum_of_the_window_that_ends_with_it():
    sound = noise(1200)
    got = bandwidth.log_mel(CFG, BUFFERS, sound)
    assert got.shape == (1, 15, 64, 2)
    t = 9
    piece = np.asarray(sound)[0, (t + 1) * 80 - 512 : (t + 1) * 80]
    spectrum = np.abs(np.fft.rfft(piece * mel.hann_window(512)[:, None], axis=0))
    want = np.log(np.maximum(np.asarray(BUFFERS["mel"]).T @ spectrum, 1e-5))
    np.testing.assert_allclose(got[0, t], want, atol=1e-4)


def test_the_spectrogram_never_looks_ahead():
    sound = noise(800)
    other = bandwidth.log_mel(CFG, BUFFERS, sound.at[:, 400:].add(1))
    got = bandwidth.log_mel(CFG, BUFFERS, sound)
    np.testing.assert_array_equal(got[:, :5], other[:, :5])
    assert bool((got[:, 5:] != other[:, 5:]).any((2, 3)).all())


def test_silence_is_at_the_floor():
    got = bandwidth.log_mel(CFG, BUFFERS, jnp.zeros((1, 160, 2)))
    np.testing.assert_allclose(got, np.log(1e-5), rtol=1e-6)


@pytest.mark.parametrize("hertz", [100.0, 1000.0, 3000.0])
def test_resampling_reproduces_a_sine(hertz):
    def sine(rate):
        time = jnp.arange(rate // 50) / rate
        both = [jnp.sin(2 * np.pi * hertz * time), jnp.cos(2 * np.pi * hertz * time)]
        return jnp.stack(both, axis=-1)[None]

    got = bandwidth.resample(CFG, sine(16000))
    assert got.shape == (1, 960, 2)
    np.testing.assert_allclose(got[:, 30:-30], sine(48000)[:, 30:-30], atol=4e-3)


def test_resampling_repeats_the_edges():
    got = bandwidth.resample(CFG, jnp.full((1, 8, 2), 0.5))
    np.testing.assert_allclose(got, 0.5, atol=2e-3)


def test_the_resampler_is_that_of_the_host():
    sound = noise(200)
    want = mel.resample(np.asarray(sound)[0].T, 16000, 48000, "reference").T
    got = bandwidth.resample(CFG, sound)[0]
    np.testing.assert_allclose(got[30:-30], want[30:-30], atol=1e-6)

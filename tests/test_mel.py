"""Resampling and log-mel spectrograms on signals whose answer is known."""

import math

import numpy as np
import pytest

from idlora_jax import mel

RATES = [(24000, 16000), (44100, 16000), (16000, 24000), (48000, 16000), (8000, 16000)]


def tone(hz, rate, seconds=0.4):
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def stereo(hz, rate, seconds=0.4):
    wave = tone(hz, rate, seconds).astype(np.float32)
    return np.stack([wave, 0.5 * wave])


@pytest.mark.parametrize("numerics", ["exact", "reference"])
@pytest.mark.parametrize(("source", "target"), RATES)
def test_a_tone_stays_the_same_tone(source, target, numerics):
    got = mel.resample(stereo(700, source), source, target, numerics)
    want = stereo(700, target)
    assert got.dtype == np.float32
    assert got.shape[1] == math.ceil(stereo(700, source).shape[1] * target / source)
    inside = np.s_[:, 400:-400]
    np.testing.assert_allclose(got[inside], want[inside], atol=4e-3)


@pytest.mark.parametrize(("numerics", "left"), [("exact", 1e-3), ("reference", 2e-2)])
def test_what_the_target_cannot_hold_is_removed(numerics, left):
    got = mel.resample(stereo(10500, 48000), 48000, 16000, numerics)
    assert np.abs(got[:, 400:-400]).max() < left


def test_the_same_rate_changes_nothing():
    wave = stereo(300, 16000)
    np.testing.assert_array_equal(mel.resample(wave, 16000, 16000), wave)


def test_a_rate_must_be_positive():
    with pytest.raises(ValueError, match="got 0 -> 16000 Hz"):
        mel.resample(stereo(300, 16000), 0, 16000)


@pytest.mark.parametrize(("source", "target"), RATES)
def test_every_phase_of_the_kernel_passes_a_constant(source, target):
    kernel = mel.resample_kernel(source, target)
    common = math.gcd(source, target)
    width = math.ceil(6 * max(1, source / target) / 0.99)
    assert kernel.shape == (target // common, 2 * width + source // common)
    np.testing.assert_allclose(kernel.sum(axis=1), 1.0, atol=4e-3)
    # phase 0 lies on an input sample and is symmetric about it
    taps = kernel[0, : 2 * width + 1]
    np.testing.assert_allclose(taps, taps[::-1], atol=1e-7)


def test_the_mel_bands_have_equal_area_and_cover_the_range():
    filters = mel.mel_filters(16000, 1024, 64)
    assert filters.shape == (513, 64) and filters.dtype == np.float32
    np.testing.assert_allclose(filters.sum(axis=0) * 16000 / 1024, 1.0, rtol=0.3)
    peaks = filters.argmax(axis=0)
    assert np.all(np.diff(peaks) > 0)


def test_the_window_is_periodic():
    window = mel.hann_window(8)
    want = [0, 0.14644661, 0.5, 0.85355339, 1, 0.85355339, 0.5, 0.14644661]
    np.testing.assert_allclose(window, want, atol=1e-7)


@pytest.mark.parametrize("samples", [513, 1600, 10880, 16001])
def test_there_is_one_frame_a_hop_and_one_more(samples):
    picture = mel.log_mel(np.zeros((2, samples), np.float32))
    assert picture.shape == (1 + samples // 160, 64, 2)
    np.testing.assert_allclose(picture, math.log(1e-5), rtol=1e-6)


@pytest.mark.parametrize("hz", [250, 1000, 4000])
def test_a_tone_lights_the_band_around_it(hz):
    picture = mel.log_mel(stereo(hz, 16000))
    brightest = picture[5:-5].mean(axis=0).argmax(axis=0)
    bin_of_tone = round(hz * 1024 / 16000)
    want = mel.mel_filters(16000, 1024, 64)[bin_of_tone].argmax()
    assert np.abs(brightest - want).max() <= 1


def test_half_the_amplitude_is_log_two_less_and_channels_are_apart():
    noise = np.random.default_rng(0).normal(0, 0.3, (1, 8000)).astype(np.float32)
    picture = mel.log_mel(np.concatenate([noise, 0.5 * noise]))
    gap = picture[..., 0] - picture[..., 1]
    np.testing.assert_allclose(gap, math.log(2), atol=1e-5)


def test_a_hop_later_is_a_frame_later():
    noise = np.random.default_rng(1).normal(0, 0.3, (2, 8000)).astype(np.float32)
    early, late = mel.log_mel(noise), mel.log_mel(noise[:, 160:])
    np.testing.assert_allclose(early[5:45], late[4:44], atol=1e-5)


def test_too_short_a_sound_is_refused():
    with pytest.raises(ValueError, match=r"got 512 samples .*more than 512"):
        mel.log_mel(np.zeros((2, 512), np.float32))

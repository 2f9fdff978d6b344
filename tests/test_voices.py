"""Recordings of known silence, clipping and loudness; windows that are chosen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlora_jax import voices

RATE = 16000
GOOD = voices.VoiceReport(5.0, -3.0, -20.0, -19.0, 0.2, 0.0, 0.1, 0.1, 0.0)


def tone(seconds: float, peak: float = 0.1, rate: int = RATE) -> np.ndarray:
    """Stereo, 200 Hz: whole periods in every 20 ms."""
    times = np.arange(round(seconds * rate)) / rate
    wave = peak * np.sin(2 * np.pi * 200 * times).astype(np.float32)
    return np.stack([wave, wave])


def rest(seconds: float) -> np.ndarray:
    return np.zeros((2, round(seconds * RATE)), np.float32)


def hiss(seconds: float, db: float, seed: int = 0) -> np.ndarray:
    normal = np.random.default_rng(seed).normal
    return normal(0, 10 ** (db / 20), (2, round(seconds * RATE))).astype(np.float32)


def join(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate(parts, axis=1)


def test_pauses_are_counted_and_do_not_lower_the_level():
    wave = join(rest(0.5), tone(1), rest(1), tone(2), rest(0.5))
    found = voices.measure(wave, RATE)
    assert found.seconds == 5
    assert found.silent_share == pytest.approx(2 / 5)
    assert (found.leading_s, found.trailing_s) == pytest.approx((0.5, 0.5))
    level = 20 * np.log10(0.1) - 10 * np.log10(2)
    assert found.rms_db == pytest.approx(level, abs=0.01)
    assert found.peak_db == pytest.approx(-20, abs=0.01)


@pytest.mark.parametrize("noise_db", [-80, -60, -50, -45])
def test_pauses_in_a_noisy_room_are_still_pauses(noise_db: float):
    wave = join(rest(0.4), tone(2.6), rest(2))
    found = voices.measure(wave + hiss(5, noise_db), RATE)
    assert found.silent_share == pytest.approx(2.4 / 5, abs=0.01)


def test_a_sound_without_pauses_has_no_silence_however_loud():
    for peak in (0.9, 0.1, 0.003):
        found = voices.measure(tone(2, peak), RATE)
        assert (found.silent_share, found.leading_s, found.trailing_s) == (0, 0, 0)
    assert voices.measure(hiss(2, -30), RATE).silent_share == 0


@given(gain=st.floats(0.05, 3), rate=st.sampled_from([8000, 16000, 44100, 48000]))
def test_gain_shifts_levels_alone(gain: float, rate: int):
    wave = join(tone(0.5, 0.3, rate), 0 * tone(0.5, rate=rate))
    usual, louder = voices.measure(wave, rate), voices.measure(gain * wave, rate)
    step = 20 * np.log10(gain)
    for name in ("peak_db", "rms_db", "loudness"):
        change = getattr(louder, name) - getattr(usual, name)
        assert change == pytest.approx(step, abs=0.01), name
    assert louder.silent_share == pytest.approx(usual.silent_share, abs=0.02)


def test_silence_has_no_level_and_is_all_silent():
    found = voices.measure(rest(1), RATE)
    assert found.silent_share == 1 and found.clipped_share == 0
    levels = found.peak_db, found.rms_db, found.loudness
    assert levels == (-np.inf,) * 3
    assert (found.leading_s, found.trailing_s) == (1, 0)


def test_an_offset_is_found_and_is_no_sound():
    wave = join(tone(1), rest(1))
    wave[1] -= 0.25
    found = voices.measure(wave, RATE)
    assert found.dc_offset == pytest.approx(-0.25, abs=1e-4)
    assert found.silent_share == pytest.approx(0.5)


def test_runs_at_full_scale_are_clipped_and_single_peaks_are_not():
    wave = np.zeros((2, 1000), np.float32)
    wave[0, ::10] = 1
    assert voices.measure(wave, RATE).clipped_share == 0
    wave[1, 100:105] = -1
    wave[0, 501] = 1  # beside the peak at 500
    assert voices.measure(wave, RATE).clipped_share == pytest.approx(7 / 2000)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
def test_loudness_is_that_of_the_standards_example(rate: int):
    """BS.1770: a full-scale sine of 997 Hz on one channel reads -3.01 LUFS."""
    wave = np.zeros((2, 2 * rate))
    wave[0] = np.sin(2 * np.pi * 997 * np.arange(2 * rate) / rate)
    assert voices.loudness(wave, rate) == pytest.approx(-3.01, abs=0.05)
    assert voices.loudness(wave[:, : rate // 10], rate) == pytest.approx(-3, abs=0.2)


def test_the_ear_is_weighted_as_in_the_standards_tables():
    """Both filters at 48 kHz, as the frequency response that the tables give."""
    shelf = [1.53512485958697, -2.69169618940638, 1.19839281085285]
    shelf_poles = [1, -1.69065929318241, 0.73248077421585]
    high, high_poles = [1, -2, 1], [1, -1.99004745483398, 0.99007225036621]
    impulse = np.eye(1, 1 << 15)
    found = np.fft.rfft(voices._k_weighted(impulse, 48000)[0])
    z = np.exp(-2j * np.pi * np.arange(len(found)) / (1 << 15))[:, None] ** [0, 1, 2]
    want = (z @ shelf) * (z @ high) / ((z @ shelf_poles) * (z @ high_poles))
    np.testing.assert_allclose(abs(found[50:]), abs(want[50:]), rtol=2e-3)


def test_loudness_leaves_out_pauses():
    whole = voices.loudness(tone(4), RATE)
    assert voices.loudness(join(tone(4), rest(6)), RATE) == pytest.approx(whole, abs=1)
    assert voices.loudness(join(tone(4), rest(6)), RATE) > whole - 0.5


# Cropping


@pytest.mark.parametrize("where", ["none", "start", "center", "loudest"])
def test_a_recording_that_is_no_longer_is_left_as_it_is(where: voices.Crop):
    wave = tone(5)
    for seconds in (5, 7):
        assert voices.crop(wave, RATE, seconds, where) is wave
    assert voices.crop(wave, RATE, 1, "none") is wave


def part_of(wave: np.ndarray, part: np.ndarray) -> int:
    """Where a part was cut out of a recording, found by its middle."""
    found = [
        int(at) - 800
        for at in np.flatnonzero(wave[0] == part[0, 800])
        if np.array_equal(wave[0, at : at + 800], part[0, 800:1600])
    ]
    assert len(found) == 1
    return found[0]


def test_start_and_center_are_where_they_say():
    wave = hiss(3, -20)
    start = voices.crop(wave, RATE, 1, "start")
    center = voices.crop(wave, RATE, 1, "center")
    assert start.shape == center.shape == (2, RATE)
    assert (part_of(wave, start), part_of(wave, center)) == (0, RATE)


def test_cut_edges_fade_and_the_recordings_own_do_not():
    wave = np.ones((2, 3 * RATE), np.float32)
    start, center = (voices.crop(wave, RATE, 1, w) for w in ("start", "center"))
    fade = round(0.005 * RATE)
    assert start[0, 0] == 1 and start[0, -1] < 1e-3
    assert max(center[0, 0], center[0, -1]) < 1e-3
    assert (center[:, fade:-fade] == 1).all() and (wave == 1).all()
    assert (np.diff(center[0, :fade]) > 0).all()


def test_the_loudest_window_holds_speech_rather_than_pauses():
    speech = hiss(2, -20)
    wave = join(rest(3), hiss(1, -20, 1), rest(2), speech, rest(1))
    at = part_of(wave, voices.crop(wave, RATE, 2, "loudest"))
    assert abs(at - 6 * RATE) <= 0.02 * RATE


def test_a_bang_is_not_taken_for_speech():
    bang = hiss(0.1, -1).clip(-1, 1)
    wave = join(rest(1), bang, rest(2.9), hiss(2, -20), rest(1))
    at = part_of(wave, voices.crop(wave, RATE, 2, "loudest"))
    assert abs(at - 4 * RATE) <= 0.02 * RATE


def test_a_near_voice_is_preferred_to_a_far_one():
    wave = join(hiss(2, -35, 1), hiss(2, -20), hiss(2, -35, 2))
    at = part_of(wave, voices.crop(wave, RATE, 2, "loudest"))
    assert abs(at - 2 * RATE) <= 0.02 * RATE


@given(
    seconds=st.floats(0.001, 3),
    samples=st.integers(1, 40000),
    where=st.sampled_from(["start", "center", "loudest"]),
)
def test_a_crop_has_its_length_and_is_never_louder(
    seconds: float, samples: int, where: voices.Crop
):
    wave = np.random.default_rng(samples).uniform(-1, 1, (2, samples))
    part = voices.crop(wave, RATE, seconds, where)
    assert part.shape == (2, min(samples, round(seconds * RATE)))
    assert np.abs(part).max() <= np.abs(wave).max()
    assert np.isfinite(voices.measure(part, RATE).peak_db)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: voices.crop(rest(0), RATE, 5, "start"), "crop: got 0 samples"),
        (lambda: voices.crop(rest(1), RATE, 0, "start"), "use 5 s"),
        (lambda: voices.measure(rest(0), RATE), "measure: got 0 samples"),
        (lambda: voices.loudness(rest(1), 0), "positive rate"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


# Warnings


def test_a_good_recording_has_no_warning():
    assert voices.warnings(GOOD) == ()


@pytest.mark.parametrize(
    ("changes", "message", "advice"),
    [
        ({"seconds": 2.0}, "2.0 s of voice", "give 4 to 6 s"),
        ({"seconds": 12.0}, "about five seconds", "--reference-crop loudest"),
        ({"silent_share": 0.55}, "55% of the recording is silence", "cut the pauses"),
        (
            {"clipped_share": 0.02},
            "2.00% of the samples are clipped",
            "record it again",
        ),
        ({"rms_db": -52.0}, "very quiet (-52 dB", "raise its level"),
    ],
)
def test_a_bad_recording_is_said_to_be_so_with_advice(changes, message, advice):
    (found,) = voices.warnings(dataclasses.replace(GOOD, **changes))
    assert message in found and advice in found


def test_every_fault_is_named():
    found = voices.measure(rest(9), RATE)
    assert len(voices.warnings(found)) == 3

"""Pictures of clips: what stands where is read back from the pixels."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlora_jax import sheets
from idlora_jax.sheets import Axis

RATE = 24000


def test_a_contact_sheet_holds_every_frame_under_its_label():
    red = np.full((3, 16, 16, 3), (255, 0, 0), np.uint8)
    blue = np.full((5, 24, 16, 3), (0, 0, 255), np.uint8)
    sheet = sheets.contact_sheet([red, blue], ["red", "blue"], gap=2)
    assert sheet.dtype == np.uint8
    assert np.all(sheet == (255, 0, 0), axis=-1).sum() == red[..., 0].size
    assert np.all(sheet == (0, 0, 255), axis=-1).sum() == blue[..., 0].size
    assert (sheet > 200).all(axis=-1).any()  # letters
    large = sheets.contact_sheet([red], ["red"], scale=2)
    assert np.all(large == (255, 0, 0), axis=-1).sum() == 4 * red[..., 0].size
    with pytest.raises(ValueError, match="got 1 rows and 2 labels"):
        sheets.contact_sheet([red], ["a", "b"])


def marked(frames, at, height=48, width=64):
    """Black frames, but for one that is red."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[at] = (255, 0, 0)
    return clip


def burst(seconds, start, length=0.04, hertz=1000.0):
    """Silence, and a tone of `length` from second `start` on: [2 N]."""
    t = np.arange(round(seconds * RATE)) / RATE
    inside = (t >= start - 1e-9) & (t < start + length)
    tone = 0.4 * np.sin(2 * np.pi * hertz * t) * inside
    return np.stack([tone, tone]).astype(np.float32)


def middle(mask):
    """The mean column of the pixels that are set."""
    return float(np.nonzero(mask)[1].mean())


@given(frames=st.integers(1, 400), most=st.integers(2, 16))
def test_frames_are_chosen_at_equal_steps_from_the_first(frames, most):
    index = sheets.chosen(frames, most)
    assert index[0] == 0 and index[-1] < frames and 1 <= len(index) <= most
    assert len(set(np.diff(index))) <= 1
    assert len(index) * 4 >= min(frames, most)


@pytest.mark.parametrize("frames", [9, 17, 25, 121])
@pytest.mark.parametrize("most", [9, 12])
def test_the_last_frame_of_a_clip_of_8k_and_1_is_shown(frames, most):
    assert sheets.chosen(frames, most)[-1] == frames - 1


@pytest.mark.parametrize("size", [(48, 64), (64, 36), (16, 200)])
@pytest.mark.parametrize(("frames", "fps"), [(9, 8), (9, 25), (25, 25), (121, 30)])
def test_a_frame_stands_above_its_sound(frames, size, fps):
    index = sheets.shown((frames, *size, 3), 1200)
    assert index[-1] == frames - 1
    for at in index[[1, -1]].tolist():
        clip, wave = marked(frames, at, *size), burst(frames / fps, at / fps)
        sheet = sheets.timeline(clip, wave, RATE, fps=fps).astype(int)
        red = (abs(sheet - (255, 0, 0)) < 40).all(axis=-1)
        blue = (sheet == sheets.WAVE).all(axis=-1)
        loud = np.flatnonzero(blue.sum(axis=0) > 4)
        hot = (sheet[..., 0] > 230) & (sheet[..., 2] < 150) & ~red
        heard = np.flatnonzero(hot.any(axis=0))
        assert abs(loud[0] - middle(red)) < 4
        assert abs(heard.mean() - loud.mean()) < 0.025 * 1100 * fps / frames
        rows = [np.nonzero(mask)[0].mean() for mask in (red, blue, hot)]
        assert rows == sorted(rows)


@pytest.mark.parametrize("sound", ["silent", "none", "short", "long", "one sample"])
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_every_clip_has_a_picture_of_the_asked_width(frames, sound):
    waves = {
        "silent": np.zeros((2, frames * 960), np.float32),
        "none": None,
        "short": burst(frames / 50, 0.01),
        "long": burst(frames / 10, 0.02),
        "one sample": np.full((2, 1), 0.1, np.float32),
    }
    clip = marked(frames, 0, 30, 40)
    sheet = sheets.timeline(clip, waves[sound], RATE, width=640)
    assert sheet.shape[1] == 640 and sheet.dtype == np.uint8
    assert (abs(sheet.astype(int) - (255, 0, 0)) < 40).all(axis=-1).sum() > 1000


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_a_sound_alone_has_a_picture_at_any_rate(rate):
    wave = np.random.default_rng(0).normal(0, 0.1, (2, rate)).astype(np.float32)
    sheet = sheets.timeline(None, wave, rate)
    assert sheet.shape[1] == 1200
    none = np.zeros((0, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(sheets.timeline(none, wave, rate), sheet)


def test_many_frames_and_extreme_shapes_fit():
    for shape in ((3000, 2, 2, 3), (9, 400, 2, 3), (9, 2, 400, 3)):
        clip = np.zeros(shape, np.uint8)
        wave = np.zeros((2, round(shape[0] * 960)), np.float32)
        sheet = sheets.timeline(clip, wave, RATE)
        assert sheet.shape[1] == 1200 and sheet.shape[0] < 700


def test_pitch_rises_from_the_bottom_and_a_silent_side_hides_nothing():
    axis = Axis(0, 300, 1.0)
    rows = []
    for hertz in (200, 1000, 4000):
        wave = burst(1.0, 0.25, 0.5, hertz)
        picture = sheets.spectrogram(wave, RATE, axis)
        wave[1] = 0
        np.testing.assert_array_equal(sheets.spectrogram(wave, RATE, axis), picture)
        bright = picture.astype(int).sum(axis=-1)
        rows.append(int(bright[:, 150].argmax()))
        assert bright[:, 10].max() < 60
    assert rows[0] > rows[1] > rows[2]
    places = dict(sheets._tones(RATE))
    assert abs(places["1"] - rows[1]) < 4 and abs(places["4"] - rows[2]) < 4


def test_silence_and_the_time_after_the_end_are_dark():
    axis = Axis(0, 100, 1.0)
    wave = np.full((2, RATE // 2), 0.0, np.float32)
    picture = sheets.spectrogram(wave, RATE, axis)
    assert (picture[:, :50] == sheets.HEAT[0]).all()
    assert (picture[:, 51:] == sheets.BACK).all()


@given(samples=st.integers(1, 3000), width=st.integers(1, 200))
def test_the_envelope_holds_every_sample_and_has_no_gaps(samples, width):
    wave = np.random.default_rng(samples).normal(size=samples).astype(np.float32)
    axis = Axis(0, width, samples / RATE)
    low, high = sheets.envelope(wave, RATE, axis)
    assert len(low) == len(high) == width
    assert low.min() == wave.min() and high.max() == wave.max()
    assert (low <= high).all()
    assert (low[1:] <= high[:-1]).all() and (high[1:] >= low[:-1]).all()


def test_a_shorter_sound_fills_its_share_of_the_columns():
    low, _ = sheets.envelope(np.zeros(RATE // 4, np.float32), RATE, Axis(0, 400, 1.0))
    assert len(low) == 100


def test_clipped_columns_are_red_and_others_are_not():
    wave = burst(1.0, 0.4, 0.2)
    red = [
        (sheets.timeline(None, np.clip(wave * gain, -1, 1), RATE) == sheets.LOUD)
        .all(axis=-1)
        .sum()
        for gain in (1, 4)
    ]
    assert red[0] == 0 and red[1] > 1000


def test_wrong_arguments_say_what_was_expected():
    timeline = inspect.unwrap(sheets.timeline)
    clip = marked(3, 0)
    for args in ((None, None), (clip[:0], None), (clip, np.full((2, 9), np.nan))):
        with pytest.raises(ValueError, match=r"timeline: got frames .* expected"):
            timeline(*args)
    with pytest.raises(ValueError, match="width 100, expected"):
        timeline(clip, None, width=100)

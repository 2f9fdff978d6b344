"""Clips one after the other: lengths, time, and the seam of the sound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlora_jax import joining
from idlora_jax.joining import Clip

RATE = 24000


def clip(frames: int, start: int = 0, fps: float = 25.0, rate: int = RATE) -> Clip:
    """Frames that hold their number; a sound that is a function of time."""
    numbers = np.arange(start, start + frames, dtype=np.uint8)
    pictures = np.broadcast_to(numbers[:, None, None, None], (frames, 2, 4, 3))
    first = joining.samples(start, rate, fps)
    samples = joining.samples(frames, rate, fps) - round(0.03 * rate)
    times = (first + np.arange(samples)) / rate
    wave = np.sin(2 * np.pi * 110 * times).astype(np.float32)
    return Clip(pictures, np.stack([wave, -wave]))


CASES = st.tuples(
    st.sampled_from([24.0, 25.0, 30000 / 1001, 50.0]),
    st.sampled_from([16000, 24000, 44100, 48000]),
    st.sampled_from([1, 9, 17, 25]),
    st.lists(st.integers(4, 15).map(lambda k: 8 * k + 1), min_size=3, max_size=3),
)


@settings(max_examples=30)
@given(CASES)
def test_clips_written_one_after_the_other_do_not_drift(case):
    fps, rate, overlap, lengths = case
    clips = [clip(n, fps=fps, rate=rate) for n in lengths]
    shown = lengths[0] + sum(n - overlap for n in lengths[1:])
    parts = [
        joining.fresh(c, rate, overlap=overlap, fps=fps) if n else c
        for n, c in enumerate(clips)
    ]
    assert sum(len(part.frames) for part in parts) == shown
    written = [joining.samples(lengths[0], rate, fps)]
    written += [part.wave.shape[1] for part in parts[1:]]
    assert abs(sum(written) - shown * rate / fps) <= 0.5 + len(parts) - 1
    whole = clips[0]
    for after in clips[1:]:
        whole = joining.joined(whole, after, rate, overlap=overlap, fps=fps)
    assert len(whole.frames) == shown
    assert abs(whole.wave.shape[1] - shown * rate / fps) <= 0.5


@pytest.mark.parametrize("fps", [24.0, 25.0])
@pytest.mark.parametrize("overlap", [9, 17])
def test_one_long_clip_comes_back_from_its_pieces(fps: float, overlap: int):
    """Three pieces of one recording: every frame once, and the sound of all time."""
    whole, total = clip(33, 0, fps), 33
    for _ in range(2):
        after = clip(33, total - overlap, fps)
        whole = joining.joined(whole, after, RATE, overlap=overlap, fps=fps)
        total += 33 - overlap
    want = clip(total, 0, fps)
    np.testing.assert_array_equal(whole.frames, want.frames)
    heard = want.wave.shape[1]
    np.testing.assert_allclose(whole.wave[:, :heard], want.wave, atol=1e-3)
    assert not whole.wave[:, heard:].any()


@pytest.mark.parametrize("alike", [True, False])
def test_the_sound_is_as_loud_in_the_seam_as_around_it(alike: bool):
    rng = np.random.default_rng(0)
    size = joining.samples(33, RATE, 25)
    waves = rng.normal(0, 0.1, (2, 2, size)).astype(np.float32)
    overlap = joining.samples(17, RATE, 25)
    if alike:
        waves[1, :, :overlap] = waves[0, :, -overlap:]
    pair = [Clip(clip(33).frames, wave) for wave in waves]
    got = joining.joined(*pair, RATE, overlap=17, fps=25)
    middle = size - overlap // 2
    seam = got.wave[:, middle - 480 : middle]
    np.testing.assert_allclose(seam.std(), 0.1, rtol=0.1)
    if alike:
        want = waves[0, :, middle - 480 : middle]
        np.testing.assert_allclose(seam, want, atol=1e-6)
    elsewhere = np.delete(got.wave[0], np.s_[middle - 480 : middle])
    np.testing.assert_array_equal(elsewhere[:100], waves[0, 0, :100])
    np.testing.assert_array_equal(elsewhere[-100:], waves[1, 0, -100:])


def test_the_new_part_begins_with_the_first_new_frame_and_its_sound():
    found = joining.fresh(clip(33), RATE, overlap=17, fps=25)
    np.testing.assert_array_equal(found.frames[:, 0, 0, 0], np.arange(17, 33))
    want = clip(33).wave[:, 17 * 960 :]
    np.testing.assert_array_equal(found.wave[:, : want.shape[1]], want)
    assert found.wave.shape == (2, 16 * 960)


def test_an_overlap_of_one_frame_joins_too():
    got = joining.joined(clip(9), clip(9, 8), RATE, overlap=1, fps=25)
    np.testing.assert_array_equal(got.frames, clip(17).frames)
    assert got.wave.shape == (2, 17 * 960)
    assert np.abs(got.wave).max() <= 1


def test_silent_films_stay_silent():
    films = [clip(n)._replace(wave=None) for n in (9, 17)]
    assert joining.joined(*films, RATE, overlap=9, fps=25).wave is None
    assert joining.fresh(films[1], RATE, overlap=9, fps=25).wave is None


def test_what_does_not_fit_is_refused():
    options = {"rate": RATE, "fps": 25.0}
    with pytest.raises(ValueError, match=r"overlap must be 8k\+1, got 16 \(use 17\)"):
        joining.joined(clip(33), clip(33), overlap=16, **options)
    with pytest.raises(ValueError, match=r"the clip has 9 frames.*overlap of 17"):
        joining.joined(clip(9), clip(33), overlap=17, **options)
    with pytest.raises(ValueError, match="fresh: the clip has 16 frames"):
        joining.fresh(clip(17), overlap=17, **options)
    silent = clip(33)._replace(wave=None)
    with pytest.raises(ValueError, match=r"with and no sound.*both alike"):
        joining.joined(clip(33), silent, overlap=17, **options)
    small = clip(33)._replace(frames=clip(33).frames[:, :, :2])
    with pytest.raises(ValueError, match=r"\[\[2, 4\], \[2, 2\]\] pixels"):
        joining.joined(clip(33), small, overlap=17, **options)

"""Speakers differ, clips repeat, mouths follow the sound."""

import itertools
import json
import re

import numpy as np
import pytest

from idlora_jax import media
from idlora_jax.data import face as faces
from idlora_jax.data import synthetic
from idlora_jax.data import voice as voices

RATE = 24000


def pitch_hz(wave, rate=RATE):
    """Median over loud stretches of 40 ms of the strongest autocorrelation lag."""
    size, found = round(0.04 * rate), []
    mono = wave.mean(axis=0)
    for piece in np.lib.stride_tricks.sliding_window_view(mono, size)[:: size // 2]:
        if piece.std() < 0.05:
            continue
        correlation = np.correlate(piece, piece, "full")[size - 1 :]
        low, high = rate // 420, rate // 70
        found.append(rate / (low + correlation[low:high].argmax()))
    return float(np.median(found))


def mouth_area(frames):
    """Pixels of the lower face that are as dark and red as the inside of a mouth."""
    height, width = frames.shape[1:3]
    box = frames[
        :, height * 9 // 16 : height * 7 // 8, width * 5 // 16 : width * 11 // 16
    ]
    red, green = box[..., 0].astype(int), box[..., 1].astype(int)
    return ((green < 40) & (red > 2 * green)).sum(axis=(1, 2))


def test_the_same_arguments_give_the_same_clip():
    first, second = (synthetic.clip(3, 1, 2, frames=9) for _ in range(2))
    assert first.frames.tobytes() == second.frames.tobytes()
    assert first.wave.tobytes() == second.wave.tobytes()
    assert first.caption == second.caption


@pytest.mark.parametrize(("frames", "fps", "rate"), [(1, 25, 24000), (17, 25, 16000)])
def test_clips_have_the_asked_sizes(frames, fps, rate):
    clip = synthetic.clip(
        0, 0, 0, frames=frames, height=48, width=32, fps=fps, rate=rate
    )
    assert clip.frames.shape == (frames, 48, 32, 3) and clip.frames.dtype == np.uint8
    assert clip.wave.shape == (2, round(frames / fps * rate))
    assert clip.wave.dtype == np.float32
    assert np.abs(clip.wave).max() == pytest.approx(voices.PEAK)


def test_another_clip_of_a_speaker_differs_but_is_the_same_person():
    first, second = (synthetic.clip(0, 1, j, frames=33) for j in (0, 1))
    assert first.caption.split("[SPEECH]")[0] == second.caption.split("[SPEECH]")[0]
    assert not np.array_equal(first.wave, second.wave)
    assert not np.array_equal(first.frames, second.frames)
    assert pitch_hz(first.wave) == pytest.approx(pitch_hz(second.wave), rel=0.08)


@pytest.mark.parametrize("seed", [0, 7])
def test_speakers_have_their_own_face_and_pitch(seed):
    people = [synthetic.speaker(seed, i) for i in range(4)]
    for a, b in itertools.pairwise(people):
        names = ("skin", "hair", "eyes", "shirt", "wall", "style", "extra")
        assert all(getattr(a.face, n) != getattr(b.face, n) for n in names)
    pitches = sorted(person.voice.pitch_hz for person in people)
    assert np.all(np.divide(pitches[1:], pitches[:-1]) > 1.1)
    stills = [synthetic.clip(seed, i, 0, frames=1).frames[0] for i in range(4)]
    for i, j in [(0, 1), (1, 2), (2, 3), (0, 3)]:
        assert np.abs(stills[i].astype(int) - stills[j]).mean() > 20


@pytest.mark.parametrize("index", range(4))
def test_the_sound_has_the_speakers_pitch(index):
    clip = synthetic.clip(0, index, 0, frames=50, height=16, width=16)
    want = synthetic.speaker(0, index).voice.pitch_hz
    assert pitch_hz(clip.wave) == pytest.approx(want, rel=0.08)


@pytest.mark.parametrize("vowel", voices.VOWELS)
def test_a_vowel_has_peaks_at_its_formants(vowel):
    formants = np.array(voices.VOWELS[vowel] + voices.HIGHER)
    size = 4096
    response = np.abs(voices._tract_response(formants[None], RATE, size))[0]
    level = 20 * np.log10(response)
    inner = level[1:-1]
    peaks = 1 + np.flatnonzero((inner > level[:-2]) & (inner > level[2:]))
    heard = peaks * RATE / size
    for formant in formants[:3]:
        assert np.abs(heard - formant).min() < 0.06 * formant + 20


def test_a_hiss_is_high_and_a_vowel_is_low():
    rng = np.random.default_rng(0)
    hiss = voices._hiss(rng, RATE, voices.HISS_HZ["s"], RATE)
    frequencies = np.fft.rfftfreq(RATE, 1 / RATE)
    power = np.abs(np.fft.rfft(hiss)) ** 2
    assert (power * frequencies).sum() / power.sum() > 4000
    clip = synthetic.clip(0, 0, 0, frames=25, height=16, width=16)
    power = np.abs(np.fft.rfft(clip.wave[0])) ** 2
    assert power[frequencies[: power.size] < 4000].sum() > 0.8 * power.sum()


@pytest.mark.parametrize("index", range(4))
def test_the_mouth_opens_with_the_loudness(index):
    clip = synthetic.clip(0, index, 1, frames=49)
    loud = synthetic.loudness(clip.wave, 49)
    assert np.corrcoef(mouth_area(clip.frames), loud)[0, 1] > 0.8


def test_loudness_is_that_of_each_frames_own_stretch():
    wave = np.zeros((2, 400), np.float32)
    wave[:, 100:200], wave[:, 300:400] = 0.2, -0.4
    np.testing.assert_allclose(synthetic.loudness(wave, 4), [0, 0.5, 0, 1], atol=1e-6)


def pose(frames=1, **changes):
    still = {name: np.zeros(frames) for name in faces.Pose._fields}
    return faces.Pose(**{**still, **changes})


def test_eyes_close_heads_move_and_the_wall_stays():
    face = synthetic.speaker(0, 1).face
    still = faces.draw(face, pose(), 64, 64)[0].astype(int)
    shut = faces.draw(face, pose(blink=np.ones(1)), 64, 64)[0].astype(int)
    changed = np.argwhere(np.abs(still - shut).max(axis=-1) > 20)
    assert 10 < len(changed) < 300
    assert changed[:, 0].min() > 20 and changed[:, 0].max() < 36  # the rows of the eyes
    moved = faces.draw(face, pose(x=np.full(1, 4 / 64)), 64, 64)[0].astype(int)
    face_rows = np.s_[24:44]
    assert np.abs(moved[face_rows, 20:48] - still[face_rows, 16:44]).mean() < 2.0
    np.testing.assert_array_equal(moved[:8, :8], still[:8, :8])


def test_clips_start_with_open_eyes_and_blink_and_sway_later():
    rng = np.random.default_rng(0)
    pose = synthetic._pose(rng, np.zeros(200, np.float32), 200, 25.0)
    assert np.all(pose.blink[:5] == 0)
    shut = np.flatnonzero(np.diff((pose.blink > 0.9).astype(int)) > 0)
    assert 2 <= len(shut) <= 6
    for track in (pose.x, pose.y, pose.roll):
        assert 0.01 < np.ptp(track) < 0.12
        assert np.abs(np.diff(track)).max() < 0.012


def test_drawing_in_parts_changes_nothing(monkeypatch):
    whole = synthetic.clip(0, 0, 0, frames=5, height=32, width=32).frames
    monkeypatch.setattr(synthetic, "CHUNK", 2 * 32 * 32)
    parts = synthetic.clip(0, 0, 0, frames=5, height=32, width=32).frames
    np.testing.assert_array_equal(whole, parts)


def test_captions_describe_the_person_the_words_and_the_voice():
    clip = synthetic.clip(0, 0, 0, frames=33)
    face = synthetic.speaker(0, 0).face
    form = r"\[VISUAL\]: .+\. \[SPEECH\]: [A-Z][a-z ]+\. \[SOUNDS\]: .+\."
    assert re.fullmatch(form, clip.caption)
    for word in (face.skin, face.hair, face.eyes, face.shirt, face.wall):
        assert word in clip.caption


def test_the_words_spoken_are_the_syllables_heard():
    voice = synthetic.speaker(0, 0).voice
    syllables, text = voices.plan(np.random.default_rng(0), voice, 2.0)
    spoken = "".join(s.text for s in syllables)
    assert text.lower().replace(" ", "").rstrip(".") == spoken
    times = [(s.start_s, s.end_s) for s in syllables]
    assert all(a < b <= 2.0 for a, b in times)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))


def test_a_corpus_is_files_and_a_manifest(tmp_path):
    manifest = synthetic.write_corpus(
        tmp_path / "demo",
        speakers=2,
        clips_per_speaker=2,
        frames=9,
        height=32,
        width=32,
    )
    assert manifest == tmp_path / "demo" / "metadata.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["video"] for row in rows] == [
        f"speaker{i}_clip{j}.mp4" for i in range(2) for j in range(2)
    ]
    assert {tuple(row) for row in rows} == {("video", "caption", "speaker")}
    assert rows[3]["speaker"] == "speaker1"
    found = media.probe(manifest.parent / rows[0]["video"])
    assert (found.video_codec, found.audio_codec) == ("h264", "aac")
    assert found.video_s == pytest.approx(9 / 25) and found.fps == 25
    assert json.loads(found.metadata["comment"])["synthetic"] is True
    clip = synthetic.clip(0, 1, 1, frames=9, height=32, width=32)
    frames = media.read_video(manifest.parent / rows[3]["video"])
    assert np.abs(frames.astype(int) - clip.frames).mean() < 6
    wave = media.read_audio(manifest.parent / rows[3]["video"], clip.rate)
    assert np.corrcoef(wave[0], clip.wave[0])[0, 1] > 0.95
    assert len(list(manifest.parent.iterdir())) == 5


def test_impossible_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got 0 speakers"):
        synthetic.write_corpus(tmp_path, speakers=0)
    with pytest.raises(ValueError, match="got 0 frames"):
        synthetic.clip(0, 0, 0, frames=0)
    with pytest.raises(ValueError, match="expected both >= 0"):
        synthetic.speaker(0, -1)
    assert not list(tmp_path.iterdir())

"""A seeded corpus of talking heads: faces, voices, and clips that join the two.

    speaker(seed, index) -> face, voice        one person, the same in every clip
    clip(seed, speaker, clip) -> Clip          that person saying something new
    write_corpus(folder) -> metadata.jsonl     mp4 files and a manifest

The mouth opens with the loudness of each frame's stretch of sound, so that picture and
voice belong together; nothing else is learnable about lips from these clips.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from idlora_jax import media
from idlora_jax.data import face as faces
from idlora_jax.data import voice as voices
from idlora_jax.files import PathLike

LOWEST_HZ = 88.0
OCTAVES = 1.5
GOLDEN_RATIO = 0.6180339887498949
CHUNK = 1 << 21
"""Pixels drawn at a time, to bound the memory of long or large clips."""


class Clip(NamedTuple):
    """frames u8 [F H W 3], wave f32 [2 N] at `rate`, caption, index of the speaker."""

    frames: np.ndarray
    wave: np.ndarray
    rate: int
    caption: str
    speaker: int


@dataclass(frozen=True)
class Speaker:
    """One person."""

    index: int
    face: faces.Face
    voice: voices.Voice


def _face(seed: int, index: int) -> faces.Face:
    """Names walk through shuffled palettes, so that neighbours differ in every one."""
    shuffle = np.random.default_rng([seed, 1])
    tables = (faces.SKIN, faces.HAIR, faces.EYES, faces.SHIRT, faces.WALL)
    tables += (faces.STYLES, faces.EXTRAS)
    names = []
    for table in tables:
        order = shuffle.permutation(len(table))
        names.append(list(table)[order[index % len(table)]])
    u = np.random.default_rng([seed, 2, index]).uniform
    return faces.Face(
        *names,
        width=u(0.2, 0.235),
        height=u(0.285, 0.325),
        jaw=u(2.0, 2.7),
        eye_gap=u(0.085, 0.105),
        eye_size=u(0.038, 0.048),
        brow=u(0.009, 0.016),
        nose=u(0.05, 0.075),
        mouth_width=u(0.075, 0.105),
        lamp=u(-0.4, 0.4),
    )


def _voice(seed: int, index: int) -> voices.Voice:
    """Pitches step by the golden ratio of the range: none are near their neighbours."""
    start = np.random.default_rng([seed, 3]).uniform()
    place = (start + index * GOLDEN_RATIO) % 1.0
    u = np.random.default_rng([seed, 4, index]).uniform
    return voices.Voice(
        pitch_hz=LOWEST_HZ * 2 ** (OCTAVES * place),
        tract=0.92 + 0.24 * place + u(-0.03, 0.03),
        breath=u(0.05, 0.45),
        syllables_per_s=u(3.6, 5.2),
        pan=u(-0.5, 0.5),
    )


def speaker(seed: int, index: int) -> Speaker:
    """The person number `index` of a corpus seed."""
    if seed < 0 or index < 0:
        raise ValueError(
            f"speaker: got seed {seed} and index {index}, expected both >= 0"
        )
    return Speaker(index, _face(seed, index), _voice(seed, index))


def loudness(
    wave: Float32[np.ndarray, "2 N"], frames: int
) -> Float32[np.ndarray, " frames"]:
    """RMS of the sound in each of `frames` equal stretches, the largest scaled to 1."""
    power = np.mean(wave.astype(np.float64) ** 2, axis=0)
    total = np.concatenate([[0.0], np.cumsum(power)])
    edges = np.linspace(0, power.size, frames + 1).round().astype(int)
    rms = np.sqrt(np.diff(total[edges]) / np.maximum(np.diff(edges), 1))
    return (rms / max(rms.max(), 1e-9)).astype(np.float32)


def _pose(
    rng: np.random.Generator, mouth: np.ndarray, frames: int, fps: float | int
) -> faces.Pose:
    """Slow sway, a blink every few seconds (never in the first 0.2 s), given mouth."""
    t = np.arange(frames) / fps
    phase, speed = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.7, 1.5, 3)
    x, y, roll = np.sin(2 * np.pi * 0.4 * speed * t[:, None] + phase).T
    blink, time = np.zeros(frames), rng.uniform(0.35, 1.6)
    while time < frames / fps + 0.2:
        blink = np.maximum(blink, np.clip(1.6 - np.abs(t - time) / 0.07, 0, 1))
        time += rng.uniform(1.4, 3.2)
    return faces.Pose(0.022 * x, 0.012 * y, 0.05 * roll, blink, mouth)


def _caption(person: Speaker, text: str) -> str:
    f, v = person.face, person.voice
    register = ("deep", "medium-pitched", "high-pitched")
    pitch = register[int(np.digitize(v.pitch_hz, (120.0, 175.0)))]
    breath = "breathy" if v.breath > 0.25 else "clear"
    looks = [f"{f.skin} skin", f"{f.style} {f.hair} hair", f"{f.eyes} eyes"]
    looks += [f.extra] if f.extra else []
    look = ", ".join(looks[:-1]) + " and " + looks[-1]
    pace = "quickly" if v.syllables_per_s > 4.4 else "slowly"
    return (
        f"[VISUAL]: A drawn close-up of a person with {look}, in a {f.shirt} shirt in "
        f"front of a {f.wall} wall, talking to the camera. [SPEECH]: {text} [SOUNDS]: "
        f"A {pitch}, {breath} voice speaks {pace}, close to the microphone in a quiet "
        "room."
    )


def clip(
    seed: int,
    speaker_index: int,
    clip_index: int,
    *,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
    fps: float | int = 25.0,
    rate: int = 24000,
) -> Clip:
    """One clip of one speaker; the same arguments give the same arrays.

    Args:
        seed: of the corpus.
        speaker_index: which person.
        clip_index: which of their clips.
        frames: number of pictures.
        height: pixels.
        width: pixels.
        fps: pictures per second.
        rate: sound samples per second; N = round(frames / fps * rate).
    """
    if min(frames, height, width) < 1 or fps <= 0 or rate < 8000:
        raise ValueError(
            f"clip: got {frames} frames of {height} x {width} at {fps} fps, {rate} Hz, "
            "expected positive sizes and at least 8000 Hz"
        )
    person = speaker(seed, speaker_index)
    rng = np.random.default_rng([seed, 5, speaker_index, clip_index])
    wave, text = voices.speak(rng, person.voice, frames / fps, rate)
    pose = _pose(rng, loudness(wave, frames), frames, fps)
    step = max(1, CHUNK // (height * width))
    parts = [
        faces.draw(
            person.face, faces.Pose(*(a[i : i + step] for a in pose)), height, width
        )
        for i in range(0, frames, step)
    ]
    caption = _caption(person, text)
    return Clip(np.concatenate(parts), wave, rate, caption, speaker_index)


def write_corpus(
    folder: PathLike,
    *,
    seed: int = 0,
    speakers: int = 4,
    clips_per_speaker: int = 4,
    frames: int = 17,
    height: int = 64,
    width: int = 64,
) -> Path:
    """Write clips as speaker{i}_clip{j}.mp4 and, last, their manifest metadata.jsonl.

    The manifest has one JSON object a line: `video` (path relative to the folder),
    `caption` and `speaker`.

    Returns:
        The path of the manifest.

    Raises:
        ValueError: for no speakers or clips, or sizes H.264 cannot hold.
        OSError: if a file cannot be written.
    """
    if min(speakers, clips_per_speaker) < 1:
        raise ValueError(
            f"write_corpus: got {speakers} speakers and {clips_per_speaker} clips of "
            "each, expected at least one of both"
        )
    folder = Path(folder)
    lines = []
    for i, j in np.ndindex(speakers, clips_per_speaker):
        made = clip(seed, i, j, frames=frames, height=height, width=width)
        name = f"speaker{i}_clip{j}.mp4"
        tags = {"comment": json.dumps({"synthetic": True, "caption": made.caption})}
        media.write_video(
            folder / name, made.frames, made.wave, made.rate, metadata=tags
        )
        row = {"video": name, "caption": made.caption, "speaker": f"speaker{i}"}
        lines.append(json.dumps(row) + "\n")
    manifest = folder / "metadata.jsonl"
    with media.replacing(manifest) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return manifest

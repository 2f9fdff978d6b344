"""Clips that cannot be used, each in another way, and good ones to go with them."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np

from idlora_jax import media
from idlora_jax.data import synthetic

FRAMES, SIDE = 9, 32
SIZE = {"frames": FRAMES, "height": SIDE, "width": SIDE}
BAD = {
    "silent": ("silent", "silent audio"),
    "late": ("silent", "silent in its first 0.36 s"),
    "mute": ("no audio", "no audio stream"),
    "short": ("too short", "5 frames (0.20 s) at 25 fps, expected 9"),
    "clipped": ("too short", "0.20 s of sound, expected 0.36 s"),
    "nan": ("not finite", "NaN or infinite samples"),
    "broken": ("unreadable", "damaged"),
    "empty": ("unreadable", "damaged"),
    "cut": ("unreadable", "damaged"),
    "gone": ("unreadable", "no such file"),
    "wordless": ("empty caption", "empty caption"),
}
"""Names of files without suffix: kind of reason, and words of its message."""


def write_mkv(path: Path, frames: np.ndarray, wave: np.ndarray, rate: int) -> None:
    """Uncompressed float sound, which holds what no codec would."""
    with av.open(str(path), "w") as output:
        video = output.add_stream("libx264", rate=25)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = output.add_stream("pcm_f32le", rate=rate, layout="stereo")
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            output.mux(video.encode(frame))
        output.mux(video.encode())
        packed = np.ascontiguousarray(wave.T.reshape(1, -1), np.float32)
        frame = av.AudioFrame.from_ndarray(packed, "flt", "stereo")
        frame.sample_rate = rate
        output.mux(audio.encode(frame))
        output.mux(audio.encode())


def write(folder: Path) -> None:
    """Write one file for each name of `BAD`, but for "gone"."""
    made = synthetic.clip(0, 0, 9, **SIZE)
    frames, wave = made.frames, made.wave
    silence, twice = np.zeros_like(wave), np.repeat(frames, 2, axis=0)
    media.write_video(folder / "silent.mp4", frames, silence)
    late = np.concatenate([silence, wave], axis=1)
    media.write_video(folder / "late.mp4", twice, late)
    media.write_video(folder / "mute.mp4", frames, None)
    media.write_video(folder / "short.mp4", frames[:5], wave)
    media.write_video(folder / "wordless.mp4", frames, wave)
    write_mkv(folder / "clipped.mkv", frames, wave[:, : made.rate // 5], made.rate)
    write_mkv(folder / "nan.mkv", frames, np.where(wave > 0.1, np.nan, wave), made.rate)
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    (folder / "empty.mp4").touch()
    whole = (folder / "short.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])


def rows() -> list[dict[str, str]]:
    """Rows of a list that names them all, as clips of the speaker "a"."""
    made = []
    for name in BAD:
        suffix = ".mkv" if name in ("clipped", "nan") else ".mp4"
        caption = "" if name == "wordless" else "words"
        made.append({"video": name + suffix, "speaker": "a", "caption": caption})
    return made


def write_list(path: Path, *rows: dict[str, object]) -> Path:
    """Write rows as .jsonl."""
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path

"""Sound files: read any format to stereo float, write WAV.

    file --decode--> [channels N] at its own rate --mix--> [2 N] --resample--> [2 N2]

Mono is copied to both sides. More than two channels are mixed with the weights of
ITU-R BS.775 (centre and surrounds at -3 dB, the low-frequency channel left out), scaled
so that no sum can clip.
"""

from __future__ import annotations

import math
import os
import wave as wave_file
from collections.abc import Iterator
from typing import Literal

import av
import av.audio.stream
import av.container
import numpy as np
from jaxtyping import Float32

from idlora_jax.files import PathLike, opened, problem, replacing
from idlora_jax.mel import resample

SILENCE = 1e-3
"""Peaks below -60 dB of full scale count as silence."""

PADDING = 4096
"""Samples by which a lossy codec's decoded length may differ from the declared one."""

_SOUND = "a sound or video file (wav, flac, mp3, m4a, mp4, mkv, ...)"
_SIDE = math.sqrt(0.5)
_WEIGHTS = {
    "FL": (1.0, 0.0),
    "FR": (0.0, 1.0),
    "FC": (_SIDE, _SIDE),
    "LFE": (0.0, 0.0),
    "BL": (_SIDE, 0.0),
    "BR": (0.0, _SIDE),
    "SL": (_SIDE, 0.0),
    "SR": (0.0, _SIDE),
    "BC": (0.5, 0.5),
    "FLC": (1.0, 0.0),
    "FRC": (0.0, 1.0),
}
_UNNAMED = {
    3: ("FL", "FR", "FC"),
    4: ("FL", "FR", "BL", "BR"),
    5: ("FL", "FR", "FC", "BL", "BR"),
    6: ("FL", "FR", "FC", "LFE", "BL", "BR"),
    8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"),
}


def _mixing_matrix(names: tuple[str, ...]) -> np.ndarray:
    """[2, channels] weights; channels without a position go to both sides."""
    if all(name == "NONE" for name in names):
        names = _UNNAMED.get(len(names), names)
    weights = np.array([_WEIGHTS.get(name, (_SIDE, _SIDE)) for name in names]).T
    return (weights / max(1.0, weights.sum(axis=1).max())).astype(np.float32)


def _stereo(frame: av.AudioFrame) -> np.ndarray:
    """One decoded frame as float32 [2 N]; integers are scaled to [-1, 1)."""
    names = tuple(channel.name for channel in frame.layout.channels)
    samples = np.asarray(frame.to_ndarray())
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(names)).T
    if samples.dtype == np.uint8:
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples / 2.0 ** (8 * samples.itemsize - 1)
    samples = samples.astype(np.float32)
    if len(names) == 1:
        return samples.repeat(2, axis=0)
    return samples if len(names) == 2 else _mixing_matrix(names) @ samples


def _riff_is_short(path: PathLike) -> bool:
    """A WAV whose header promises more bytes than the file holds."""
    with open(path, "rb") as file:
        head = file.read(8)
    promised = int.from_bytes(head[4:], "little") + 8
    streamed = promised >= 0x7FFF0000  # a writer that could not know the length
    return head[:4] == b"RIFF" and not streamed and promised > os.path.getsize(path)


def _declared_seconds(
    path: PathLike,
    container: av.container.InputContainer,
    stream: av.audio.stream.AudioStream,
) -> float | None:
    """The length a file's header states; None if it states none or only a guess."""
    kind = container.format.name
    if kind == "mp3":
        # Without a frame count in its first frame the length is guessed from bytes.
        with open(path, "rb") as file:
            head = file.read(1 << 18)
        if b"Xing" not in head and b"Info" not in head:
            return None
    if kind == "aac":
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in tag)
    except ValueError:
        return None
    return 3600 * hours + 60 * minutes + seconds


def _decode(
    container: av.container.InputContainer, stream: av.audio.stream.AudioStream
) -> Iterator[tuple[int, np.ndarray]]:
    for frame in container.decode(stream):
        yield frame.sample_rate, _stereo(frame)


def _decoded(path: PathLike) -> tuple[np.ndarray, int]:
    """(stereo samples, rate) of a whole file, checked to be complete."""
    name = "read_audio"
    with opened(name, path, _SOUND) as container:
        if not container.streams.audio:
            do = "choose a file that has sound"
            raise problem(name, path, "no audio stream", _SOUND, do)
        stream = container.streams.audio[0]
        declared = _declared_seconds(path, container, stream)
        parts = list(_decode(container, stream))
    rates = {rate for rate, _ in parts}
    if len(rates) != 1:
        got = f"sampling rates {sorted(rates)}" if rates else "empty audio"
        raise problem(
            name, path, got, "sound at one rate", "record or convert it again"
        )
    rate = rates.pop()
    samples = np.concatenate([part for _, part in parts], axis=1)
    length = samples.shape[1] if declared is None else round(declared * rate)
    if samples.shape[1] < length - PADDING or _riff_is_short(path):
        got = f"{samples.shape[1] / rate:.2f} s of sound"
        expected = "as much as its header states"
        if length > samples.shape[1]:
            expected = f"the {length / rate:.2f} s its header states"
        do = "the file is truncated, copy or convert it again"
        raise problem(name, path, got, expected, do)
    # Codecs pad the last block; the container knows where the sound ends.
    padded = 0 < samples.shape[1] - length < PADDING
    return samples[:, :length] if padded else samples, rate


def _check_audible(path: PathLike, wave: np.ndarray) -> None:
    name, do = "read_audio", "choose another recording"
    if wave.shape[1] == 0:
        raise problem(name, path, "empty audio", "at least one sample", do)
    if not np.isfinite(wave).all():
        raise problem(name, path, "NaN or infinite samples", "finite samples", do)
    peak = float(np.abs(wave).max())
    if peak < SILENCE:
        level = f"{20 * math.log10(peak):.0f} dBFS" if peak else "all zeros"
        got = f"silent audio (peak {level})"
        raise problem(name, path, got, "a peak above -60 dBFS", do)


def read_audio(
    path: PathLike,
    rate: int = 16000,
    *,
    numerics: Literal["exact", "reference"] = "exact",
    channels: Literal[1, 2] = 2,
) -> Float32[np.ndarray, "{channels} N"]:
    """Read the first sound track of a sound or video file.

    Args:
        path: wav, flac, mp3, m4a, mp4, mkv, ... at any rate and number of channels.
        rate: wanted samples per second.
        numerics: the resampler, see `mel.resample`.
        channels: 2 for stereo (mono is copied to both sides), 1 for their mean.

    Returns:
        Samples, full scale [-1, 1], one row a channel.

    Raises:
        ValueError: for a file that is missing, has no sound track, is empty, silent
            (peak below -60 dB of full scale), truncated or damaged, or holds NaN.

    Source: scripts/inference_one_stage.py: _encode_audio.
    """
    wave, source_rate = _decoded(path)
    if channels == 1:
        wave = wave.mean(axis=0, keepdims=True)
    _check_audible(path, wave)
    return resample(wave, source_rate, rate, numerics)


def write_wav(path: PathLike, wave: Float32[np.ndarray, "2 N"], rate: int) -> None:
    """Write stereo samples as 16-bit PCM; values beyond [-1, 1] are clipped.

    Raises:
        ValueError: for NaN or infinite samples or a rate that is not positive.
        OSError: if the file cannot be written; nothing is left behind.
    """
    if rate <= 0:
        raise ValueError(f"write_wav: {path}: got {rate} Hz, expected a positive rate")
    if not np.isfinite(wave).all():
        got = "NaN or infinite samples"
        raise problem("write_wav", path, got, "finite samples", "check their source")
    pcm = np.rint(np.clip(wave, -1, 1) * 32767).astype("<i2")
    with replacing(path) as temporary, wave_file.open(str(temporary), "wb") as file:
        file.setnchannels(len(wave))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(pcm.T.tobytes())

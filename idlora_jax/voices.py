"""A recording of a voice: what it is like, and which part of it is used.

    wave f32 [2 N] --crop--> at most some seconds --measure--> VoiceReport --> warnings

Everything is counted in frames of 20 ms. With p the mean square of a frame (both
channels, without their mean), the *level* of a recording is the mean of the frames
that lie less than 10 dB below the mean of all: pauses do not lower it, and a short
bang hardly raises it. A frame is *silent* if it lies below -60 dB of full scale, or
less than 4 dB above the noise of the room. The noise is what 5 % of the frames lie
below; that limit never goes above 15 dB below the level, nor under 35.

The *loudest* window is the one with the largest sum of min(p, level). A frame counts at
most as much as ordinary speech does, so that pauses lose and a bang wins nothing.

Loudness is that of ITU-R BS.1770-4: two filters for the ear's sensitivity, mean squares
of blocks of 0.4 s, the mean of those above -70 LUFS and above the first mean - 10 LU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64
from scipy.signal import lfilter

Crop = Literal["none", "start", "center", "loudest"]

FRAME_S = 0.02
FADE_S = 0.005
NEAR_DB, FLOOR_DB = -10.0, -60.0
QUIETEST_DB, LOUDEST_DB, ABOVE_NOISE_DB = -35.0, -15.0, 4.0
"""Where pauses end: from and to, against the level; and against the noise."""
FULL_SCALE = 0.99
"""Clipped samples that were resampled or written as mp3 come back a little lower."""

BLOCK_S, STEP_S = 0.4, 0.1
ABSOLUTE_LUFS, RELATIVE_LU = -70.0, -10.0

SHORTEST_S, LONGEST_S = 4.0, 6.0
MOST_SILENCE, MOST_CLIPPED, QUIET_DB = 0.4, 0.001, -40.0


@dataclass(frozen=True)
class VoiceReport:
    """What a recording is like. Levels are -inf where there is no sound.

    Attributes:
        seconds: its length.
        peak_db: the largest sample, dB of full scale.
        rms_db: the level of the speech, pauses left out, dB of full scale.
        loudness: integrated, LUFS.
        silent_share: share of silent 20 ms frames, 0 to 1.
        clipped_share: share of samples in runs of two and more at full scale, 0 to 1.
        leading_s: seconds of silence before the first sound.
        trailing_s: seconds of silence after the last one.
        dc_offset: the mean, of the channel where it is farther from 0.
    """

    seconds: float
    peak_db: float
    rms_db: float
    loudness: float
    silent_share: float
    clipped_share: float
    leading_s: float
    trailing_s: float
    dc_offset: float


def _db(power: float) -> float:
    return 10 * math.log10(power) if power > 0 else -math.inf


def _frame(rate: int) -> int:
    """Samples of a frame."""
    return max(1, round(FRAME_S * rate))


def _powers(wave: np.ndarray, rate: int) -> Float64[np.ndarray, " T"]:
    """The mean square of each whole frame; a shorter recording is one frame."""
    size = min(_frame(rate), wave.shape[1])
    centred = wave.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    whole = wave.shape[1] // size * size
    return np.square(centred[:, :whole]).reshape(len(wave), -1, size).mean((0, 2))


def _level(powers: Float64[np.ndarray, " T"]) -> float:
    near = powers >= powers.mean() * 10 ** (NEAR_DB / 10)
    return float(powers[near].mean())


def _sounding(powers: Float64[np.ndarray, " T"]) -> Bool[np.ndarray, " T"]:
    """Which frames are not silent."""
    level = _level(powers)
    pause = float(np.percentile(powers, 5)) * 10 ** (ABOVE_NOISE_DB / 10)
    pause = min(pause, level * 10 ** (LOUDEST_DB / 10))
    pause = max(pause, level * 10 ** (QUIETEST_DB / 10), 10 ** (FLOOR_DB / 10))
    return powers > pause


def _check(name: str, wave: np.ndarray, rate: int) -> None:
    if wave.shape[1] == 0 or rate <= 0:
        raise ValueError(
            f"{name}: got {wave.shape[1]} samples at {rate} Hz, expected at least one "
            "sample and a positive rate; choose another recording"
        )


def _loudest(wave: np.ndarray, rate: int, length: int) -> int:
    """The first sample of the loudest window."""
    powers = _powers(wave, rate)
    size = _frame(rate)
    total = np.cumsum(np.append(0, np.minimum(powers, _level(powers))))
    count = min(max(1, round(length / size)), len(powers))
    # Sums that differ by rounding alone are equal: the first window is taken.
    sums = np.round(total[count:] - total[:-count], 12)
    return min(int(sums.argmax()) * size, wave.shape[1] - length)


def _faded(part: np.ndarray, rate: int, head: bool, tail: bool) -> np.ndarray:
    """Cut edges rise and fall over 5 ms, so that they do not click."""
    size = min(round(FADE_S * rate), part.shape[1] // 2)
    ramp = np.sin(np.pi / 2 * (np.arange(size) + 0.5) / max(1, size)) ** 2
    ramp = ramp.astype(part.dtype)
    out = part.copy()
    if head:
        out[:, :size] *= ramp
    if tail:
        out[:, part.shape[1] - size :] *= ramp[::-1]
    return out


def crop(
    wave: Float[np.ndarray, "channels N"], rate: int, seconds: float | int, where: Crop
) -> Float[np.ndarray, "channels N2"]:
    """The part of a recording that is used.

    Edges that were cut fade over 5 ms; the recording's own are left as they are.

    Args:
        wave: samples, one row a channel.
        rate: samples per second.
        seconds: length of the part; a recording that is no longer is returned whole.
        where: "none" (all of it), "start", "center", or "loudest": the window with the
            most speech and the fewest pauses.

    Raises:
        ValueError: for an empty recording, or a length below one sample.
    """
    _check("crop", wave, rate)
    length = round(seconds * rate)
    if length < 1:
        raise ValueError(f"crop: got {seconds} s, expected a length above 0; use 5 s")
    spare = wave.shape[1] - length
    if where == "none" or spare <= 0:
        return wave
    start = {"start": 0, "center": spare // 2}.get(where)
    if start is None:
        start = _loudest(wave, rate, length)
    part = wave[:, start : start + length]
    return _faded(part, rate, start > 0, start < spare)


def _clipped_share(wave: np.ndarray) -> float:
    full = np.pad(np.abs(wave) >= FULL_SCALE, ((0, 0), (1, 1)))
    in_run = full[:, 1:-1] & (full[:, :-2] | full[:, 2:])
    return float(in_run.mean())


def _k_weighted(wave: np.ndarray, rate: int) -> Float64[np.ndarray, "channels N"]:
    """The two filters of BS.1770, given at 48 kHz, made for any rate.

    Both are analog filters by the bilinear transform: a high shelf of +4 dB above
    1682 Hz (the head) and a high pass at 38 Hz.
    """
    gain, quality = 10 ** (3.999843853973347 / 20), 0.7071752369554196
    k = math.tan(math.pi * 1681.974450955533 / rate)
    middle = gain**0.4996667741545416
    bottom = [1 + k / quality + k * k, 2 * (k * k - 1), 1 - k / quality + k * k]
    top = [
        gain + middle * k / quality + k * k,
        2 * (k * k - gain),
        gain - middle * k / quality + k * k,
    ]
    shelved = lfilter(top, bottom, wave.astype(np.float64))
    quality = 0.5003270373238773
    k = math.tan(math.pi * 38.13547087602444 / rate)
    bottom = [1 + k / quality + k * k, 2 * (k * k - 1), 1 - k / quality + k * k]
    # The standard's numerator is 1, -2, 1 whatever the first denominator.
    top = [bottom[0], -2 * bottom[0], bottom[0]]
    return np.asarray(lfilter(top, bottom, np.asarray(shelved)))


def loudness(wave: Float[np.ndarray, "channels N"], rate: int) -> float:
    """Integrated loudness in LUFS; -inf for silence.

    A recording shorter than a block of 0.4 s is one block.

    Args:
        wave: samples, full scale [-1, 1]; left, right.
        rate: samples per second.

    Source: ITU-R BS.1770-4, annex 1.
    """
    _check("loudness", wave, rate)
    squares = np.square(_k_weighted(wave, rate)).sum(axis=0)
    size = min(round(BLOCK_S * rate), len(squares))
    starts = np.arange(0, len(squares) - size + 1, max(1, round(STEP_S * rate)))
    total = np.cumsum(np.append(0, squares))
    blocks = (total[starts + size] - total[starts]) / size
    kept = blocks[blocks > 10 ** ((ABSOLUTE_LUFS + 0.691) / 10)]
    if kept.size:
        kept = kept[kept > kept.mean() * 10 ** (RELATIVE_LU / 10)]
    return _db(float(kept.mean())) - 0.691 if kept.size else -math.inf


def measure(wave: Float[np.ndarray, "channels N"], rate: int) -> VoiceReport:
    """What a recording is like.

    Args:
        wave: samples, full scale [-1, 1], one row a channel.
        rate: samples per second.

    Raises:
        ValueError: for an empty recording or a rate that is not positive.
    """
    _check("measure", wave, rate)
    powers = _powers(wave, rate)
    sounding = _sounding(powers)
    at = np.flatnonzero(sounding)
    first, last = (int(at[0]), int(at[-1]) + 1) if at.size else (len(powers), 0)
    means = wave.mean(axis=1, dtype=np.float64)
    return VoiceReport(
        seconds=wave.shape[1] / rate,
        peak_db=2 * _db(float(np.abs(wave).max())),
        rms_db=_db(_level(powers)),
        loudness=loudness(wave, rate),
        silent_share=float(1 - sounding.mean()),
        clipped_share=_clipped_share(wave),
        leading_s=first * FRAME_S,
        trailing_s=(len(powers) - last) * FRAME_S if at.size else 0.0,
        dc_offset=float(means[np.abs(means).argmax()]),
    )


def warnings(report: VoiceReport) -> tuple[str, ...]:
    """What is likely to make a voice fail, and what to do; one sentence each."""
    found = []
    crop_it = "use --reference-crop loudest"
    usual = "adapters were trained with about five seconds"
    if report.seconds < SHORTEST_S:
        found.append(
            f"{report.seconds:.1f} s of voice, {usual}; give {SHORTEST_S:g} to "
            f"{LONGEST_S:g} s"
        )
    if report.seconds > LONGEST_S:
        found.append(f"{report.seconds:.1f} s of voice, {usual}; {crop_it}")
    if report.silent_share > MOST_SILENCE:
        found.append(
            f"{report.silent_share:.0%} of the recording is silence; {crop_it} on a "
            "longer one, or cut the pauses"
        )
    if report.clipped_share > MOST_CLIPPED:
        found.append(
            f"{report.clipped_share:.2%} of the samples are clipped; record it again "
            "at a lower level"
        )
    if report.rms_db < QUIET_DB:
        found.append(
            f"the voice is very quiet ({report.rms_db:.0f} dB of full scale); record "
            "it nearer, or raise its level"
        )
    return tuple(found)

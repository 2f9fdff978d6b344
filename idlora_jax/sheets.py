"""Clips as one picture: contact sheets of frames, and frames above their sound.

    contact_sheet: clips as rows of frames          to compare clips
    timeline:      frames / waveform / log-mel      to judge one, lips against sound

In a timeline all parts share one axis of time. Frame n is centred above n / fps; the
first one always stands there, and the last where the chosen step meets it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from idlora_jax.images import resize_crop
from idlora_jax.mel import FLOOR, log_mel, mel_filters

BACK, PANEL, FAINT, INK = (24, 24, 24), (12, 12, 16), (64, 64, 72), (235, 235, 235)
WAVE, LOUD = (96, 190, 255), (255, 70, 60)
HEAT = np.array(
    [(12, 12, 16), (66, 32, 122), (196, 58, 100), (252, 166, 70), (255, 250, 220)]
)
"""Colours from quiet to loud, at equal distances."""

FULL_SCALE = 0.999
"""Samples from here on are drawn as clipped."""

SPAN = 80 * math.log(10) / 20
"""What the colours cover: 80 dB, as a difference of log magnitudes."""

TEXT, ROW, MARGIN, GAP = 12, 20, 52, 6
LANE, BANDS, BAND_HEIGHT = 52, 64, 2
TALLEST = 220


def _text_row(text: str, width: int, size: int) -> UInt8[np.ndarray, "H W 3"]:
    row = Image.new("RGB", (width, size + size // 2), BACK)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(row).text((size // 3, size // 6), text, INK, font)
    return np.asarray(row)


def _pad_width(image: np.ndarray, width: int) -> np.ndarray:
    return np.pad(image, ((0, 0), (0, width - image.shape[1]), (0, 0)))


def contact_sheet(
    rows: Sequence[UInt8[np.ndarray, "_F _H _W 3"]],
    labels: Sequence[str],
    *,
    gap: int = 4,
    scale: int = 1,
) -> UInt8[np.ndarray, "H W 3"]:
    """Lay clips out as rows of frames, each under its label.

    Args:
        rows: one clip a row; lengths and sizes may differ.
        labels: one line of text a row.
        gap: black pixels between frames and rows.
        scale: enlarge frames by this whole factor (nearest pixel).

    Raises:
        ValueError: without rows, or with another number of labels.
    """
    if not rows or len(rows) != len(labels):
        raise ValueError(
            f"contact_sheet: got {len(rows)} rows and {len(labels)} labels, expected "
            "at least one row and one label a row"
        )
    edge = ((0, 0), (0, gap), (0, gap), (0, 0))
    strips = []
    for clip in rows:
        large = clip.repeat(scale, axis=1).repeat(scale, axis=2)
        strips.append(np.concatenate(list(np.pad(large, edge)), axis=1))
    size = max(TEXT, min(s.shape[0] for s in strips) // 6)
    font = ImageFont.load_default(size)
    widest = max(int(font.getlength(label)) + size for label in labels)
    width = max(widest, *(s.shape[1] for s in strips))
    parts = []
    for strip, label in zip(strips, labels, strict=True):
        parts += [_text_row(label, width, size), _pad_width(strip, width)]
    return np.concatenate(parts)


class Axis(NamedTuple):
    """Where times stand: second t at pixel `left` + t / `seconds` * `width`."""

    left: int
    width: int
    seconds: float

    def x(self, second: float) -> int:
        """The pixel column of a time."""
        return self.left + round(second / self.seconds * self.width)


def chosen(frames: int, most: int) -> Int[np.ndarray, " K"]:
    """At most `most` frames at equal steps from the first, to the last if that can be.

    The step is the least that fits, or up to twice that where it divides the clip.
    """
    last = frames - 1
    least = max(1, math.ceil(last / max(1, most - 1)))
    good = [step for step in range(least, 2 * least) if last % step == 0]
    return np.arange(0, frames, good[0] if good else least)


def shown(shape: Sequence[int], width: int) -> Int[np.ndarray, " K"]:
    """Which frames of a clip [F H W 3] stand in a timeline of `width` pixels."""
    ideal = max(48, 130 * math.sqrt(shape[2] / shape[1]))
    return chosen(shape[0], max(2, int(width / ideal)))


def _thumbnails(
    shape: Sequence[int], width: int, share: float
) -> tuple[int, tuple[int, int]]:
    """(pixels beside the axis, height and width of a frame).

    `share` is the part of the axis from one frame to the next; half a frame hangs over
    at both ends.
    """
    aspect = shape[1] / shape[0]
    wide = ((width - 2 * GAP) * share - GAP) / (1 + share)
    if wide / 2 + GAP < MARGIN:
        wide = (width - 2 * MARGIN) * share - GAP
    wide = max(2, int(min(wide, TALLEST * aspect, width / 3)))
    height = max(2, min(TALLEST, round(wide / aspect)))
    return max(MARGIN, wide // 2 + GAP), (height, wide)


def _film(
    draw: ImageDraw.ImageDraw,
    sheet: Image.Image,
    frames: UInt8[np.ndarray, "K H W 3"],
    times: Float[np.ndarray, " K"],
    axis: Axis,
    top: int,
) -> None:
    """Frames above their times."""
    font = ImageFont.load_default(TEXT)
    height, width = frames.shape[1:3]
    for frame, time in zip(frames, times.tolist(), strict=True):
        x = axis.x(time)
        sheet.paste(Image.fromarray(frame), (x - width // 2, top))
        draw.line((x, top + height, x, top + height + 3), INK)
        place = (x, top + height + 4)
        text = f"{time:.2f} s" if width > 48 else f"{time:.2f}"
        draw.text(place, text, INK, font, anchor="ma")


def envelope(
    samples: Float32[np.ndarray, " N"], rate: int, axis: Axis
) -> tuple[Float32[np.ndarray, " X"], Float32[np.ndarray, " X"]]:
    """Lowest and highest sample of each pixel column, as far as the sound reaches.

    A column includes the first sample of the next one, so that the curve is unbroken.
    """
    per_column = axis.seconds * rate / axis.width
    columns = min(axis.width, math.ceil(len(samples) / per_column))
    start = np.minimum((np.arange(columns) * per_column).astype(int), len(samples) - 1)
    after = samples[np.append(start[1:], len(samples) - 1)]
    low = np.minimum(np.minimum.reduceat(samples, start), after)
    return low, np.maximum(np.maximum.reduceat(samples, start), after)


def _lane(
    samples: np.ndarray, rate: int, axis: Axis, scale: float, guides: Sequence[int]
) -> UInt8[np.ndarray, "H W 3"]:
    """One channel's waveform; clipped columns in another colour."""
    low, high = envelope(samples, rate, axis)
    lane = np.full((LANE, axis.width, 3), BACK, np.uint8)
    lane[:, : len(low)] = PANEL
    lane[:, guides] = FAINT
    middle = (LANE - 1) / 2
    lane[int(middle)] = FAINT
    rows = np.arange(LANE)[:, None]
    first = np.rint(middle - np.clip(high / scale, -1, 1) * middle)
    last = np.rint(middle - np.clip(low / scale, -1, 1) * middle)
    inside = (rows >= first) & (rows <= last)
    lane[:, : len(low)][inside] = WAVE
    loud = np.maximum(high, -low) >= FULL_SCALE
    lane[:, : len(low)][inside & loud] = LOUD
    return lane


def _fft_size(rate: int) -> int:
    """About 43 ms: 1024 at 16 and 24 kHz, 2048 at 48 kHz."""
    return 1024 * max(1, round(rate / 24000))


def spectrogram(
    wave: Float32[np.ndarray, "2 N"], rate: int, axis: Axis
) -> UInt8[np.ndarray, "H W 3"]:
    """The louder log-mel of both channels, low tones at the bottom, on a time axis.

    The brightest colour is the loudest place, the darkest is 80 dB below it; silence
    is dark. Where there is no sound there is background.
    """
    length, size = wave.shape[1], _fft_size(rate)
    hop = max(1, int(axis.seconds * rate / axis.width))
    # Shorter than a window is fine here: what is missing is silence.
    padded = np.pad(wave, ((0, 0), (0, max(0, size - length))))
    mel = log_mel(padded, rate=rate, n_fft=size, hop=hop, bins=BANDS).max(axis=-1)
    top = max(float(mel.max()), math.log(FLOOR) + SPAN)
    level = np.clip((mel - top) / SPAN + 1, 0, 1) * (len(HEAT) - 1)
    times = (np.arange(axis.width) + 0.5) * axis.seconds / axis.width
    near = np.clip(np.rint(times * rate / hop).astype(int), 0, len(level) - 1)
    level = level[near].T[::-1].repeat(BAND_HEIGHT, axis=0)
    steps = np.arange(len(HEAT))
    colours = np.stack([np.interp(level, steps, c) for c in HEAT.T], axis=-1)
    colours[:, times * rate >= length] = BACK
    return np.rint(colours).astype(np.uint8)


def _tones(rate: int) -> list[tuple[str, int]]:
    """(label, row of the spectrogram) of a few frequencies, high to low."""
    size = _fft_size(rate)
    filters = mel_filters(rate, size, BANDS)
    kilo = [k for k in (4, 1) if 8000 * k < 3 * rate]
    rows = [
        (BANDS - int(filters[round(1000 * k / rate * size)].argmax())) * BAND_HEIGHT
        for k in kilo
    ]
    labels = [f"{rate / 2000:.0f} kHz", *(f"{k}" for k in kilo)]
    return [*zip(labels, [0, *rows], strict=True)]


def _sound(
    draw: ImageDraw.ImageDraw,
    sheet: Image.Image,
    wave: np.ndarray,
    rate: int,
    axis: Axis,
    top: int,
    guides: Sequence[int],
) -> None:
    """Both channels' waveforms, and the spectrogram below them."""
    font = ImageFont.load_default(TEXT)
    peak = float(np.abs(wave).max(initial=0.0))
    scale = next((s for s in (0.02, 0.05, 0.1, 0.2, 0.5) if peak <= s), 1.0)
    beside = axis.left - GAP
    for number, name in enumerate("LR"):
        lane = _lane(wave[number], rate, axis, scale, guides)
        y = top + number * (LANE + 2)
        sheet.paste(Image.fromarray(lane), (axis.left, y))
        draw.text((beside, y), f"±{scale:g}", INK, font, anchor="ra")
        draw.text((beside, y + LANE // 2), name, INK, font, anchor="rm")
    y = top + 2 * LANE + 2 + GAP
    sheet.paste(Image.fromarray(spectrogram(wave, rate, axis)), (axis.left, y))
    for text, row in _tones(rate):
        draw.line((axis.left - 3, y + row, axis.left, y + row), INK)
        anchor = "rm" if row else "ra"
        draw.text((beside, y + row), text, INK, font, anchor=anchor)


def _seconds(draw: ImageDraw.ImageDraw, axis: Axis, top: int) -> None:
    """Ticks at round times, at least 60 pixels apart."""
    font = ImageFont.load_default(TEXT)
    least = 60 * axis.seconds / axis.width
    ten = 10.0 ** math.floor(math.log10(least))
    step = next(ten * f for f in (1, 2, 5, 10) if ten * f >= least)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    for number in range(int(axis.seconds / step + 1e-9) + 1):
        x, text = axis.x(number * step), f"{number * step:.{digits}f}"
        draw.line((x, top, x, top + 3), INK)
        draw.text((x, top + 4), text if number else "0 s", INK, font, anchor="ma")


def _summary(
    frames: np.ndarray | None, wave: np.ndarray | None, rate: int, fps: float | int
) -> str:
    parts = []
    if frames is not None:
        count, height, width = frames.shape[:3]
        noun = "frame" if count == 1 else "frames"
        parts.append(f"{count} {noun} of {width} x {height} at {fps:g} fps")
    if wave is None:
        parts.append("no sound")
    else:
        peak = float(np.abs(wave).max(initial=0.0))
        level = f"peak {20 * math.log10(peak):.1f} dB" if peak > 0 else "all zeros"
        parts.append(f"{wave.shape[1] / rate:.3g} s of sound at {rate} Hz, {level}")
    return "; ".join(parts)


def _check_clip(frames: np.ndarray | None, wave: np.ndarray | None, width: int) -> None:
    film = frames is not None and len(frames) > 0
    sound = wave is not None and wave.size > 0
    finite = wave is None or np.isfinite(wave).all()
    if not (film or sound) or not finite or width < 320:
        got = [None if a is None else list(a.shape) for a in (frames, wave)]
        raise ValueError(
            f"timeline: got frames {got[0]}, wave {got[1]} and width {width}, expected "
            "frames or finite sound, and a width of 320 or more"
        )


def timeline(
    frames: UInt8[np.ndarray, "F H W 3"] | None,
    wave: Float32[np.ndarray, "2 N"] | None,
    rate: int = 24000,
    *,
    fps: float | int = 25.0,
    width: int = 1200,
) -> UInt8[np.ndarray, "H2 {width} 3"]:
    """Frames with their times, and below them waveform and log-mel on the same axis.

    Args:
        frames: RGB pictures, or None for a sound alone.
        wave: stereo sound, full scale [-1, 1]; None = silent film. Samples at full
            scale are drawn red.
        rate: its samples per second.
        fps: frames per second.
        width: pixels of the picture.

    Raises:
        ValueError: without frames and sound, for an empty one, for NaN, or for a width
            below 320.
    """
    _check_clip(frames, wave, width)
    frames = None if frames is None or len(frames) == 0 else frames
    wave = None if wave is None or wave.size == 0 else wave
    film_s = 0.0 if frames is None else len(frames) / fps
    seconds = max(film_s, 0.0 if wave is None else wave.shape[1] / rate)
    left, pictures, index = MARGIN, None, np.zeros(0, int)
    if frames is not None:
        index = shown(frames.shape, width)
        step = index[1] if len(index) > 1 else 1
        share = float(step / fps / seconds)
        left, size = _thumbnails(frames.shape[1:3], width, share)
        pictures = resize_crop(frames[index], *size)
    axis = Axis(left, width - 2 * left, seconds)
    film = 0 if pictures is None else pictures.shape[1] + ROW + GAP
    sound = 0 if wave is None else 2 * LANE + 2 + GAP + BANDS * BAND_HEIGHT
    height = ROW + film + (0 if wave is None else sound + ROW + GAP)
    sheet = Image.new("RGB", (width, height), BACK)
    draw = ImageDraw.Draw(sheet)
    text = _summary(frames, wave, rate, fps)
    draw.text((GAP, 3), text, INK, ImageFont.load_default(TEXT))
    times = index / fps
    if pictures is not None:
        _film(draw, sheet, pictures, times, axis, ROW)
    if wave is not None:
        guides = [min(axis.x(t) - axis.left, axis.width - 1) for t in times]
        _sound(draw, sheet, wave, rate, axis, ROW + film, guides)
        _seconds(draw, axis, ROW + film + sound)
    return np.asarray(sheet)

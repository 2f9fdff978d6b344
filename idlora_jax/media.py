"""Media files in and out: the one place to import for sound, pictures and video.

    file --read_audio--> wave f32 [2 N] --log_mel--> f32 [T M 2]
    file --read_image--> u8 [H W 3] --fit_image--> f32 [H W 3] in [-1, 1]
    file --read_video--> u8 [F H W 3] --resize_crop--> u8 [F H W 3]
    frames u8 [F H W 3], wave f32 [2 N] --write_video--> H.264 + AAC mp4
    frames u8 [F H W 3], wave f32 [2 N] --timeline--> u8 [H W 3] --write_png--> png

Arrays are numpy, channels last, stereo first in waves. Everything that writes does so
under a temporary name in the same folder and replaces the file when it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.container
import av.video.stream
import numpy as np
from av.codec import Codec
from av.video.reformatter import Colorspace, Interpolation
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from idlora_jax.files import PathLike, existing, opened, problem, replacing
from idlora_jax.images import fit_image, resize_crop
from idlora_jax.mel import log_mel, resample
from idlora_jax.sheets import contact_sheet, timeline
from idlora_jax.sound import read_audio, write_wav

__all__ = [
    "Probe",
    "contact_sheet",
    "fit_image",
    "log_mel",
    "probe",
    "read_audio",
    "read_image",
    "read_video",
    "replacing",
    "resample",
    "resize_crop",
    "timeline",
    "write_png",
    "write_video",
    "write_wav",
]

TAGS = frozenset(
    "title artist composer album date comment genre copyright description synopsis "
    "keywords".split()
)
"""Metadata names that an mp4 keeps."""

AAC_BITS = 192_000
"""Bits of sound a second; the format allows fewer below 16 kHz."""

_VIDEO = "a video file (mp4, mov, mkv, webm, ...)"
_PICTURE = "a picture (png, jpg, webp, ...) or a video file"
_BT709 = 1  # the same code for primaries, transfer and matrix (ITU-T H.273)
_LIMITED_RANGE = 1
# swscale rounds down by default: a round trip darkens by 1.4 levels, so by 0.02.
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
_TO_RGB = _EXACT | Interpolation.FULL_CHR_H_INT
_FROM_RGB = _EXACT | Interpolation.FULL_CHR_H_INP


def _pil_rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Any PIL mode as RGB: upright, 16-bit scaled to 8, alpha dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image).astype(np.float64)
        top = 65535 if image.mode.startswith("I") else max(1.0, float(grey.max()))
        grey = np.clip(np.rint(grey * 255 / top), 0, 255).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def read_image(path: PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture, or the first frame of a video.

    Rotation (EXIF, or a video's display matrix) is applied. Alpha is dropped: a
    transparent pixel shows the colour stored under it, as in the reference.

    Raises:
        ValueError: for a file that is missing, damaged or truncated, or has no picture.

    Source: scripts/inference_one_stage.py: load_image.
    """
    full = existing("read_image", path, _PICTURE)
    try:
        with Image.open(full) as image:
            return _pil_rgb(image)
    except UnidentifiedImageError:
        pass
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        got = f"a damaged or truncated picture ({error})"
        do = "check that it opens, or save it again"
        raise problem("read_image", path, got, _PICTURE, do) from error
    with opened("read_image", path, _PICTURE) as container:
        for _, frame in _timed_frames("read_image", path, container):
            return _frame_rgb(frame)
    raise problem("read_image", path, "no frame", _PICTURE, "choose another file")


def write_png(path: PathLike, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Write a picture as PNG, under its final name only when complete.

    Raises:
        OSError: if the file cannot be written; nothing is left behind.
    """
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def _timed_frames(
    name: str, path: PathLike, container: av.container.InputContainer
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds since the first frame, frame) of the first video track."""
    if not container.streams.video:
        raise problem(name, path, "no video stream", _VIDEO, "choose another file")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = float(stream.average_rate or 25)
    first = None
    for number, frame in enumerate(container.decode(stream)):
        time = frame.time if frame.time is not None else number / rate
        first = time if first is None else first
        yield time - first, frame


def _frame_rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    """A decoded frame as upright RGB."""
    rgb = frame.reformat(format="rgb24", interpolation=_TO_RGB).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90) % 4))


def _nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of the time nearest to each wanted one; the earlier of two equals."""
    middle = (times[1:] + times[:-1]) / 2
    return np.searchsorted(middle, wanted - 1e-6)


def read_video(
    path: PathLike,
    fps: float | int = 25.0,
    frames: int | None = None,
    *,
    start_s: float | int = 0.0,
) -> UInt8[np.ndarray, "F H W 3"]:
    """Read frames at a fixed rate: frame n is the one nearest to start_s + n / fps.

    Args:
        path: any video file; its sound is read apart, by `read_audio`.
        fps: wanted frames per second, whatever the file's own.
        frames: how many; None = all from `start_s` on.
        start_s: seconds into the video of the first one.

    Raises:
        ValueError: for a file that is missing, damaged, has no video track, or is too
            short for `frames`.
    """
    if fps <= 0 or start_s < 0 or (frames is not None and frames < 1):
        raise ValueError(
            f"read_video: {path}: got fps {fps}, frames {frames}, start_s {start_s}, "
            "expected fps > 0, frames >= 1 and start_s >= 0"
        )
    end = np.inf if frames is None else start_s + (frames - 1) / fps
    kept: list[tuple[float, av.VideoFrame]] = []
    with opened("read_video", path, _VIDEO) as container:
        for time, frame in _timed_frames("read_video", path, container):
            if time <= start_s:
                kept.clear()
            kept.append((time, frame))
            if time > end:
                break
        stream = container.streams.video[0]
        tail = 1 / float(stream.average_rate or 25)
    length = kept[-1][0] + tail - start_s if kept else 0.0
    available = max(0, int(length * fps + 0.5))
    count = available if frames is None else frames
    if count < 1 or available < count:
        got = f"{available} frames at {fps:g} fps from {start_s:g} s on"
        do = "choose a longer video or ask for fewer frames"
        raise problem("read_video", path, got, f"at least {max(1, count)}", do)
    index = _nearest(
        np.array([time for time, _ in kept]), start_s + np.arange(count) / fps
    )
    pictures = {i: _frame_rgb(kept[i][1]) for i in sorted(set(index.tolist()))}
    return np.stack([pictures[i] for i in index.tolist()])


def _check_output(
    path: PathLike,
    frames: np.ndarray,
    wave: np.ndarray | None,
    rate: int,
    tags: Mapping[str, str],
) -> None:
    name = "write_video"
    if len(frames) == 0 or frames.shape[1] % 2 or frames.shape[2] % 2:
        got = f"frames {list(frames.shape)}"
        expected = "at least one frame with an even height and width"
        raise problem(name, path, got, expected, "crop or pad the frames")
    rates = Codec("aac", "w").audio_rates or ()
    if wave is not None and rate not in rates:
        got = f"sound at {rate} Hz"
        raise problem(name, path, got, f"one of {sorted(rates)}", "resample it first")
    if wave is not None and not np.isfinite(wave).all():
        got = "NaN or infinite samples"
        raise problem(name, path, got, "finite samples", "check their source")
    if unknown := sorted(set(tags) - TAGS):
        got = f"metadata {unknown}"
        do = "put it into 'comment', as JSON for instance"
        raise problem(name, path, got, f"one of {sorted(TAGS)}", do)


def _encode_frames(
    output: av.container.OutputContainer,
    stream: av.video.stream.VideoStream,
    frames: np.ndarray,
    fps: Fraction,
) -> None:
    for number, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
        frame = frame.reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=_FROM_RGB
        )
        frame.pts = number
        frame.time_base = 1 / fps
        output.mux(stream.encode(frame))
    output.mux(stream.encode())


def _fit_length(wave: np.ndarray, length: int) -> np.ndarray:
    """Cut or pad with silence to `length` samples."""
    wave = np.clip(wave[:, :length], -1, 1)
    return np.pad(wave, ((0, 0), (0, length - wave.shape[1])))


def _encode_wave(
    output: av.container.OutputContainer, stream: Any, wave: np.ndarray, rate: int
) -> None:
    samples = np.ascontiguousarray(wave, np.float32)
    frame = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
    frame.sample_rate = rate
    frame.pts = 0
    output.mux(stream.encode(frame))
    output.mux(stream.encode())


def write_video(
    path: PathLike,
    frames: UInt8[np.ndarray, "F H W 3"],
    wave: Float32[np.ndarray, "2 N"] | None,
    rate: int = 24000,
    *,
    fps: float | int = 25.0,
    metadata: Mapping[str, str] | None = None,
    crf: int = 17,
) -> None:
    """Write an mp4: H.264 (yuv420p, BT.709, limited range) and AAC at 192 kbit/s.

    The sound is cut, or padded with silence, to the length of the pictures, and starts
    with them: the codec's delay is hidden by an edit list. AAC comes in blocks of 1024
    samples; what the last one has too many lies behind the end that the file states.
    One encoder thread: the same frames give the same bytes on any number of cores.

    Args:
        path: the file to write; folders are made.
        frames: RGB pictures with an even height and width.
        wave: stereo sound, full scale [-1, 1], clipped beyond; None = silent film.
        rate: its samples per second (one that AAC has: 16000, 24000, 48000, ...).
        fps: frames per second.
        metadata: container tags by name, see `TAGS`; "comment" takes any text.
        crf: x264's constant rate factor; 17 hardly visible loss, 51 worst, 0 lossless
            (which few players show).

    Raises:
        ValueError: for odd sides, no frames, NaN, an unknown tag or an unusable rate.
        OSError: if the file cannot be written (disk full, ...); nothing is left behind.
    """
    tags = dict(metadata or {})
    _check_output(path, frames, wave, rate, tags)
    exact_fps = Fraction(fps).limit_denominator(1001)
    # A sound's end is stored on the movie's clock: by default to the millisecond.
    options = {"movflags": "+faststart", "movie_timescale": str(rate)}
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options=options) as output,
    ):
        output.metadata.update(tags)
        video = output.add_stream("libx264", rate=exact_fps, options={"crf": str(crf)})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        context = video.codec_context
        context.thread_count = 1
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED_RANGE
        audio = None
        if wave is not None:
            audio = output.add_stream("aac", rate=rate, layout="stereo")
            audio.codec_context.bit_rate = AAC_BITS
        _encode_frames(output, video, frames, exact_fps)
        if wave is not None:
            length = round(len(frames) / exact_fps * rate)
            _encode_wave(output, audio, _fit_length(wave, length), rate)


@dataclass(frozen=True)
class Probe:
    """What a media file holds; a missing track leaves its fields None.

    Attributes:
        video_codec: for instance "h264".
        height: pixels, as stored (before rotation).
        width: pixels, as stored.
        fps: mean frames per second.
        video_s: seconds of the video track.
        audio_codec: for instance "aac".
        rate: samples per second.
        channels: number of sound channels.
        audio_s: seconds of the sound track.
        metadata: the container's tags.
    """

    video_codec: str | None
    height: int | None
    width: int | None
    fps: float | None
    video_s: float | None
    audio_codec: str | None
    rate: int | None
    channels: int | None
    audio_s: float | None
    metadata: Mapping[str, str]


def _seconds(container: av.container.InputContainer, stream: Any) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def probe(path: PathLike) -> Probe:
    """Codecs, sizes, rates, durations and tags of a media file, from its headers.

    Raises:
        ValueError: for a file that is missing or no media file.
    """
    with opened("probe", path, "a sound or video file") as container:
        video = next(iter(container.streams.video), None)
        audio = next(iter(container.streams.audio), None)
        rate = video.average_rate if video else None
        return Probe(
            video_codec=video.codec_context.name if video else None,
            height=video.height if video else None,
            width=video.width if video else None,
            fps=float(rate) if rate else None,
            video_s=_seconds(container, video) if video else None,
            audio_codec=audio.codec_context.name if audio else None,
            rate=audio.rate if audio else None,
            channels=audio.channels if audio else None,
            audio_s=_seconds(container, audio) if audio else None,
            metadata=dict(container.metadata),
        )

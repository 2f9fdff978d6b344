"""Clip -> the parts of it that are encoded: a bucket and a beginning for each.

    clip, its size and length --buckets--> Cut, and more of them with segments

Only headers and one picture are read. Frames are counted at the data set's rate, not at
the file's, and from the picture as it is shown, upright.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from idlora_jax import geometry, media
from idlora_jax.data import buckets as sizes
from idlora_jax.data import identity, prefetch
from idlora_jax.data.buckets import Bucket
from idlora_jax.data.manifest import Clip
from idlora_jax.data.rejection import Rejection, rejection
from idlora_jax.types import VideoGrid


@dataclass(frozen=True)
class Cut:
    """A part of a clip that becomes one sample.

    Attributes:
        name: of its files; the clip's, with `.s2`, `.s3`, ... from the second on.
        clip: that it is cut from.
        bucket: its size.
        fps: frames per second.
        start_s: where in the file it begins.
        until_s: where in the file the clip ends.
        content: a digest of the file.
    """

    name: str
    clip: Clip
    bucket: Bucket
    fps: float
    start_s: float
    until_s: float
    content: str

    @property
    def grid(self) -> VideoGrid:
        """Its size as a video."""
        return self.bucket.grid(self.fps)

    @property
    def seconds(self) -> float:
        """Its length."""
        return geometry.seconds(self.grid)

    @property
    def end_s(self) -> float:
        """Where in the file it ends."""
        return self.start_s + self.seconds


Found = Sequence[Cut] | Rejection


def _measured(path: Path) -> tuple[tuple[int, int], float]:
    """Height and width as shown, and seconds of a video with sound.

    Raises:
        Rejection: if it has no video, no sound, or cannot be read.
    """
    try:
        found = media.probe(path)
        for kind, codec in (("video", found.video_codec), ("audio", found.audio_codec)):
            if codec is None:
                raise ValueError(f"{path}: got no {kind} stream, expected one")
        height, width = media.read_image(path).shape[:2]
    except (ValueError, OSError) as error:
        raise rejection(path, error) from None
    # Where no length is stated, decoding finds out whether there is enough.
    return (height, width), float("inf") if found.video_s is None else found.video_s


def _frames(seconds: float, fps: float, longest: int) -> int:
    return int(min(seconds * fps + 0.5, longest))


def cuts(
    clip: Clip, buckets: Sequence[Bucket], fps: float, segments: int = 1
) -> tuple[Cut, ...]:
    """Where a clip is cut, and to which size.

    Args:
        clip: from the list.
        buckets: to choose from, see `buckets.choose`.
        fps: frames per second.
        segments: at most so many parts, one behind the other without a gap.

    Raises:
        Rejection: if the clip cannot be read, has no sound, is too short for every
            bucket, or has no caption.
    """
    if not clip.caption:
        wanted = clip.video.with_suffix(".txt").name
        raise Rejection(
            "empty caption",
            f"{clip.video}: got an empty caption, expected a text; write one into the "
            f"table, or for a folder of clips into {wanted} beside the clip",
        )
    size, file_s = _measured(clip.video)
    until = min(file_s, float("inf") if clip.end_s is None else clip.end_s)
    shortest = min(bucket.frames for bucket in buckets)
    longest = max(bucket.frames for bucket in buckets) * segments
    frames = _frames(until - clip.start_s, fps, longest)
    bucket = sizes.choose(buckets, size, frames)
    if bucket is None:
        raise Rejection(
            "too short",
            f"{clip.video}: got {max(0, frames)} frames ({max(0, frames) / fps:.2f} s) "
            f"at {fps:g} fps, expected {shortest} ({shortest / fps:.2f} s) or more; "
            "ask for fewer frames",
        )
    content = identity.of_file(clip.video)
    return tuple(
        Cut(
            clip.name if n == 0 else f"{clip.name}.s{n + 1}",
            clip,
            bucket,
            fps,
            clip.start_s + n * bucket.frames / fps,
            until,
            content,
        )
        for n in range(min(segments, frames // bucket.frames))
    )


def plan(
    clips: Iterable[Clip],
    buckets: Sequence[Bucket],
    fps: float,
    *,
    segments: int = 1,
    workers: int = 1,
    seen: Callable[[], object] = lambda: None,
) -> dict[str, Found]:
    """The cuts of every clip, or why it has none, by its name.

    Args:
        clips: from the list.
        buckets: see `cuts`.
        fps: see `cuts`.
        segments: see `cuts`.
        workers: threads that read files.
        seen: called after every clip.
    """

    def found(clip: Clip) -> tuple[str, Found]:
        try:
            return clip.name, cuts(clip, buckets, fps, segments)
        except (ValueError, OSError) as error:
            return clip.name, rejection(clip.video, error)

    planned = {}
    for name, result in prefetch.ordered(found, clips, workers):
        planned[name] = result
        seen()
    return planned

"""The list of clips a data set is made from: one JSON object a line.

    {"video": "anna/01.mp4", "caption": "[VISUAL]: ...", "speaker": "anna"}

`video` is a path relative to the manifest; without its suffix it is the clip's name,
and the name of its files in every folder of the data set. The reference of a clip is
the next clip of the same speaker, in the order of the lines, the last one's the first.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from idlora_jax.files import PathLike, existing

_KEYS = ("video", "caption", "speaker")


@dataclass(frozen=True)
class Clip:
    """One line of a manifest.

    Attributes:
        name: relative path without suffix, with forward slashes.
        video: where the file is.
        caption: what the prompt says of it.
        speaker: whose voice it holds.
    """

    name: str
    video: Path
    caption: str
    speaker: str


def _clip(line: str, where: str, folder: Path) -> Clip:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where}: not JSON ({error}); write one object a line"
        ) from None
    values = [row.get(key) for key in _KEYS] if isinstance(row, dict) else []
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    if len(texts) < len(_KEYS):
        raise ValueError(
            f"{where}: got {line.strip()[:80]}, expected an object with the texts "
            f"{', '.join(_KEYS)}, none of them empty"
        )
    video, caption, speaker = texts
    path = PurePosixPath(video)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{where}: video {video!r} must be relative to {folder} and below it; move "
            "the manifest to a folder above its clips"
        )
    return Clip(str(path.with_suffix("")), folder / path, caption, speaker)


def read(path: PathLike) -> tuple[Clip, ...]:
    """Read a manifest.

    Raises:
        ValueError: if it is missing, has no clip or a line that is none, names a clip
            twice, or a speaker has a single clip, which leaves no reference.
    """
    file = Path(existing("manifest", path, "a .jsonl file"))
    lines = file.read_text(encoding="utf-8").splitlines()
    clips = tuple(
        _clip(line, f"{path}, line {number}", file.parent)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not clips:
        raise ValueError(f"{path}: got no line, expected one a clip")
    _check_names(path, [clip.name for clip in clips])
    _check_speakers(path, [clip.speaker for clip in clips])
    return clips


def _repeated(values: Sequence[str]) -> list[str]:
    return sorted(value for value, count in Counter(values).items() if count > 1)


def _check_names(path: PathLike, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path}: more than one clip is named {', '.join(_repeated(names))} (paths "
            "without suffix); rename all but one"
        )


def _check_speakers(path: PathLike, speakers: Sequence[str]) -> None:
    single = sorted(set(speakers) - set(_repeated(speakers)))
    if single:
        raise ValueError(
            f"{path}: a reference is another clip of the same speaker, got a single "
            f"clip of {', '.join(single)}; add one of each or take these lines out"
        )


def by_speaker(clips: Sequence[Clip]) -> dict[str, list[Clip]]:
    """Clips of each speaker in order, speakers by first appearance."""
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip.speaker, []).append(clip)
    return groups


def reference(
    clip: Clip, group: Sequence[Clip], usable: Collection[str]
) -> Clip | None:
    """The clip whose sound is the reference: the next usable one of the speaker.

    Args:
        clip: one of `group`.
        group: all clips of its speaker, in order.
        usable: names of clips whose sound can be used.

    Returns:
        None if no other clip is usable.
    """
    start = list(group).index(clip) + 1
    others = [*group[start:], *group[: start - 1]]
    return next((other for other in others if other.name in usable), None)

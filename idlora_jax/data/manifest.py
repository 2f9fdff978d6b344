"""The list of clips a data set is made from: a folder of them, or a table.

    {"video": "anna/01.mp4", "caption": "[VISUAL]: ...", "speaker": "anna"}

A table (`data.tables`) has a row for each clip. `video` is a path relative to the
table; without its suffix it is the clip's name, and the name of its files in every
folder of the data set. Optional columns: `start` and `end`, seconds between which the
clip lies in its file, and `reference`, a file whose sound is the reference instead of
another clip of the speaker. Columns of public hubs are taken, too, see `NAMES`.

In a folder every video file is a clip, its first subfolder is its speaker, and its
caption is the text beside it, `01.txt` for `01.mp4`. What a `metadata` table in the
folder says of a clip comes before both.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from idlora_jax.data import tables
from idlora_jax.data.tables import Row
from idlora_jax.files import PathLike, problem

NAMES = {
    "video": ("video", "file_name", "media_path"),
    "caption": ("caption", "text"),
    "speaker": ("speaker", "speaker_id", "identity"),
    "start": ("start", "start_s"),
    "end": ("end", "end_s"),
    "reference": ("reference",),
}
"""Columns, and the names under which they are looked for; the first that is there."""
REQUIRED = ("video", "caption", "speaker")
VIDEOS = frozenset(".mp4 .mov .m4v .mkv .webm .avi .mpg .mpeg .ts .flv .wmv".split())
"""Suffixes of the files in a folder that are clips."""
METADATA = "metadata"


@dataclass(frozen=True)
class Clip:
    """One clip of a list.

    Attributes:
        name: relative path without suffix, with forward slashes; clips that begin later
            than their file have `.<seconds>s` behind it.
        video: where the file is.
        caption: what the prompt says of it; may be empty, which rejects it later.
        speaker: whose voice it holds.
        start_s: where in the file it begins.
        end_s: where it ends; None: with the file.
        reference: a file whose sound is its reference; None: another clip's.
    """

    name: str
    video: Path
    caption: str
    speaker: str
    start_s: float = 0.0
    end_s: float | None = None
    reference: Path | None = None


Fill = Callable[[PurePosixPath], Mapping[str, str]]
"""Relative path of a clip -> the columns that its row need not have."""


def _nothing(path: PurePosixPath) -> Mapping[str, str]:
    del path
    return {}


def _value(row: Row, column: str) -> Any:
    """A column's value; None where it is absent or empty."""
    found = (row.values.get(name) for name in NAMES[column])
    value = next((x for x in found if x is not None), None)
    return None if isinstance(value, str) and not value.strip() else value


def _text(row: Row, column: str) -> str | None:
    value = _value(row, column)
    if isinstance(value, int) and not isinstance(value, bool) and column == "speaker":
        return str(value)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{row.where}: got {column} {value!r:.60}, expected a text")
    return value


def _seconds(row: Row, column: str) -> float | None:
    value = _value(row, column)
    if value is None:
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if isinstance(value, bool) or not 0 <= seconds < math.inf:
        raise ValueError(
            f"{row.where}: got {column} {value!r:.60}, expected seconds, 0 or more"
        )
    return seconds


def _below(row: Row, column: str, text: str, folder: Path) -> PurePosixPath:
    path = PurePosixPath(text.strip())
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{row.where}: {column} {text!r} must be relative to {folder} and below "
            "it; move the table to a folder above its clips"
        )
    return path


def _has(row: Row, column: str) -> bool:
    return any(name in row.values for name in NAMES[column])


def _check_columns(row: Row, required: Iterable[str]) -> None:
    lacking = [column for column in required if not _has(row, column)]
    if lacking:
        raise ValueError(
            f"{row.where}: got the columns {', '.join(map(str, row.values)) or 'none'}"
            f", expected {', '.join(REQUIRED)}; {', '.join(lacking)} is missing"
        )


def _span(row: Row) -> tuple[float, float | None]:
    start, end = _seconds(row, "start") or 0.0, _seconds(row, "end")
    if end is not None and end <= start:
        raise ValueError(
            f"{row.where}: got start {start:g} and end {end:g}, expected an end after "
            "the start"
        )
    return start, end


def _clip(row: Row, folder: Path, fill: Fill) -> Clip:
    _check_columns(row, ["video"] if fill is not _nothing else REQUIRED)
    video = _text(row, "video")
    path = _below(row, "video", video, folder) if video else None
    filled = fill(path) if path else {}
    speaker = _text(row, "speaker") or filled.get("speaker")
    if path is None or not speaker:
        raise ValueError(
            f"{row.where}: got an empty {'speaker' if path else 'video'}, expected "
            f"{', '.join(REQUIRED)} of every clip"
        )
    caption = _text(row, "caption") or filled.get("caption") or ""
    reference = _text(row, "reference")
    if reference is not None:
        reference = _below(row, "reference", reference, folder)
        if reference == path:
            raise ValueError(
                f"{row.where}: the reference is the clip itself; choose another file "
                "of the speaker"
            )
    start, end = _span(row)
    name = str(path.with_suffix("")) + (f".{start:g}s" if start else "")
    where = None if reference is None else folder / reference
    return Clip(
        name, folder / path, caption.strip(), speaker.strip(), start, end, where
    )


def _repeated(values: Sequence[str]) -> list[str]:
    return sorted(value for value, count in Counter(values).items() if count > 1)


def check_names(path: PathLike, names: Sequence[str]) -> None:
    """Refuse two clips of one name.

    Raises:
        ValueError: naming them.
    """
    if len(set(names)) < len(names):
        raise ValueError(
            f"{path}: more than one clip is named {', '.join(_repeated(names))} (paths "
            "without suffix); rename all but one"
        )


def _of_table(path: PathLike) -> list[Clip]:
    folder = Path(path).parent
    return [_clip(row, folder, _nothing) for row in tables.rows(path)]


def _metadata(folder: Path) -> Path | None:
    """The table in a folder, if there is one."""
    paths = [folder / f"{METADATA}{suffix}" for suffix in tables.SUFFIXES]
    found = [path for path in paths if path.is_file()]
    if len(found) > 1:
        got = " and ".join(path.name for path in found)
        do = "remove all but one"
        raise problem("manifest", folder, got, "one table of the clips", do)
    return found[0] if found else None


def _beside(folder: Path) -> Fill:
    """Speaker and caption of a clip, as its place and the text beside it say."""

    def fill(path: PurePosixPath) -> Mapping[str, str]:
        text = (folder / path).with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8-sig") if text.is_file() else ""
        except UnicodeDecodeError as error:
            got = f"bytes that are no UTF-8 text ({error.reason})"
            do = "save it as UTF-8"
            raise problem("manifest", text, got, "a caption", do) from None
        speaker = path.parts[0] if len(path.parts) > 1 else ""
        return {"caption": caption, "speaker": speaker}

    return fill


def _videos(folder: Path) -> list[PurePosixPath]:
    found = []
    for top, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(top).relative_to(folder).as_posix()
        paths = (PurePosixPath(inside, name) for name in names if name[0] != ".")
        found += [path for path in paths if path.suffix.lower() in VIDEOS]
    return sorted(found)


def _of_folder(folder: Path) -> list[Clip]:
    fill, table = _beside(folder), _metadata(folder)
    rows = tables.rows(table) if table else []
    clips = [_clip(row, folder, fill) for row in rows]
    known = {clip.video for clip in clips} | {clip.reference for clip in clips}
    for path in _videos(folder):
        if folder / path in known:
            continue
        if len(path.parts) == 1:
            got = "a clip that lies in no speaker's folder"
            do = f"move it to one, or write a {METADATA}.jsonl that names its speaker"
            expected = f"{folder}/<speaker>/{path}"
            raise problem("manifest", folder / path, got, expected, do)
        clips.append(_clip(Row(str(folder / path), {"video": str(path)}), folder, fill))
    return clips


def read(path: PathLike) -> tuple[Clip, ...]:
    """Read the list of clips.

    Args:
        path: a folder of clips, or a .jsonl, .json, .csv or .tsv file.

    Raises:
        ValueError: if it is missing, has no clip or a row that is none, or names a clip
            twice; the message names file and line.
    """
    folder = Path(path).is_dir()
    clips = tuple(_of_folder(Path(path)) if folder else _of_table(path))
    if not clips:
        got = "no video file" if folder else "no clip"
        do = "give the folder above those of the speakers" if folder else "add some"
        raise problem("manifest", path, got, "one clip or more", do)
    check_names(path, [clip.name for clip in clips])
    return clips

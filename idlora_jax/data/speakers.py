"""Who speaks in which clip, from a list with one JSON object a line.

    {"video": "anna/01.mp4", "speaker": "anna"}
    {"file_name": "02.mp4", "speaker_id": 7}

The first is this library's manifest, the second the form of metadata.jsonl on public
hubs. Other keys are passed over, and so are lines without these.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from idlora_jax.files import PathLike, existing, problem

_CLIP = ("video", "file_name", "name")
_SPEAKER = ("speaker", "speaker_id", "identity")


def _first(row: dict[str, Any], keys: tuple[str, ...]) -> str:
    found = (row[key] for key in keys if isinstance(row.get(key), str | int))
    return str(next(found, ""))


def read(path: PathLike) -> dict[str, str]:
    """Speakers by clip: by its path without suffix, and by the last part of that.

    Raises:
        ValueError: if it is missing, is not JSON, or names no speaker.
    """
    expected = 'lines like {"video": "a/1.mp4", "speaker": "a"}'
    file = Path(existing("speakers", path, expected))
    found: dict[str, str] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        do = "write one object a line"
        raise problem("speakers", path, f"no JSON ({error})", expected, do) from None
    for row in rows:
        if isinstance(row, dict):
            clip, speaker = _first(row, _CLIP), _first(row, _SPEAKER)
            name = PurePosixPath(clip).with_suffix("") if clip else None
            if name is not None and speaker:
                found |= {name.name: speaker, str(name): speaker}
    if not found:
        got = f"{len(rows)} lines without a clip and its speaker"
        raise problem("speakers", path, got, expected, "add them, or leave it out")
    return found

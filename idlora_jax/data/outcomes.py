"""What became of each clip: counted, listed, and written as report.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from idlora_jax.data.buckets import Bucket
from idlora_jax.data.cuts import Cut
from idlora_jax.data.rejection import KINDS, Kind, Rejection
from idlora_jax.files import replacing

FILE = "report.json"
LISTED = 20


class Outcome(NamedTuple):
    """What became of a clip.

    Attributes:
        name: of its files.
        state: written now, there already, or rejected.
        reason: why it was rejected, in a sentence.
        kind: the same as one of a few words.
        bucket: its size.
        seconds: its length.
        speaker: whose clip it is.
        reference: whose sound is its reference.
    """

    name: str
    state: Literal["written", "existing", "rejected"]
    reason: str = ""
    kind: Kind | None = None
    bucket: Bucket | None = None
    seconds: float = 0.0
    speaker: str = ""
    reference: str = ""


def accepted(
    cut: Cut, state: Literal["written", "existing"], reference: str
) -> Outcome:
    """A sample that is there."""
    about = {"bucket": cut.bucket, "seconds": cut.seconds, "speaker": cut.clip.speaker}
    return Outcome(cut.name, state, reference=reference, **about)


def rejected(name: str, speaker: str, why: Rejection) -> Outcome:
    """A clip that cannot be used."""
    return Outcome(name, "rejected", str(why), why.kind, speaker=speaker)


def _buckets(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int | float]]:
    found: dict[str, dict[str, int | float]] = {}
    for outcome in outcomes:
        if outcome.bucket is not None:
            empty = {"written": 0, "existing": 0, "seconds": 0.0}
            row = found.setdefault(str(outcome.bucket), empty)
            row[outcome.state] += 1
            row["seconds"] = round(row["seconds"] + outcome.seconds, 3)
    return found


def kinds(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Number of rejected clips by kind of reason."""
    counts = Counter(outcome.kind for outcome in outcomes)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def as_json(
    outcomes: Sequence[Outcome],
    settings: Mapping[str, Any],
    *,
    seconds: float,
    stopped: bool,
    strangers: Sequence[str],
) -> dict[str, Any]:
    """A run as JSON.

    Args:
        outcomes: of all clips that were looked at.
        settings: of the run.
        seconds: that it took.
        stopped: whether a signal ended it early.
        strangers: samples in the folder that are none of these clips.
    """
    states = Counter(outcome.state for outcome in outcomes)
    rows = [
        {k: str(v) if isinstance(v, Bucket) else v for k, v in o._asdict().items() if v}
        for o in outcomes
    ]
    return {
        "settings": {name: _plain(value) for name, value in settings.items()},
        "clips": {
            state: states[state] for state in ("written", "existing", "rejected")
        },
        "speakers": len({o.speaker for o in outcomes if o.state != "rejected"}),
        "buckets": _buckets(outcomes),
        "rejected": kinds(outcomes),
        "strangers": [*strangers],
        "seconds": round(seconds, 1),
        "stopped": stopped,
        "outcomes": rows,
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def write(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write a report.

    Raises:
        OSError: if it cannot be written; an older one is untouched.
    """
    path = folder / FILE
    with replacing(path) as temporary:
        text = json.dumps(report, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def _lines(
    outcomes: Sequence[Outcome], output: Path, strangers: Sequence[str]
) -> Iterator[str]:
    states = Counter(outcome.state for outcome in outcomes)
    text = f"{output}: wrote {states['written']} of {len(outcomes)} clips"
    if states["existing"]:
        text += f", {states['existing']} were there already"
    yield text + (f", left out {states['rejected']}" if states["rejected"] else "")
    table = {
        f"bucket {size}": (int(row["written"] + row["existing"]), row["seconds"])
        for size, row in _buckets(outcomes).items()
    }
    for name, (clips, seconds) in table.items():
        yield f"  {name:<28}{clips:>7,} clips{seconds / 60:>9.1f} min"
    for kind, count in kinds(outcomes).items():
        yield f"  left out: {kind:<18}{count:>7,} clips"
    bad = [outcome for outcome in outcomes if outcome.state == "rejected"]
    yield from (f"  {o.name}: {o.reason}" for o in bad[:LISTED])
    if len(bad) > LISTED:
        yield f"  ... and {len(bad) - LISTED:,} more, all in {output / FILE}"
    if strangers:
        yield (
            f"  {len(strangers):,} samples in the folder are none of these clips and "
            f"will be trained on, too: {', '.join(strangers[:3])}"
            f"{', ...' if strangers[3:] else ''}; remove them if they are out of date"
        )


def summary(
    outcomes: Sequence[Outcome], output: Path, strangers: Sequence[str] = ()
) -> str:
    """A run in words: counts for each bucket and each reason, then the reasons.

    Args:
        outcomes: of all clips.
        output: the folder.
        strangers: see `as_json`.
    """
    return "\n".join(_lines(outcomes, output, strangers))

"""Published data set -> ArrayRecord files of a TFDS data set.

    check    every file is read once and looked at: the report
    write    clips joined and written, shard by shard, into incomplete.1.0.0/
    finish   dataset_info.json and its like, then one rename to 1.0.0/

A shard is written under a temporary name and renamed. What was decided (which clips
stand in which shard) and what was found (the facts of every file) are kept beside the
shards, so that a run that was stopped goes on with the first shard that is missing, as
long as source and options are the same.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idlora_jax.data import report as reports
from idlora_jax.data import stored, tfds_latents, tfds_plan
from idlora_jax.data.report import Fact, Report
from idlora_jax.data.sources import Progress
from idlora_jax.data.tfds_plan import Options, Plan, Source
from idlora_jax.files import replacing
from idlora_jax.weights import progress

_PLAN, _FACTS = "plan.json", "facts.json"


@dataclass(frozen=True)
class Outcome:
    """What `convert` did.

    Attributes:
        folder: of the data set.
        clips: in it.
        written: shards written now; 0: it was finished before.
    """

    folder: Path
    clips: int
    written: int


def _looked_at(source: Source) -> list[Fact]:
    with progress.bar(source.nbytes, "check") as told:
        return [reports.look(item) for item in source.scan(told)]


def check(source: Source, speakers: Mapping[str, str] | None = None) -> Report:
    """Read every file of a source and report."""
    return reports.report(_looked_at(source), speakers)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _fact(row: dict[str, Any]) -> Fact:
    tuples: Any = {key: tuple(row[key]) for key in ("shape", "dtypes")}
    return Fact(**(row | tuples))


def _facts(source: Source, kept: Path) -> list[Fact]:
    """The facts of every file: from an earlier run over the same files, or read."""
    state = _digest(source.state())
    found = _read_json(kept)
    if isinstance(found, dict) and found.get("state") == state:
        return [_fact(row) for row in found["facts"]]
    facts = _looked_at(source)
    rows = [dataclasses.asdict(fact) for fact in facts]
    _write_json(kept, {"state": state, "facts": rows})
    return facts


def _records(
    source: Source, plan: Plan, names: Sequence[str], options: Options
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of some clips, in their order."""
    for name, files in source.joined(names, plan.report.names, plan.places):
        try:
            clip = tfds_latents.cast(stored.stored(files), options.dtype)
        except ValueError as error:
            raise ValueError(
                f"data: {name}: {error}; was it changed meanwhile?"
            ) from None
        fps, speaker = plan.clips[name].fps, plan.report.speakers.get(name, "")
        yield name, tfds_latents.encode(clip, name=name, fps=fps, speaker=speaker)


def _write_shard(path: Path, records: Iterable[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with replacing(path) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:
            raise OSError(errno.EIO, str(error)) from None


def shard_path(folder: Path, options: Options, number: int, count: int) -> Path:
    """Where a shard lies; TFDS knows files by such names."""
    end = f"{number:05d}-of-{count:05d}"
    return folder / f"{options.name}-{tfds_latents.SPLIT}.array_record-{end}"


def _write_shards(source: Source, plan: Plan, options: Options, told: Progress) -> int:
    """Write the shards that are missing; their number."""
    serialise = tfds_latents.serialiser(plan.form)
    count = len(plan.shards)
    paths = [shard_path(options.incomplete, options, n, count) for n in range(count)]
    todo = [n for n, path in enumerate(paths) if not path.is_file()]
    told(sum(plan.nbytes(c) for n in {*range(count)} - {*todo} for c in plan.shards[n]))
    names = [name for n in todo for name in plan.shards[n]]
    records = _records(source, plan, names, options)

    def serialised(count: int) -> Iterator[bytes]:
        for name, record in itertools.islice(records, count):
            yield serialise(record)
            told(plan.nbytes(name))

    for n in todo:
        _write_shard(paths[n], serialised(len(plan.shards[n])))
    return len(todo)


def _prepare(source: Source, plan: Plan, options: Options) -> None:
    """Keep the shards of an earlier run only if this one would write the same.

    What a run that was killed left half-written is taken away.
    """
    for path in options.incomplete.glob(".*"):
        path.unlink()
    kept = options.incomplete / _PLAN
    said = [options.dtype, options.name, dict(plan.report.speakers)]
    key = _digest([source.state(), plan.shards, *said])
    if _read_json(kept) != key:
        for path in options.incomplete.glob("*.array_record-*"):
            path.unlink()
        _write_json(kept, key)


def _finish(plan: Plan, options: Options) -> None:
    from tensorflow_datasets import core

    facts = tfds_latents.metadata(plan.form, tuple(plan.clips.values()))
    builder = tfds_latents.builder(
        options.name, plan.form, facts, data_dir=options.data_dir
    )
    shards = sorted(options.incomplete.glob("*.array_record-*"))
    split = core.SplitInfo(
        name=tfds_latents.SPLIT,
        shard_lengths=[len(shard) for shard in plan.shards],
        num_bytes=sum(path.stat().st_size for path in shards),
        filename_template=core.ShardedFileTemplate(
            data_dir=str(options.incomplete),  # pyright: ignore
            dataset_name=options.name,
            split=tfds_latents.SPLIT,
            filetype_suffix="array_record",
        ),
    )
    builder.info.set_splits(core.SplitDict([split]))
    builder.info.write_to_directory(str(options.incomplete))
    for name in (_PLAN, _FACTS):
        (options.incomplete / name).unlink(missing_ok=True)
    os.rename(options.incomplete, options.final)


def finished(options: Options) -> Outcome | None:
    """The data set, if it is there already.

    Raises:
        ValueError: if something else is there.
    """
    if not options.final.exists():
        return None
    clips = len(tfds_latents.open_dataset(options.final))
    return Outcome(options.final, clips, 0)


def convert(
    source: Source, options: Options, speakers: Mapping[str, str] | None = None
) -> Outcome:
    """Write a data set, or go on where an earlier run was stopped.

    Args:
        source: from `sources.open_source`.
        options: what to write, and where.
        speakers: by clip; see `report.report`.

    Raises:
        ValueError: if the source is broken; the message is its report.
        OSError: if something cannot be written.
    """
    if (done := finished(options)) is not None:
        return done
    options.incomplete.mkdir(parents=True, exist_ok=True)
    facts = _facts(source, options.incomplete / _FACTS)
    made = tfds_plan.plan(source, reports.report(facts, speakers), options)
    _prepare(source, made, options)
    with progress.bar(sum(map(made.nbytes, made.clips)), "write") as told:
        written = _write_shards(source, made, options, told)
    _finish(made, options)
    return Outcome(options.final, len(made.clips), written)

"""Writing data sets: taken up again after a stop, whole or not at all."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import published_folder
import pytest

from idlora_jax.data import sources, tfds_latents, tfds_plan, tfds_writer
from idlora_jax.data.stored import AUDIO, TEXT, VIDEO
from idlora_jax.data.tfds_plan import Options
from idlora_jax.data.tfds_writer import Outcome

SMALL = 40_000
"""Bytes of a shard of two clips."""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return published_folder.write(tmp_path / "in", 6)


def convert(source: pathlib.Path, options: Options) -> Outcome:
    return tfds_writer.convert(sources.open_source(source), options)


def shards(path: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(path.glob("*array_record*"))}


class Stop(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make encoding fail at a clip."""
    encode, seen = tfds_latents.encode, []

    def failing(*args: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > count:
            raise Stop
        return encode(*args, **options)

    monkeypatch.setattr(tfds_latents, "encode", failing)


@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_run_goes_on_where_it_was(
    folder, tmp_path, monkeypatch: pytest.MonkeyPatch, packed
):
    if packed:
        folder = published_folder.archives(tmp_path / "packed", folder)
    straight = Options(tmp_path / "straight", shard=SMALL)
    assert convert(folder, straight).written == 3
    options = Options(tmp_path / "stopped", shard=SMALL)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stop):
            convert(folder, options)
    assert not options.final.exists()
    assert len(shards(options.incomplete)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(type(sources.open_source(folder)), "scan", None)
        assert convert(folder, options).written == 2
    assert shards(options.final) == shards(straight.final)
    assert not options.incomplete.exists()
    assert {p.suffix for p in options.final.iterdir()} == {
        ".json", *(f".array_record-0000{n}-of-00003" for n in range(3)),
    }  # fmt: skip


@pytest.mark.parametrize("change", ["source", "options"])
def test_shards_of_other_files_or_options_are_not_kept(
    folder, tmp_path, monkeypatch: pytest.MonkeyPatch, change
):
    options = Options(tmp_path / "tfds", shard=SMALL)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stop):
            convert(folder, options)
    if change == "source":
        published_folder.write_clip(folder, "speaker0/clip0", published_folder.files(7))
    else:
        options = Options(tmp_path / "tfds", dtype="float32", shard=SMALL)
    assert convert(folder, options).written == 3
    video = tfds_latents.open_dataset(options.final)[0].video
    seed = 7 if change == "source" else 0
    expected = published_folder.files(seed)[VIDEO]["latents"].astype(np.float32)
    np.testing.assert_array_equal(
        video.astype(np.float32), np.moveaxis(expected, 0, -1)
    )


def test_two_processes_write_the_same_bytes(folder, tmp_path):
    script = pathlib.Path(__file__).parents[2] / "convert" / "dataset.py"
    found = []
    for name in ("first", "second"):
        command = [sys.executable, str(script), str(folder), str(tmp_path / name)]
        subprocess.run(command, check=True, capture_output=True)
        found.append(shards(Options(tmp_path / name).final))
    assert found[0] == found[1]


def test_what_a_killed_run_left_half_written_is_taken_away(folder, tmp_path):
    options = Options(tmp_path / "tfds")
    options.incomplete.mkdir(parents=True)
    (options.incomplete / ".idlora_folder-train.7.tmp.array_record-x").write_bytes(b"")
    convert(folder, options)
    assert len(list(options.final.iterdir())) == 4


def test_a_finished_data_set_is_left_alone(folder, tmp_path):
    options = Options(tmp_path / "tfds")
    first = convert(folder, options)
    before = {p: p.stat().st_mtime_ns for p in options.final.iterdir()}
    again = convert(folder, options)
    assert (first.clips, first.written) == (6, 1)
    assert (again.clips, again.written) == (6, 0)
    assert {p: p.stat().st_mtime_ns for p in options.final.iterdir()} == before


def test_a_broken_source_is_refused_with_its_report(folder, tmp_path):
    (folder / TEXT / "speaker0/clip0.pt").unlink()
    (folder / AUDIO / "speaker0/clip2.pt").write_bytes(b"PK\3\4")
    options = Options(tmp_path / "tfds")
    with pytest.raises(
        ValueError, match=r"clip2: .*truncated zip(?s:.*)clip0: missing"
    ):
        convert(folder, options)
    assert not options.final.exists()
    skipping = Options(tmp_path / "tfds", skip_broken=True)
    assert convert(folder, skipping).clips == 4


def test_a_source_without_a_whole_clip_cannot_be_skipped_over(folder, tmp_path):
    for path in (folder / TEXT).rglob("*.pt"):
        path.unlink()
    with pytest.raises(ValueError, match="no complete clip"):
        convert(folder, Options(tmp_path / "tfds", skip_broken=True))


@pytest.mark.parametrize(
    "other", [{"shared": False}, {"text": (4, 12)}, {"text": (6, 20)}, {"fps": 24.0}]
)
def test_records_have_one_form_but_may_differ_in_length(folder, tmp_path, other):
    published_folder.write_clip(folder, "other", published_folder.files(9, **other))
    options = Options(tmp_path / "tfds")
    if "shared" in other or other.get("text") == (4, 12):
        with pytest.raises(
            ValueError, match=r"conditions has .*different forms \(other"
        ):
            convert(folder, options)
    else:
        assert convert(folder, options).clips == 7


def test_dtypes_that_differ_are_made_equal_by_asking_for_one(folder, tmp_path):
    contents = published_folder.files(9)
    contents[VIDEO]["latents"] = contents[VIDEO]["latents"].astype(np.float32)
    published_folder.write_clip(folder, "other", contents)
    with pytest.raises(ValueError, match="latents has clips of different forms"):
        convert(folder, Options(tmp_path / "tfds"))
    assert convert(folder, Options(tmp_path / "tfds", dtype="bfloat16")).clips == 7


def test_tensors_of_integers_need_a_dtype(tmp_path):
    contents = published_folder.files(0)
    contents[AUDIO]["latents"] = np.ones((8, 9, 16), np.int64)
    published_folder.write_clip(tmp_path / "in", "a", contents)
    with pytest.raises(ValueError, match=r"tensors of \['int64'\]; give --dtype"):
        convert(tmp_path / "in", Options(tmp_path / "tfds"))


def test_a_full_disk_is_one_error_and_leaves_no_shard(
    folder, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    from array_record.python import array_record_module

    class Full:
        def __init__(self, path: str, options: str) -> None:
            pathlib.Path(path).write_bytes(b"half")

        def write(self, record: bytes) -> None:
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    options = Options(tmp_path / "tfds")
    with pytest.raises(OSError, match=r"No space left on device.*free some disk space"):
        convert(folder, options)
    assert not options.final.exists()
    assert sorted(p.name for p in options.incomplete.iterdir()) == [
        "facts.json", "plan.json",
    ]  # fmt: skip


def test_an_odd_facts_file_is_read_again(folder, tmp_path):
    options = Options(tmp_path / "tfds")
    options.incomplete.mkdir(parents=True)
    (options.incomplete / "facts.json").write_text('{"state": 1')
    assert convert(folder, options).clips == 6


def test_a_plan_counts_the_bytes_of_each_clip(folder, tmp_path):
    source = sources.open_source(folder)
    made = tfds_plan.plan(source, tfds_writer.check(source), Options(tmp_path))
    assert sum(map(made.nbytes, made.clips)) == source.nbytes
    assert [len(names) for names in made.shards] == [6]

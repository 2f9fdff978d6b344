"""Folders and archives as sources of clips."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import published_folder
import pytest

from idlora_jax.data import archives, report, sources
from idlora_jax.data.stored import AUDIO, REFERENCE, TEXT, VIDEO


def joined(source: Any) -> dict[str, Any]:
    """Every complete clip of a source."""
    found = report.report(report.look(item) for item in source.scan(lambda done: None))
    places = {
        (f.folder, f.name): sources.Place(f.nbytes, f.archive) for f in found.facts
    }
    ordered = source.ordered(found.usable, found.names, places)
    return dict(source.joined(ordered, found.names, places))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return published_folder.write(tmp_path / "in", 6)


def test_clips_are_joined_from_all_folders(folder):
    clips = joined(sources.open_source(folder))
    assert sorted(clips) == list(clips) and len(clips) == 6
    assert set(clips["speaker0/clip2"]) == {VIDEO, AUDIO, REFERENCE, TEXT}
    expected = published_folder.files(2)[VIDEO]["latents"]
    found = clips["speaker0/clip2"][VIDEO]["latents"]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("window", [1, 30_000, 1 << 29])
def test_archives_in_any_order_give_the_same_clips_as_their_folder(
    folder, tmp_path, window
):
    expected = joined(sources.open_source(folder))
    path = published_folder.archives(tmp_path / "packed" / "precomputed", folder)
    found = joined(sources.open_source(path.parent, window=window))
    assert set(found) == set(expected)
    jax.tree.map(np.testing.assert_array_equal, found, {c: expected[c] for c in found})


def test_one_archive_may_hold_all_folders(folder, tmp_path):
    members = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.pt"))
    path = published_folder.tar(tmp_path / "all.tar", folder, members)
    assert set(joined(sources.open_source(path))) == set(
        joined(sources.open_source(folder))
    )


def test_an_archive_named_after_its_folder_may_hold_bare_names(folder, tmp_path):
    for part in folder.iterdir():
        names = sorted(p.relative_to(part).as_posix() for p in part.rglob("*.pt"))
        published_folder.tar(tmp_path / "out" / f"{part.name}.tar.zst", part, names)
    assert len(joined(sources.open_source(tmp_path / "out"))) == 6


def test_archives_of_one_order_are_each_read_twice_in_all(
    folder, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    for part in folder.iterdir():
        names = sorted(p.relative_to(folder).as_posix() for p in part.rglob("*.pt"))
        published_folder.tar(out / f"{part.name}.tar", folder, names)
    opened: list[str] = []
    members = archives.members

    def counting(path: pathlib.Path, *rest: Any) -> Any:
        opened.append(path.name)
        return members(path, *rest)

    monkeypatch.setattr(archives, "members", counting)
    joined(sources.open_source(out, window=30_000))
    assert len(opened) == 4 + 4  # once to look, once to read


def test_groups_stay_below_their_limit_or_hold_one():
    size = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 1}
    groups = sources.grouped(list(size), size.__getitem__, 6)
    assert list(groups) == [["a", "b"], ["c"], ["d", "e"]]


def test_a_folder_without_anything_says_what_belongs_there(tmp_path):
    with pytest.raises(ValueError, match=r"no folder latents/ .* and no \.tar"):
        sources.open_source(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        sources.open_source(tmp_path / "none")


def test_a_damaged_archive_is_a_broken_file_of_the_report(folder, tmp_path):
    members = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.pt"))
    videos = [m for m in members if m.startswith("latents")]
    others = [m for m in members if m not in videos]
    path = tmp_path / "packed"
    published_folder.tar(path / "others.tar.zst", folder, others)
    video = published_folder.tar(path / "latents.tar", folder, videos)
    video.write_bytes(video.read_bytes()[:20_000])
    source = sources.open_source(path)
    found = report.report(report.look(item) for item in source.scan(lambda done: None))
    *_, problem = found.problems
    assert problem.name == "latents.tar" and "truncated" in problem.problem
    assert found.broken and 0 < len(found.usable) < 6

"""The report of a data set: what it counts, what it calls broken."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pt_files
import published_folder
import pytest

from idlora_jax.data import report, sources, speakers
from idlora_jax.data.report import Report
from idlora_jax.data.stored import AUDIO, REFERENCE, TEXT, VIDEO


def of(folder: pathlib.Path, known: Any = None) -> Report:
    source = sources.open_source(folder)
    return report.report(
        (report.look(i) for i in source.scan(lambda done: None)), known
    )


def test_a_sound_folder_is_described_in_numbers(tmp_path):
    found = of(published_folder.write(tmp_path, 4))
    assert not found.broken and len(found.usable) == 4
    text = str(found)
    for line in (
        "pairs: 4 (complete and readable)",
        "speakers: 2",
        "latents: 4 files",
        "4 different videos",
        "latents [F H W C]: [3, 2, 2, 128] (4)",
        "frames per second: 25 (4)",
        "seconds: 0.68 s",
        "latents [T M C]: [9, 16, 8] (4)",
        "seconds: 0.36 s",
        "features: one feature for both (2.0) (4)",
        "[S D Da]: [4, 20, 20] (4)",
        "tokens: 3",
        "nothing is broken",
    ):
        assert line in text, line


def test_one_video_in_two_pairs_is_told_but_no_fault(tmp_path):
    for name in ("a", "b"):
        published_folder.write_clip(tmp_path, name, published_folder.files(0))
    found = of(tmp_path)
    assert not found.broken
    assert "1 different videos" in str(found)
    assert "speakers: not known" in str(found)


def test_sizes_and_rates_are_counted_where_they_differ(tmp_path):
    published_folder.write_clip(tmp_path, "a", published_folder.files(0))
    other = published_folder.files(1, size=(2, 2, 2), fps=24.0, shared=False)
    published_folder.write_clip(tmp_path, "b", other)
    text = str(of(tmp_path))
    assert "[3, 2, 2, 128] (1), [2, 2, 2, 128] (1)" in text
    assert "frames per second: 25 (1), 24 (1)" in text
    assert "seconds: 0.375 to 0.68 s, median 0.5275" in text
    assert "two (2.3) (1)" in text


def broken(change: Any) -> dict[str, Any]:
    contents = published_folder.files(0)
    change(contents)
    return contents


def fill(folder: str, key: str, value: Any) -> Any:
    def change(contents: dict[str, Any]) -> None:
        contents[folder][key][...] = value

    return change


CLEAN = published_folder.CLEAN
BROKEN = {
    "nan": (fill(VIDEO, "latents", np.nan), VIDEO, "not finite"),
    "inf": (fill(TEXT, "prompt_embeds", np.inf), TEXT, "not finite"),
    "no tokens": (fill(TEXT, "prompt_attention_mask", 0), TEXT, "without tokens"),
    "padding on the right": (
        lambda c: c[TEXT].update(prompt_attention_mask=np.array([1, 1, 0, 0])),
        TEXT,
        "padding on the right",
    ),
    "no rate": (lambda c: c[VIDEO].pop("fps"), VIDEO, "got fps None"),
    "flat sound": (
        lambda c: c[CLEAN].update(latents=np.zeros((5, 128))),
        REFERENCE,
        r"shape (5, 128)",
    ),
    "code": (
        lambda c: c[AUDIO].update(x=pt_files.Raw(b"cos\nsystem\n")),
        AUDIO,
        "the global 'os system'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_listed_with_their_reason(tmp_path, case):
    change, folder, said = BROKEN[case]
    published_folder.write_clip(tmp_path, "good", published_folder.files(1))
    published_folder.write_clip(tmp_path, "bad", broken(change))
    found = of(tmp_path)
    assert found.broken and found.usable == ("good",)
    ((fact),) = found.problems
    assert (fact.folder, fact.name) == (folder, "bad")
    assert said in fact.problem and "\n" not in fact.problem
    assert "unreadable or broken files: 1" in str(found)


def test_missing_partners_are_listed_by_folder(tmp_path):
    published_folder.write(tmp_path, 3)
    (tmp_path / CLEAN / "speaker0/clip0.pt").unlink()
    (tmp_path / TEXT / "speaker0/clip0.pt").unlink()
    (tmp_path / VIDEO / "speaker1/clip1.pt").unlink()
    found = of(tmp_path)
    assert found.missing == (
        ("speaker0/clip0", (TEXT, REFERENCE)),
        ("speaker1/clip1", (VIDEO,)),
    )
    assert found.usable == ("speaker0/clip2",)
    assert "clips without a partner: 2" in str(found)
    assert f"speaker0/clip0: missing in {TEXT}, {REFERENCE}" in str(found)


def test_long_lists_are_cut(tmp_path):
    published_folder.write_clip(tmp_path, "good", published_folder.files(0))
    video = published_folder.files(0)[VIDEO]
    for n in range(23):
        published_folder.write_clip(tmp_path, f"clip{n:02}", {VIDEO: video})
    assert "clips without a partner: 23" in str(of(tmp_path))
    assert "... and 3 more" in str(of(tmp_path))


def test_a_file_twice_in_archives_is_told(tmp_path):
    root = published_folder.write(tmp_path / "in", 2)
    members = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.pt"))
    published_folder.tar(tmp_path / "x.tar", root, [*members, members[0]])
    found = of(tmp_path / "x.tar")
    assert found.broken
    assert found.repeated == ((AUDIO, "speaker0/clip0"),)
    assert "more than once: 1" in str(found)


def test_a_folder_without_videos_or_texts_is_broken(tmp_path):
    published_folder.write_clip(
        tmp_path, "a", {AUDIO: published_folder.files(0)[AUDIO]}
    )
    assert of(tmp_path).broken and not of(tmp_path).usable


def test_references_may_be_absent_altogether(tmp_path):
    contents = published_folder.files(0)
    del contents[CLEAN]
    published_folder.write_clip(tmp_path, "a", contents)
    found = of(tmp_path)
    assert not found.broken
    assert f"{REFERENCE}: 0 files" in str(found)


def test_speakers_come_from_a_list_where_there_is_one(tmp_path):
    published_folder.write(tmp_path / "in", 2)
    for name in ("flat1", "flat2"):
        published_folder.write_clip(tmp_path / "in", name, published_folder.files(3))
    path = tmp_path / "metadata.jsonl"
    path.write_text(
        '{"file_name": "train/flat1.mp4", "speaker_id": 7}\n\n'
        '{"video": "speaker0/clip0.mp4", "speaker": "anna"}\n{"other": 1}\n'
    )
    found = of(tmp_path / "in", speakers.read(path))
    assert found.speakers == {
        "flat1": "7", "speaker0/clip0": "anna", "speaker1/clip1": "speaker1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "no JSON"), ("{}", "1 lines without a clip"), ("", "0 lin")],
)
def test_a_list_without_speakers_is_refused(tmp_path, text, said):
    path = tmp_path / "metadata.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        speakers.read(path)

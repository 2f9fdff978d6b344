import json

import pytest

from idlora_jax.data import manifest


def write(folder, *rows, name="metadata.jsonl"):
    path = folder / name
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def row(video, speaker="anna", caption="a caption", **more):
    return {"video": video, "caption": caption, "speaker": speaker, **more}


def make(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def test_a_clip_is_named_by_its_path_without_suffix(tmp_path):
    path = write(tmp_path, row("a/1.mp4"), "", row("a/2.v2.mkv", caption=" "))
    first, second = manifest.read(path)
    assert (first.name, second.name) == ("a/1", "a/2.v2")
    assert first.video == tmp_path / "a" / "1.mp4"
    assert (first.caption, first.speaker) == ("a caption", "anna")
    assert (first.start_s, first.end_s, first.reference) == (0, None, None)
    assert second.caption == ""


def test_a_file_may_hold_several_clips_and_name_its_reference(tmp_path):
    rows = [row("1.mp4", end=4, reference="clean/1.wav"), row("1.mp4", start=4.5)]
    rows += [row("1.mp4", start="10", end="12.5")]
    clips = manifest.read(write(tmp_path, *rows))
    assert [clip.name for clip in clips] == ["1", "1.4.5s", "1.10s"]
    spans = [(clip.start_s, clip.end_s) for clip in clips]
    assert spans == [(0, 4), (4.5, None), (10, 12.5)]
    assert clips[0].reference == tmp_path / "clean/1.wav"


def test_all_forms_and_the_columns_of_public_hubs_give_the_same_clips(tmp_path):
    rows = [row("1.mp4", speaker="7", start=2.0), row("2.mp4", speaker="8")]
    wanted = manifest.read(write(tmp_path, *rows))
    table = write(tmp_path, json.dumps(rows), name="b.json")
    assert manifest.read(table) == wanted
    names = "media_path,text,speaker_id,start_s,end"
    lines = ["1.mp4,a caption,7,2,", "2.mp4,a caption,8,,"]
    assert manifest.read(write(tmp_path, names, *lines, name="c.csv")) == wanted
    other = {"file_name": "2.mp4", "caption": "a caption", "identity": 8}
    assert manifest.read(write(tmp_path, other, name="d.jsonl")) == wanted[1:]


def test_in_a_folder_the_first_subfolder_speaks_and_texts_lie_beside(tmp_path):
    make(tmp_path, "anna/1.mp4", "anna/x/2.MOV", "bob/1.webm", "bob/.3.mp4", "a.wav")
    make(tmp_path, ".cache/anna/4.mp4")
    (tmp_path / "anna/1.txt").write_text(" she talks\n")
    clips = {clip.name: clip for clip in manifest.read(tmp_path)}
    speakers = {name: clip.speaker for name, clip in clips.items()}
    assert speakers == {"anna/1": "anna", "anna/x/2": "anna", "bob/1": "bob"}
    captions = {name: clip.caption for name, clip in clips.items()}
    assert captions == {"anna/1": "she talks", "anna/x/2": "", "bob/1": ""}


def test_a_speakers_folder_may_be_a_link(tmp_path):
    make(tmp_path, "elsewhere/1.mp4", "clips/bob/1.mp4")
    (tmp_path / "clips" / "anna").symlink_to(tmp_path / "elsewhere")
    found = manifest.read(tmp_path / "clips")
    assert [(clip.name, clip.speaker) for clip in found] == [
        ("anna/1", "anna"),
        ("bob/1", "bob"),
    ]


def test_a_table_in_the_folder_comes_before_what_the_place_says(tmp_path):
    make(tmp_path, "anna/1.mp4", "anna/2.mp4", "3.mp4", "clean.mp4")
    (tmp_path / "anna/1.txt").write_text("from the text")
    (tmp_path / "anna/2.txt").write_text("from the text")
    rows = [{"video": "anna/1.mp4", "caption": "from the table"}]
    rows += [{"video": "3.mp4", "speaker": "eve", "reference": "clean.mp4"}]
    write(tmp_path, *rows)
    found = {c.name: (c.speaker, c.caption) for c in manifest.read(tmp_path)}
    assert found == {
        "anna/1": ("anna", "from the table"),
        "anna/2": ("anna", "from the text"),
        "3": ("eve", ""),
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got no clip"),
        ([row("1.mp4"), {"video": "2.mp4"}], "line 2: .*caption, speaker is missing"),
        ([{"path": "1.mp4"}], "line 1: got the columns path, expected video, capt"),
        ([row("1.mp4"), row("2.mp4", speaker=" ")], "line 2: got an empty speaker"),
        ([row("1.mp4"), row(None)], "line 2: got an empty video"),
        ([row("1.mp4", caption=3)], "line 1: got caption 3, expected a text"),
        ([row("1.mp4", start="one")], "line 1: got start 'one', expected seconds"),
        ([row("1.mp4", end=-1)], "line 1: got end -1, expected seconds"),
        ([row("1.mp4", start=2, end=2)], "line 1: .*expected an end after the start"),
        ([row("../1.mp4"), row("2.mp4")], "line 1: .*below it"),
        ([row("/tmp/1.mp4"), row("2.mp4")], "line 1: .*below it"),
        ([row("1.mp4", reference="/v.wav")], "line 1: reference .*below it"),
        ([row("1.mp4", reference="1.mp4")], "line 1: the reference is the clip itself"),
        ([row("1.mp4"), row("1.mov")], "more than one clip is named 1 "),
    ],
)
def test_wrong_tables_are_refused_with_their_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        manifest.read(write(tmp_path, *rows))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["anna/1.txt"], "got no video file"),
        (["1.mp4", "anna/1.mp4"], "no speaker's folder, expected .*<speaker>/1.mp4"),
        (["a/1.mp4", "metadata.csv", "metadata.json"], "one table of the clips"),
        (["a/1.mp4", "a/1.mkv"], "more than one clip is named a/1 "),
    ],
)
def test_wrong_folders_are_refused(tmp_path, paths, message):
    make(tmp_path, *paths)
    with pytest.raises(ValueError, match=message):
        manifest.read(tmp_path)


def test_a_text_that_is_no_utf8_is_refused_with_its_name(tmp_path):
    make(tmp_path, "a/1.mp4")
    (tmp_path / "a/1.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"1\.txt: got bytes that are no UTF-8"):
        manifest.read(tmp_path)


def test_a_missing_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        manifest.read(tmp_path / "none.jsonl")

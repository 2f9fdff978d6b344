import json

import pytest

from idlora_jax.data import manifest


def write(folder, *rows):
    path = folder / "metadata.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def row(video, speaker="anna", caption="a caption"):
    return {"video": video, "caption": caption, "speaker": speaker}


def test_a_clip_is_named_by_its_path_without_suffix(tmp_path):
    path = write(tmp_path, row("a/1.mp4"), "", row("a/2.v2.mkv"))
    first, second = manifest.read(path)
    assert (first.name, second.name) == ("a/1", "a/2.v2")
    assert first.video == tmp_path / "a" / "1.mp4"
    assert (first.caption, first.speaker) == ("a caption", "anna")


def test_the_reference_is_the_next_clip_of_the_speaker_and_wraps_around(tmp_path):
    rows = [row(f"{n}.mp4", speaker) for n, speaker in enumerate("ababa")]
    groups = manifest.by_speaker(manifest.read(write(tmp_path, *rows)))
    usable = set("01234")
    chosen = {
        clip.name: manifest.reference(clip, group, usable).name
        for group in groups.values()
        for clip in group
    }
    assert chosen == {"0": "2", "2": "4", "4": "0", "1": "3", "3": "1"}


def test_a_clip_without_usable_sound_is_no_reference(tmp_path):
    rows = [row(f"{n}.mp4") for n in range(3)]
    group = manifest.read(write(tmp_path, *rows))
    assert manifest.reference(group[0], group, {"0", "2"}).name == "2"
    assert manifest.reference(group[0], group, {"0"}) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "got no line"),
        (["{not json"], "line 1: not JSON"),
        ([row("1.mp4"), {"video": "2.mp4"}], "line 2: .*video, caption, speaker"),
        ([row("1.mp4"), row("2.mp4", caption=" ")], "line 2: .*none of them empty"),
        ([row("1.mp4"), ["2.mp4"]], "line 2: "),
        ([row("../1.mp4"), row("2.mp4")], "line 1: .*below it"),
        ([row("/tmp/1.mp4"), row("2.mp4")], "line 1: .*below it"),
        ([row("1.mp4"), row("1.mov")], "more than one clip is named 1 "),
        (
            [row("1.mp4", "zoe"), row("2.mp4"), row("3.mp4"), row("4.mp4", "bob")],
            "single clip of bob, zoe",
        ),
    ],
)
def test_wrong_manifests_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        manifest.read(write(tmp_path, *rows))


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        manifest.read(tmp_path / "none.jsonl")

"""Prompts files and input folders: one configuration per sample."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from idlora_jax import batches
from idlora_jax.sample_config import SampleConfig

BASE = {"base": pathlib.Path("base"), "text_encoder": pathlib.Path("gemma")}
ENTRY = {"prompt": "a person", "output_name": "one"}


def config(**changes: Any) -> SampleConfig:
    given: dict[str, Any] = {"prompt": "shared", "seed": 7, **BASE}
    return SampleConfig(**(given | changes))


def written(folder: pathlib.Path, content: Any, name: str = "p.json") -> pathlib.Path:
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: pathlib.Path, content: Any, **changes: Any) -> Any:
    path = written(folder, content)
    return batches.read(config(prompts_file=path, **changes), warn=pytest.fail)


def touched(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")


def test_a_configuration_alone_is_one_sample():
    (only,) = batches.read(config())
    assert only == config()


FORMS = {
    "a list": [ENTRY, {"prompt": "b"}],
    "variations": {"variations": [ENTRY, {"prompt": "b"}]},
    "samples": {"samples": [ENTRY, {"prompt": "b"}], "about": "other keys"},
    "lines": f"{json.dumps(ENTRY)}\n\n{json.dumps({'prompt': 'b'})}\n",
    "a byte order mark": "\ufeff" + json.dumps([ENTRY, {"prompt": "b"}]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_prompts_file_gives_the_same_samples(form, tmp_path):
    one, two = read(tmp_path, FORMS[form])
    assert (one.name, one.prompt, one.seed) == ("one", "a person", 7)
    assert (two.name, two.prompt, two.seed) == ("output_0001", "b", 8)
    assert one.prompts_file is None


def test_a_single_entry_and_a_single_line_are_one_sample(tmp_path):
    (only,) = read(tmp_path, ENTRY)
    path = written(tmp_path, ENTRY, "p.jsonl")
    assert batches.read(config(prompts_file=path)) == (only,)


def test_an_entry_sets_what_it_says_and_takes_the_rest_from_the_configuration(tmp_path):
    shared = (pathlib.Path("shared.wav"),)
    full = {
        "reference_path": ["a.wav", "b.wav"],
        "first_frame_path": "face.png",
        "seed": 3,
        "negative_prompt": "blur",
        "num_frames": 9,
        "height": 64,
        "width": 32,
        "fps": 24,
    }
    empty = {"reference_path": None, "first_frame_path": "", "prompt": ""}
    one, two = read(tmp_path, [full, empty], reference_audio=shared)
    assert one.reference_audio == (pathlib.Path("a.wav"), pathlib.Path("b.wav"))
    assert one.first_frame == pathlib.Path("face.png")
    assert (one.prompt, one.negative_prompt, one.seed) == ("shared", "blur", 3)
    assert (one.frames, one.height, one.width, one.fps) == (9, 64, 32, 24)
    assert (two.reference_audio, two.first_frame, two.prompt, two.seed) == (
        shared,
        None,
        "shared",
        8,
    )


def test_relative_paths_are_looked_for_beside_the_prompts_file_first(
    tmp_path, monkeypatch
):
    touched(tmp_path, "near/a.wav", "far/a.wav", "far/b.wav")
    monkeypatch.chdir(tmp_path / "far")
    entries = [
        {"reference_path": name, "prompt": "@t.txt"} for name in ("a.wav", "b.wav")
    ]
    touched(tmp_path, "near/t.txt")
    one, two = read(tmp_path / "near", entries)
    assert one.reference_audio == (tmp_path / "near/a.wav",)
    assert two.reference_audio == (pathlib.Path("b.wav"),)
    assert one.prompt == "text of near/t.txt"


def test_a_sample_may_go_on_from_one_before_it(tmp_path):
    entries = [
        {"output_name": "a"},
        {"output_name": "b", "continue_from": "a"},
        {"output_name": "c", "continue_from": "old.mp4"},
    ]
    face = pathlib.Path("face.png")
    a, b, c = read(tmp_path, entries, first_frame=face, frames=121)
    assert (a.first_frame, b.first_frame) == (face, None)
    assert b.continue_from == b.output_dir / "a.mp4"
    assert c.continue_from == pathlib.Path("old.mp4")


def test_unknown_keys_are_warned_of_once_with_the_nearest_known_one(tmp_path):
    path = written(tmp_path, [{"promt": "x"}, {"promt": "y", "speaker": 3}])
    lines: list[str] = []
    made = batches.read(config(prompts_file=path), warn=lines.append)
    assert [c.prompt for c in made] == ["shared", "shared"]
    assert len(lines) == 2 and "'promt'; the nearest known one is 'prompt'" in lines[0]


WRONG = {
    "no JSON": ("{", r"p.json: got .*expected a prompts file .JSON or JSONL."),
    "a bad line": ('{"prompt": "a"}\n{"pro', r"line 2 that is no JSON"),
    "a number": ("3", r"got int where a list of entries stands"),
    "no list": ({"samples": 3}, r"got int where a list of entries stands"),
    "deep": ("[" * 100_000, r"p.json: got .*expected a prompts file"),
    "nothing": ([], r"got no entries"),
    "a text": (["a person"], r"p.json: entry 0: got str, expected an object"),
    "a list as prompt": ([ENTRY, {"prompt": ["a"]}], r"entry 1: prompt: got \['a'\]"),
    "a long prompt": ([{"prompt": "a" * 70_000}], r"more than 64 KiB"),
    "half a character": ([{"prompt": "\ud800"}], r"entry 0: .*surrogates"),
    "a path upwards": ([{"output_name": "../a"}], r"entry 0: output_name: got '../a'"),
    "an absolute path": ([{"output_name": "/tmp/a"}], r"a plain file name"),
    "a hidden file": ([{"output_name": ".."}], r"a plain file name"),
    "a line break": ([{"output_name": "a\nb"}], r"a plain file name"),
    "a long name": ([{"output_name": "a" * 300}], r"a plain file name"),
    "no length": ([{"frames": 120}], r"entry 0: frames: got 120.*use 121"),
    "a text as length": ([{"frames": "9"}], r"frames: got '9', expected int"),
    "true as seed": ([{"seed": True}], r"seed: got True, expected int"),
    "a negative seed": ([{"seed": -1}], r"seed: got -1, expected 0 to 4294967295"),
    "a huge number": ('[{"fps": 1' + "0" * 999 + "}]", r"fps: got 10.*, expected int"),
    "not a number": ('[{"fps": NaN}]', r"fps: got nan"),
    "one side": ([{"height": 64}], r"height and width together"),
    "two lengths": ([{"frames": 9, "num_frames": 9}], r"another name of it"),
    "a name twice": (
        [ENTRY, {}, ENTRY],
        r"entries 0 and 2 both have output_name 'one'",
    ),
    "no such text": ([{"prompt": "@none.txt"}], r"entry 0: prompt: none.txt: got no"),
    "too long a path": ([{"reference_path": "a" * 5000}], r"entry 0: .*too long"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_prompts_file_is_refused_in_one_line(name, tmp_path):
    content, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, content)
    assert str(caught.value).count("\n") == 0


def test_a_missing_or_huge_prompts_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"none.json: got no such file"):
        batches.read(config(prompts_file=tmp_path / "none.json"))
    monkeypatch.setattr(batches, "LONGEST_FILE", 9)
    with pytest.raises(ValueError, match="split it"):
        read(tmp_path, [ENTRY])


def test_an_output_never_replaces_an_input(tmp_path):
    touched(tmp_path, "one.wav")
    entry = {"output_name": "one", "reference_path": "one.wav"}
    with pytest.raises(ValueError, match=r"one.wav would replace an input"):
        read(tmp_path, [entry], output_dir=tmp_path)
    own = {"output_name": "one", "continue_from": str(tmp_path / "one.mp4")}
    with pytest.raises(ValueError, match=r"one.mp4 would replace an input"):
        read(tmp_path, [own], output_dir=tmp_path)


def test_a_prompt_may_stand_in_a_file(tmp_path):
    path = written(tmp_path, "\ufeff[SPEECH]: Grüße \n", "p.txt")
    made = batches.read(config(prompt=f"@{path}", negative_prompt=f"@{path}"))
    assert made[0].prompt == made[0].negative_prompt == "[SPEECH]: Grüße"
    path.write_bytes(b"a" * 65537)
    with pytest.raises(ValueError, match=r"prompt: .*p.txt: got a larger file"):
        batches.read(config(prompt=f"@{path}"))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"save it as UTF-8"):
        batches.read(config(prompt=f"@{path}"))


def test_a_folder_has_a_sample_in_each_subfolder_and_for_each_stem(tmp_path):
    touched(
        tmp_path,
        *("b/prompt.txt", "b/negative_prompt.txt", "b/first_frame.PNG", "b/notes.md"),
        *("b/reference_2.wav", "b/reference_1.flac", "b/reference.txt"),
        *("a.txt", "a.jpg", "a.m4a", "a.json", ".hidden/prompt.txt", "out/prompt.txt"),
        "c.mp4",
    )
    output = tmp_path / "out"
    a, b, c = batches.read(config(input_dir=tmp_path, output_dir=output))
    assert [x.name for x in (a, b, c)] == ["a", "b", "c"]
    assert [x.seed for x in (a, b, c)] == [7, 8, 9]
    assert (a.prompt, b.prompt, c.prompt) == (
        "text of a.txt",
        "text of b/prompt.txt",
        "shared",
    )
    assert (a.first_frame, a.reference_audio) == (
        tmp_path / "a.jpg",
        (tmp_path / "a.m4a",),
    )
    assert b.first_frame == tmp_path / "b/first_frame.PNG"
    names = [path.name for path in b.reference_audio]
    assert names == ["reference_1.flac", "reference_2.wav"]
    assert b.negative_prompt == "text of b/negative_prompt.txt"
    assert c.first_frame == tmp_path / "c.mp4"


FOLDERS = {
    "nothing": ((), r"got neither, expected subfolders with prompt.txt"),
    "two pictures": (("a.png", "a.jpg"), r"got a.jpg, a.png, expected one"),
    "two first frames": (("a/first_frame.png", "a/first_frame.jpg"), r"expected one"),
    "folder and files": (("a/prompt.txt", "a.wav"), r"a folder 'a' and files a\.\*"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_may_mean_two_things_is_refused(name, tmp_path):
    files, message = FOLDERS[name]
    touched(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        batches.read(config(input_dir=tmp_path))


def test_a_folder_that_is_none_is_refused(tmp_path):
    for path, got in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "f", "a file"),
    ):
        touched(tmp_path, "f")
        with pytest.raises(ValueError, match=got):
            batches.read(config(input_dir=path))


def test_outputs_in_the_input_folder_must_not_replace_inputs(tmp_path):
    touched(tmp_path, "a.txt", "a.wav")
    with pytest.raises(ValueError, match=r"a.wav would replace an input"):
        batches.read(config(input_dir=tmp_path, output_dir=tmp_path))


def test_reading_samples_does_not_import_jax():
    code = "import sys, idlora_jax.batches; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

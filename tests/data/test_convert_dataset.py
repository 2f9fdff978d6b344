"""The script convert/dataset.py: what it prints, writes and returns."""

from __future__ import annotations

import importlib.util
import pathlib

import pt_files
import published_folder
import pytest

from idlora_jax.data import latents, tfds_latents
from idlora_jax.data.stored import VIDEO


@pytest.fixture(scope="module")
def run():
    path = pathlib.Path(__file__).parents[2] / "convert" / "dataset.py"
    spec = importlib.util.spec_from_file_location("script_dataset", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *argv: module.main([str(arg) for arg in argv])


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return published_folder.write(tmp_path / "in", 4)


def test_the_script_converts_once(run, folder, tmp_path, capsys):
    options = ("--name", "idlora_talkvid", "--dtype", "bf16")
    assert run(folder, tmp_path / "tfds", *options) == 0
    root = tmp_path / "tfds" / "idlora_talkvid" / "1.0.0"
    assert f"{root}: 4 clips, 1 shards written now" in capsys.readouterr().out
    assert run(folder, tmp_path / "tfds", *options) == 0
    assert "finished already, 4 clips; nothing to do" in capsys.readouterr().out
    assert len(latents.index(root).clips) == 4
    assert tfds_latents.open_dataset(root)[0].audio.dtype == "bfloat16"


def test_the_script_reads_archives_and_speakers(run, folder, tmp_path):
    packed = published_folder.archives(tmp_path / "packed", folder)
    known = tmp_path / "metadata.jsonl"
    known.write_text('{"video": "speaker0/clip0.mp4", "speaker": "anna"}\n')
    assert run(packed, tmp_path / "tfds", "--speakers", known) == 0
    records = tfds_latents.open_dataset(tmp_path / "tfds").records
    spoken = {r["name"].decode(): r["speaker"].decode() for r in records}
    assert spoken["speaker0/clip0"] == "anna"
    assert spoken["speaker1/clip1"] == "speaker1"


def test_the_script_checks_and_says_what_is_broken(run, folder, tmp_path, capsys):
    assert run("--check", folder) == 0
    assert "nothing is broken" in capsys.readouterr().out
    path = folder / VIDEO / "speaker0/clip0.pt"
    pt_files.save(path, {"latents": pt_files.Raw(b"cos\nsystem\n")})
    assert run("--check", folder) == 1
    out = capsys.readouterr().out
    assert "unreadable or broken files: 1" in out and "'os system'" in out
    assert run(folder, tmp_path / "tfds") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: data: ") and "--skip-broken" in error
    assert run(folder, tmp_path / "tfds", "--skip-broken") == 0
    assert len(tfds_latents.open_dataset(tmp_path / "tfds")) == 3


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["x"],
        ["--check", "x", "y"],
        ["--check", "x", "--dtype", "f32"],
        ["x", "y", "--dtype", "f8"],
        ["x", "y", "--name", "Not A Name"],
    ],
)
def test_wrong_usage_is_status_2(run, options, capsys):
    with pytest.raises(SystemExit) as end:
        run(*options)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("none", [], "no such folder"),
        ("in", ["--speakers", "none.jsonl"], "no such file"),
    ],
)
def test_failures_are_status_1_and_one_message(
    run, folder, tmp_path, capsys, source, options, said
):
    assert run(tmp_path / source, tmp_path / "tfds", *options) == 1
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and "Traceback" not in error

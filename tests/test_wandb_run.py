"""Weights & Biases, offline: a run's folder, its id, and what is told without it."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import toy_training as toy

from idlora_jax import media, records, wandb_run
from idlora_jax.experiment import TrainConfig
from idlora_jax.monitoring import Wandb
from idlora_jax.records import Sampled

SPEC = importlib.util.find_spec


def config_in(folder: pathlib.Path, **options: Any) -> TrainConfig:
    settings = {"tensorboard": False, "wandb": Wandb("voices", **options)}
    return dataclasses.replace(toy.run_in(folder).config, **settings)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent, nothing is looked up."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def clip_in(folder: pathlib.Path) -> Sampled:
    folder.mkdir()
    files = {kind: folder / f"anna.{kind}" for kind in ("png", "wav", "mp4")}
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    wave = np.zeros((2, 8640), np.float32)
    media.write_png(files["png"], frames[0])
    media.write_wav(files["wav"], wave, 24000)
    media.write_video(files["mp4"], frames, wave, 24000)
    return Sampled("samples/anna", files)


def test_numbers_and_clips_are_kept_offline_and_a_resumed_run_has_the_same_id(
    offline: None, tmp_path: pathlib.Path
):
    config, clip = config_in(tmp_path, video=True), clip_in(tmp_path / "made")
    for first in (0, 3):
        with records.opened(config, tmp_path / "log.jsonl", first) as out:
            out.write(first + 1, {"heldout/audio_loss": 0.5})
            out.show(first + 1, clip)
    kept = json.loads((tmp_path / wandb_run.NAME).read_text())["id"]
    # Two starts within a second share a folder's name up to the id.
    folders = [*(tmp_path / "wandb").glob(f"offline-run-*-{kept}")]
    assert folders
    said = b"".join(p.read_bytes() for f in folders for p in f.glob("*.wandb"))
    assert b"heldout/audio_loss" in said and b"voices" in said
    assert b"optimizer.learning_rate" in said
    for part, kind in (("sheet", "png"), ("sound", "wav"), ("video", "mp4")):
        assert f"samples/anna/{part}".encode() in said
        (found, *_) = [q for f in folders for q in f.rglob(f"{part}_*.{kind}")]
        assert found.read_bytes() == clip.files[kind].read_bytes()


def test_videos_stay_on_disk_unless_they_are_wanted(
    offline: None, tmp_path: pathlib.Path
):
    config, clip = config_in(tmp_path), clip_in(tmp_path / "made")
    with records.opened(config, tmp_path / "log.jsonl", 0) as out:
        out.show(1, clip)
    assert [*(tmp_path / "wandb").rglob("*.png")]
    assert not [*(tmp_path / "wandb").rglob("*.mp4")]


def test_a_run_that_cannot_be_begun_says_what_to_do(
    offline: None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    import wandb

    def refuse(**options: Any) -> Any:
        raise wandb.errors.UsageError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with (
        pytest.raises(ValueError, match=r"\(no API key\); log in .* WANDB_MODE"),
        records.opened(config_in(tmp_path), tmp_path / "log.jsonl", 0),
    ):
        pass


def test_a_damaged_id_is_told(offline: None, tmp_path: pathlib.Path):
    (tmp_path / wandb_run.NAME).write_text("[]")
    with (
        pytest.raises(ValueError, match="a file without a run's id"),
        records.opened(config_in(tmp_path), tmp_path / "log.jsonl", 0),
    ):
        pass


@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_package_is_told_with_what_installs_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, folder: bool
):
    # A folder of runs in the working directory looks like a package without a file.
    found = importlib.machinery.ModuleSpec("wandb", None) if folder else None
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda n, *a: found if n == "wandb" else SPEC(n, *a),
    )
    with pytest.raises(ValueError, match=r"pip install idlora_jax\[wandb\]"):
        wandb_run.check(config_in(tmp_path))
    wandb_run.check(toy.run_in(tmp_path).config)


def test_the_package_is_not_imported_unless_it_is_used(tmp_path: pathlib.Path):
    code = "import sys; from idlora_jax import records; print('wandb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, check=True
    )
    assert done.stdout.split()[-1] == "False"

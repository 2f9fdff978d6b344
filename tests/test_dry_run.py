"""`--dry-run`: what it says, with and without files, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import latent_folder
import pytest
import sparse_files

from idlora_jax import commandline, dry_run, experiment
from idlora_jax.assumed import Assume
from idlora_jax.experiment import HeldOut, Lora, Optimizer, TrainConfig
from idlora_jax.presets import tiny_train
from idlora_jax.sample_config import SampleConfig
from idlora_jax.weights import io

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
LIMIT_S = 120.0
"""Of a dry run at full size, on two cores."""


def config_of(path: pathlib.Path) -> Any:
    kind = SampleConfig if "sample" in path.name else TrainConfig
    return commandline.load_config(path, kind)


FULL_SIZE = [p for p in CONFIGS if "sample" not in p.name and p.stem != "tiny"]


def said(config: TrainConfig) -> str:
    return "\n".join(dry_run.reports(config))


@functools.cache
def timed(name: str) -> tuple[str, float]:
    """What a dry run of a configuration says, and in how many seconds."""
    config, start = config_of(ROOT / "configs" / f"{name}.py"), time.monotonic()
    return said(config), time.monotonic() - start


def number(text: str, name: str) -> float:
    """The first number of a row."""
    found = re.search(rf"^ *{name} +([\d.]+)", text, re.MULTILINE)
    assert found is not None, f"no row {name!r} in {text}"
    return float(found[1])


@pytest.fixture
def tiny_run(tiny_model: Any, tmp_path: pathlib.Path) -> TrainConfig:
    text = {"text": (128, 48)}
    clips = latent_folder.write(tmp_path / "clips", 6, audio=9, reference=5, **text)
    return dataclasses.replace(
        tiny_train(),
        base=tiny_model[0],
        data=clips,
        output=tmp_path / "out",
        lora=Lora(rank=4, targets=("blocks/audio/self_attn/q",)),
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_says_what_it_is_for(path):
    found, about = config_of(path), path.read_text().split('"""')[1]
    assert "Origin:" in about and "Hardware:" in about
    assert f"--config configs/{path.name}" in about
    assert found == config_of(path)


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda p: p.stem)
def test_a_full_size_run_is_looked_at_without_any_file(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = config_of(path)
    text, seconds = timed(path.stem)
    assert seconds < LIMIT_S
    first = text.splitlines()[:4]
    assert f"there is no {config.base}" in first[1]
    assert f"generation {config.generation} stands in" in first[1]
    assert f"there is no {config.data}" in first[2]
    size = {"2.0": 18876.17, "2.3": 18988.84}
    assert number(text, "transformer") == size[config.generation]
    rank = config.lora.rank / 128
    assert number(text, "trained") == pytest.approx(578.81 * rank, abs=0.01)
    # What the description promises is what the plan says, whatever jax's version.
    promised = re.search(r"Hardware: (\d+) GB", path.read_text())
    peak = max(float(n) for n in re.search(r"^together(.*)$", text, re.M)[1].split())
    assert promised is not None and peak <= int(promised[1]) <= peak + 2
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "name", ["low_memory", pytest.param("celebvhq_22b", marks=pytest.mark.slow)]
)
def test_a_full_size_file_gives_the_same_report(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = config_of(ROOT / "configs" / f"{name}.py")
    without = timed(name)[0].splitlines()
    sparse_files.write(tmp_path / config.base, config.base.stem)
    monkeypatch.setattr(io, "read_all", None)
    start = time.monotonic()
    found = said(config).splitlines()
    assert time.monotonic() - start < LIMIT_S
    assert [line for line in without if "stands in" not in line] == found


def test_what_is_there_is_told_and_left_alone(tiny_run, monkeypatch):
    monkeypatch.setattr(io, "read_all", None)
    before = sorted(tiny_run.data.rglob("*"))
    text = said(tiny_run)
    assert "there is no" not in text
    assert "4 to train on, 2 held out" in text
    assert "6 of 17 frames of 64 x 64 at 25 fps" in text
    assert "sound             9 latents" in text
    assert "(video 12, sound 9, reference 5)" in text
    assert number(text, "clips seen") == tiny_run.steps * tiny_run.batch_size
    assert "30.0 epochs" in text
    assert sorted(tiny_run.data.rglob("*")) == before
    assert not tiny_run.output.exists()


def test_devices_of_a_mesh_need_not_be_here(tiny_run, tmp_path):
    held_out = tiny_run.heldout.clips
    options = {"audio": 9, "reference": 5, "text": (128, 48)}
    data = latent_folder.write(tmp_path / "many", 64 + held_out, **options)
    many = dataclasses.replace(tiny_run, data=data, mesh="data=64", batch_size=64)
    text = said(many)
    assert "batch 64" in text and "data=64" in text
    uneven = dataclasses.replace(tiny_run, mesh="tensor=3")
    with pytest.raises(ValueError, match="got tensor=3"):
        said(uneven)


def test_saves_checks_and_rates_are_told(tiny_run):
    optimizer = Optimizer(accumulation=3, warmup=5, schedule="cosine")
    changes = {"optimizer": optimizer, "steps": 50, "save_every": 20}
    text = said(dataclasses.replace(tiny_run, validate_every=10, **changes))
    assert "50, each of 3 batches of 2 clips" in text
    assert "3, every 20 steps and at the end" in text
    assert "every 10 steps" in text
    assert "cosine, 0.0002 to 2e-05, after 5 steps of warm-up" in text
    silent = said(dataclasses.replace(tiny_run, heldout=HeldOut(clips=0)))
    assert re.search(r"held-out losses +none", silent)


def test_time_is_given_for_stated_hardware_alone(tiny_run):
    assert "floor" not in said(tiny_run)
    slow = dataclasses.replace(tiny_run, assume=Assume(tflops=1e-6))
    text = said(slow)
    work = re.search(r"floor of the time +([\d.]+) s a step", text)
    assert work is not None and "no forecast" in text
    # A millionth of a TFLOP/s: seconds are millions of operations.
    assert 10 < float(work[1]) < 1e4


@pytest.mark.slow
def test_too_little_memory_is_told_last(tiny_run):
    settings = {"batch_size": 1, "optimizer": Optimizer(name="lion")}
    small = dataclasses.replace(
        tiny_run, assume=Assume(memory_gb=1e-4), heldout=HeldOut(clips=1), **settings
    )
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"the assumed device has .* use a larger"):
        lines.extend(dry_run.reports(small))
    assert any(line.startswith("steps") for line in lines)
    warned = said(dataclasses.replace(small, memory="warn"))
    assert "warning: memory: " in warned


def test_the_base_decides_the_generation_where_it_is_there(tiny_run):
    other = dataclasses.replace(tiny_run, generation="2.3")
    with pytest.raises(ValueError, match=r"generation: got '2.3', expected 2.0"):
        said(other)
    seen = dry_run.look(tiny_run)
    assert seen.config.strategy.sigma == "2.0"
    named = dataclasses.replace(tiny_run.strategy, sigma="uniform")
    made = experiment.of_generation(
        dataclasses.replace(tiny_run, strategy=named), "2.0"
    )
    assert made.strategy.sigma == "uniform"


def script(*options: str) -> Any:
    command = [sys.executable, "train.py", "--config", "configs/tiny.py", "--dry-run"]
    return subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_the_script_ends_with_0_1_and_2(tiny_run):
    paths = (f"--{name}={getattr(tiny_run, name)}" for name in ("base", "data"))
    done = script(*paths, f"--output={tiny_run.output}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("dry run: 60 steps")
    failed = script("--base=nowhere", "--data=nowhere")
    assert failed.returncode == 1 and failed.stdout == ""
    assert "give --generation 2.0 or 2.3" in failed.stderr
    assert script("--assume.frames", "120").returncode == 2

"""`--precompile`: what a run compiles is compiled before, and no weights are read."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import latent_folder
import pytest
import sample_files

from idlora_jax import fitting, precompile, sessions
from idlora_jax.experiment import HeldOut, Lora, TrainConfig
from idlora_jax.presets import tiny_train
from idlora_jax.sample_config import Guidance

ROOT = pathlib.Path(__file__).parents[1]
COUNTING = """
import collections, runpy, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    names = "cache_hits", "cache_misses"
    print(*(counts[f"/jax/compilation_cache/{name}"] for name in names))
"""


@pytest.fixture
def train(tiny_model, tmp_path) -> TrainConfig:
    return dataclasses.replace(
        tiny_train(),
        base=tiny_model[0],
        data=latent_folder.write(tmp_path / "clips", 3, text=(128, 48)),
        output=tmp_path / "train",
        lora=Lora(rank=2, alpha=2.0, targets=("blocks/*/ff/*",)),
        heldout=HeldOut(clips=1, sigmas=(0.5,)),
        batch_size=1,
    )


def test_all_parts_of_sampling_are_compiled_and_nothing_is_written(
    no_weights, files, tmp_path
):
    simple = {"guidance": Guidance(1.0, 1.0, 0.0, 0.0, 3, 1.0), "lora": ()}
    config = sample_files.config(files, tmp_path / "out", **simple)
    rows, failed = precompile.samples(sessions.prepare([config]))
    assert not failed and not list((tmp_path / "out").iterdir())
    assert [row.name for row in rows] == [
        "text encoder",
        "text connectors",
        "encode sound",
        "encode pictures",
        "tables and prompts",
        "sampler step",
        "decode video",
        "decode sound",
        "vocoder",
    ]
    assert all(row.arguments > 0 and row.results > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_evaluation_and_a_step_of_training_are_compiled(no_weights, train, mode):
    plan = fitting.plan(dataclasses.replace(train, mode=mode))
    rows, failed = precompile.training(plan)
    names = [row.name for row in rows]
    assert not failed
    assert names[-1] == "training step" and "held-out predictions" in names
    assert not train.output.exists()


def counted(cache: pathlib.Path, *command: str) -> tuple[list[str], int, int]:
    """What a script prints, and how many programs it found and compiled."""
    given = {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    kept = {k: v for k, v in os.environ.items() if k != "IDLORA_PROGRAM_CACHE"}
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, *command],
        cwd=ROOT,
        env={**kept, **given, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    *lines, last = done.stdout.splitlines()
    hits, misses = map(int, last.split())
    return lines, hits, misses


@pytest.mark.slow
@pytest.mark.parametrize("where", ["device", "host"])
def test_the_run_after_precompiling_compiles_nothing(where, files, tmp_path):
    config = sample_files.config(files, tmp_path / "out")
    command = ["sample.py", *sample_files.arguments(config), "--weights-in", where]
    lines, _, before = counted(tmp_path, *command, "--precompile")
    assert any(line.startswith("sampler step") for line in lines) and before > 20
    lines, hits, misses = counted(tmp_path, *command)
    assert misses == 0 and hits >= before - 5
    assert str(tmp_path / "out" / "sample.mp4") in lines


@pytest.mark.slow
def test_training_after_precompiling_compiles_nothing_of_ours(train, tmp_path):
    paths = {"base": train.base, "data": train.data, "output": train.output}
    given = [f"--{name}={path}" for name, path in paths.items()]
    small = ["--lora.rank=2", "--lora.targets=blocks/*/ff/*", "--heldout.clips=1"]
    more = ["--steps=2", "--save-every=2", "--batch-size=1", "--memory=off"]
    command = ["train.py", "--config", "configs/tiny.py", *given, *small, *more]
    lines, _, before = counted(tmp_path, *command, "--precompile")
    assert any(line.startswith("training step") for line in lines)
    _, hits, misses = counted(tmp_path, *command)
    # Orbax copies arrays by small programs of its own.
    assert misses <= 2 and hits >= before - 5


@pytest.mark.slow
def test_clips_sampled_while_training_are_precompiled_too(train, files, tmp_path):
    clip = sample_files.config(files, pathlib.Path("elsewhere"), lora=())
    source = tmp_path / "clip.py"
    shown = repr(clip).replace("PosixPath(", "pathlib.Path(")
    lines = ["import pathlib", "from idlora_jax.sample_config import *"]
    lines += ["def get_config():", f"    return {shown}"]
    source.write_text("\n".join(lines))
    paths = {"base": train.base, "data": train.data, "output": train.output}
    given = [f"--{name}={path}" for name, path in paths.items()]
    small = ["--lora.rank=2", "--lora.targets=blocks/*/ff/*", "--heldout.clips=1"]
    more = ["--steps=1", "--batch-size=1", "--memory=off", "--samples.every=1"]
    more += [f"--samples.config={source}"]
    command = ["train.py", "--config", "configs/tiny.py", *given, *small, *more]
    lines, _, before = counted(tmp_path, *command, "--precompile")
    for name in ("training step", "sampler step", "decode video", "vocoder"):
        assert any(line.startswith(name) for line in lines), name
    assert not [*train.output.iterdir()]
    _, hits, misses = counted(tmp_path, *command)
    assert (train.output / "samples/step_00001/sample.mp4").is_file()
    assert misses <= 2 and hits >= before - 5

"""Configuration files and the command line."""

from __future__ import annotations

import dataclasses
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from idlora_jax import commandline, experiment
from idlora_jax.experiment import Optimizer, Strategy, TrainConfig
from idlora_jax.sample_config import SampleConfig
from idlora_jax.settings import UsageError

ROOT = pathlib.Path(__file__).parents[1]
FILE = """
from pathlib import Path
from idlora_jax.experiment import Optimizer, TrainConfig

def get_config():
    return TrainConfig(
        base=Path("b"), data=Path("d"), output=Path("o"),
        optimizer=Optimizer(learning_rate=1e-3), steps=7,
    )
"""


@pytest.fixture
def file(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "config.py"
    path.write_text(FILE)
    return str(path)


def parsed(file: str, *argv: str) -> TrainConfig:
    return commandline.parse(["--config", file, *argv], TrainConfig)


def refused(capsys: pytest.CaptureFixture[str], *argv: str, kind: Any = None) -> str:
    """What is printed for a usage error."""
    with pytest.raises(SystemExit) as caught:
        commandline.parse(argv, kind or TrainConfig)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_the_file_gives_the_values_and_options_override_them(file: str):
    assert parsed(file).steps == 7
    got = parsed(file, "--optimizer.learning-rate", "1e-4", "--steps", "9", "--resume")
    assert got.optimizer == Optimizer(learning_rate=1e-4)
    assert (got.steps, got.resume, got.base) == (9, True, pathlib.Path("b"))
    assert parsed(file, "--optimizer.learning_rate=1e-4").optimizer == got.optimizer


def test_options_are_typed(file: str):
    got = parsed(
        file, "--optimizer.clip", "None", "--optimizer.betas", "0.8", "0.95",
        "--strategy.sigma", "2.3", "--lora.targets", "blocks/*", "--heldout.clips", "0",
    )  # fmt: skip
    assert got.optimizer.clip is None
    assert got.optimizer.betas == (0.8, 0.95)
    assert got.strategy.sigma == "2.3"
    assert got.lora.targets == ("blocks/*",)
    assert got.heldout.clips == 0


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("--optimizer.learning-rat", "--optimizer.learning-rate"),
        ("--learning-rate", "--optimizer.learning-rate"),
        ("--stepz", "--steps"),
        ("--strategy.first_frame", "--strategy.first-frame-p"),
        ("--confg", "--config"),
        ("--resum", "--resume"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(
    file: str, capsys: pytest.CaptureFixture[str], wrong: str, near: str
):
    message = refused(capsys, "--config", file, wrong, "3")
    assert f"unknown option {wrong}" in message
    assert f"nearest name is {near} " in message


def test_a_value_without_a_name_is_refused(file: str, capsys: Any):
    assert "unexpected argument 7" in refused(capsys, "--config", file, "7")


def test_a_value_of_another_type_or_choice_is_refused(file: str, capsys: Any):
    assert "--steps" in refused(capsys, "--config", file, "--steps", "many")
    assert "2.5" in refused(capsys, "--config", file, "--strategy.sigma", "2.5")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--steps", "0", "1 or more"),
        ("--lora.rank", "0", "1 or more"),
        ("--lora.alpha", "-1", "above 0"),
        ("--lora.ranks", "blocks/*", '"pattern=number"'),
        ("--lora.ranks", "blocks/*=1.5", "a whole number"),
        ("--lora.ranks", "blocks/*=0", "the number above 0"),
        ("--lora.alphas", "=4", '"pattern=number"'),
        ("--lora.dropout", "1", "below 1"),
        ("--optimizer.clip", "0", "above 0, or None"),
        ("--optimizer.betas", "0.9 1", "below 1"),
        ("--optimizer.b-ratio", "0", "above 0"),
        ("--optimizer.cycle", "0", "1 or more"),
        ("--optimizer.warmup", "7", "fewer than the 7 steps"),
        ("--optimizer.name", "prodigy", "a factor of about 1"),
        ("--optimizer.name", "schedule_free", "schedule_free averages"),
        ("--ema.decay", "1", "below 1, or None"),
        ("--ema.start", "-1", "0 or more"),
        ("--mode", "full --weights keep", "cannot be trained"),
        ("--mode", "full --weights int8", "cannot be trained"),
        ("--mode", "full --weights-in host", "cannot be trained"),
        ("--remat", "none --weights-in host", "full with weights_in 'host'"),
        ("--mode", "full --optimizer.b-ratio 4", "there is no adapter"),
        ("--strategy.first-frame-p", "1.5", "0 to 1"),
        ("--heldout.sigmas", "0", "levels above 0"),
        ("--mesh", "rows=2", "not 'rows=2'"),
        ("--mesh", "data=0", "a whole number from 1"),
        ("--mesh", "data=2,fsdp=2", "batch_size: got 1, expected a multiple of 4"),
        ("--mesh", "guidance=2", "no guidance axis: training has no branches"),
        ("--distributed.processes", "2", "together, or none of them"),
    ],
)
def test_a_value_out_of_range_is_refused(
    file: str, capsys: Any, option: str, value: str, expected: str
):
    message = refused(capsys, "--config", file, option, *value.split())
    assert expected in " ".join(message.replace("│", " ").split())


def test_a_mesh_and_processes_are_settings(file: str):
    got = parsed(
        file, "--mesh", "data=2,fsdp=2,tensor=2", "--batch-size", "8",
        "--distributed.coordinator", "node1:1234", "--distributed.processes", "2",
        "--distributed.process", "1",
    )  # fmt: skip
    assert got.mesh == "data=2,fsdp=2,tensor=2"
    assert (got.distributed.processes, got.distributed.process) == (2, 1)
    assert parsed(file).distributed.coordinator is None


def test_what_does_not_go_together_is_refused(file: str, capsys: Any):
    free = ("--optimizer.name", "schedule_free", "--optimizer.schedule", "constant")
    assert parsed(file, *free).optimizer.name == "schedule_free"
    message = refused(capsys, "--config", file, *free, "--ema.decay", "0.9")
    assert "exports is an average already" in " ".join(message.split())
    message = refused(capsys, "--config", file, *free, "--optimizer.betas", "0", "0.9")
    assert "divides by it" in " ".join(message.split())
    found = ("--optimizer.name", "prodigy", "--optimizer.learning-rate", "1")
    assert parsed(file, *found).optimizer.learning_rate == 1
    message = refused(capsys, "--config", file, *found, "--optimizer.b-ratio", "4")
    assert "one rate for all" in " ".join(message.split())


def test_ranks_and_alphas_are_given_by_pattern(file: str):
    got = parsed(
        file, "--lora.ranks", "blocks/audio/ff/*=64", "blocks/audio/*=32",
        "--lora.alphas", "blocks/*=12.5", "--lora.rslora",
    ).lora  # fmt: skip
    modules = ("blocks/audio/ff/up", "blocks/audio/self_attn/q", "video/out")
    assert [got.rank_of(m) for m in modules] == [64, 32, 128]
    assert got.factor("blocks/video/ff/up", 25) == 2.5
    assert got.factor("video/out", 64) == 16.0


def test_a_missing_file_option_is_asked_for(capsys: Any):
    assert "--config FILE is missing" in refused(capsys, "--steps", "3")


def test_a_missing_file_is_named(capsys: Any):
    assert "no such file nowhere.py" in refused(capsys, "--config", "nowhere.py")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "no attribute 'get_config'"),
        ("def get_config(): return 3", "returns int, expected TrainConfig"),
        (FILE.replace("steps=7", "stepz=7"), "unexpected keyword argument 'stepz'"),
        (FILE.replace("steps=7", "steps=-7"), "steps: got -7, expected 1 or more"),
    ],
)
def test_a_file_that_does_not_work_says_why(
    tmp_path: pathlib.Path, capsys: Any, text: str, shown: str
):
    path = tmp_path / "config.py"
    path.write_text(text)
    message = refused(capsys, "--config", str(path))
    assert shown in message
    assert str(path) in message


def test_the_file_of_another_script_is_refused(file: str, capsys: Any):
    message = refused(capsys, "--config", file, kind=SampleConfig)
    assert "returns TrainConfig, expected SampleConfig" in message


def test_help_lists_the_options_and_ends_well(file: str, capsys: Any):
    for argv in (["--help"], ["--config", file, "--help"]):
        with pytest.raises(SystemExit) as caught:
            commandline.parse(argv, TrainConfig)
        assert not caught.value.code
        assert "--optimizer.learning-rate" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=str)
def test_every_shipped_configuration_loads(path: pathlib.Path):
    kind: Any = SampleConfig if "sample" in path.stem else TrainConfig
    config = commandline.load_config(path, kind)
    assert dataclasses.is_dataclass(config)
    script = "sample.py" if kind is SampleConfig else "train.py"
    assert f"python {script} --config configs/{path.name}" in path.read_text()


def test_the_hash_depends_on_every_setting(file: str):
    first = experiment.config_hash(parsed(file))
    assert first == experiment.config_hash(parsed(file))
    assert first != experiment.config_hash(parsed(file, "--optimizer.eps", "1e-7"))


def test_flat_names_are_those_of_the_command_line(file: str):
    flat = experiment.flat(experiment.plain(parsed(file)))
    assert flat["optimizer.learning_rate"] == 1e-3
    assert flat["base"] == "b"


def test_the_defaults_are_the_published_training_settings():
    assert Strategy() == Strategy(
        name="audio_ref_only_ic", first_frame_p=0.9, coin="batch",
        video_sees_ref=False, ref_sees_text=False, negative_positions=True,
    )  # fmt: skip
    settings = Optimizer()
    assert (settings.learning_rate, settings.end_factor, settings.clip) == (
        2e-4, 0.1, 1.0,
    )  # fmt: skip
    assert (experiment.Lora().rank, experiment.Lora().alpha) == (128, 128.0)


def test_wrong_input_ends_in_one_message_and_status_1(capsys: Any):
    def fails() -> int:
        raise ValueError("clip: got 0 frames, expected 9")

    with pytest.raises(SystemExit) as caught:
        commandline.guarded(fails)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: clip: got 0 frames, expected 9\n"
    with pytest.raises(SystemExit) as caught:
        commandline.guarded(lambda: 143)
    assert caught.value.code == 143


def test_settings_that_cannot_be_used_here_end_in_status_2(capsys: Any):
    def fails() -> int:
        raise UsageError("mesh: got 8 devices, expected at most 1")

    with pytest.raises(SystemExit) as caught:
        commandline.guarded(fails)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: mesh: got 8 devices, expected at most 1\n"


def test_a_mistyped_option_answers_without_loading_jax(file: str):
    code = (
        "import sys; sys.path.insert(0, '.'); import train, idlora_jax.experiment; "
        "assert 'jax' not in sys.modules; "
        f"sys.argv = ['train.py', '--config', {file!r}, '--stepz', '3']; train.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "nearest name is --steps" in done.stderr
    assert "Traceback" not in done.stderr

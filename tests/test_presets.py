"""The configuration files: each loads, and the tiny ones are what the demo runs."""

import pathlib

import pytest

from idlora_jax import commandline, presets
from idlora_jax.experiment import TrainConfig
from idlora_jax.sample_config import SampleConfig

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_file_loads_and_says_how_to_run_it(path):
    kinds = {"train.py": TrainConfig, "sample.py": SampleConfig}
    text = path.read_text("utf-8")
    (script,) = [name for name in kinds if f"python {name} --config" in text]
    assert f"python {script} --config configs/{path.name}" in text
    commandline.load_config(path, kinds[script])


def test_the_tiny_configurations_are_those_of_the_demo():
    found = {path.stem: path for path in CONFIGS}
    train = commandline.load_config(found["tiny"], TrainConfig)
    sample = commandline.load_config(found["tiny_sample"], SampleConfig)
    demo = pathlib.Path("outputs/demo")
    assert (train, sample) == (presets.tiny_train(demo), presets.tiny_sample(demo))
    assert train.base == sample.base and train.steps >= 60

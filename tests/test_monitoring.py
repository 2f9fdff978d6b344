"""What is looked at while a run goes on, as settings."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from idlora_jax import experiment, runs
from idlora_jax.monitoring import Samples, Wandb
from idlora_jax.presets import tiny_sample, tiny_train

CLIPS = (tiny_sample(),)


def test_clips_are_due_every_so_many_steps_and_at_both_ends():
    samples = Samples(every=4, clips=CLIPS)
    assert [n for n in range(11) if samples.due(n, 10)] == [0, 4, 8, 10]
    later = dataclasses.replace(samples, at_start=False)
    assert [n for n in range(11) if later.due(n, 10)] == [4, 8, 10]
    assert not any(Samples().due(n, 10) for n in range(11))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": -1}, "samples.every: got -1, expected 0 or more"),
        ({"every": 2}, "samples.config: got None, expected a configuration file"),
        (
            {"every": 2, "clips": CLIPS, "config": pathlib.Path("a.py")},
            "samples.config: .* expected none beside clips",
        ),
        (
            {"clips": CLIPS, "prompts_file": pathlib.Path("a.json")},
            "samples.prompts_file: .* expected none beside clips",
        ),
    ],
)
def test_settings_that_say_nothing_to_sample_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Samples(**settings)


def test_the_average_is_sampled_only_where_there_is_one():
    samples = Samples(every=1, clips=CLIPS, ema=True)
    with pytest.raises(ValueError, match=r"samples.ema: .* \(--ema.decay\)"):
        dataclasses.replace(tiny_train(), samples=samples)
    dataclasses.replace(tiny_train(), samples=samples, ema=experiment.Ema(0.9))


def test_what_is_looked_at_may_change_when_a_run_is_resumed():
    plain = tiny_train()
    looked = dataclasses.replace(
        plain, samples=Samples(every=1, clips=CLIPS), wandb=Wandb("mine", video=True)
    )
    facts = [runs.Run(c, runs.AdapterMeta()).identity() for c in (plain, looked)]
    assert facts[0] == facts[1]
    assert "optimizer.clip" in facts[0]["settings"]

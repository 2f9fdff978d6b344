"""`train.py`: wrong input before any weights are read, and a run that is killed."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import subprocess
from typing import Any

import jax
import latent_folder
import numpy as np
import pytest
from train_script import ROOT, command, environment, wait_for_line

from idlora_jax import checkpoints, fitting, heldout, runs, states, strategies
from idlora_jax.config import AUDIO_TARGETS
from idlora_jax.data import latents
from idlora_jax.experiment import HeldOut, Lora, Optimizer, Strategy, TrainConfig
from idlora_jax.presets import tiny_train
from idlora_jax.settings import UsageError
from idlora_jax.types import Prompt
from idlora_jax.weights import io

TEXT = (128, 48)
"""Tokens and width of the tiny model's features."""
EIGHTY = ("--steps=80", "--save-every=80")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return latent_folder.write(tmp_path_factory.mktemp("clips"), 6, text=TEXT)


@pytest.fixture
def config(tiny_model: Any, clips: pathlib.Path, tmp_path: pathlib.Path) -> TrainConfig:
    made = tiny_train()
    return dataclasses.replace(
        made, base=tiny_model[0], data=clips, output=tmp_path / "train"
    )


def test_good_inputs_are_planned_without_weights(no_weights: None, config: TrainConfig):
    plan = fitting.plan(config)
    assert len(plan.clips.clips) == 4
    assert len(plan.held.clips) == 2
    assert plan.resumed is None
    assert not config.output.exists()


def test_the_exported_facts_are_those_of_the_run(config: TrainConfig):
    spec = Strategy(ref_sees_text=True, gap_s=0.5, negative_positions=False)
    plan = fitting.plan(dataclasses.replace(config, strategy=spec))
    meta = plan.run.meta
    assert meta.base_hash == plan.nets.base_hash != ""
    assert (meta.generation, meta.rank, meta.alpha, meta.fps) == ("2.0", 8, 8.0, 25.0)
    assert meta.targets == AUDIO_TARGETS
    assert meta.base_name == config.base.name
    longest = max(clip.reference for clip in plan.clips.clips + plan.held.clips)
    assert meta.reference_s == longest / 25 > 0
    assert (meta.video_sees_ref, meta.ref_sees_text) == (False, True)
    assert meta.reference_gap_s == 0.5
    assert meta.extra["negative_positions"] == "false"
    branch = strategies.branch(spec)
    assert meta.video_sees_ref == branch.video_sees_ref
    assert meta.ref_sees_text == branch.ref_sees_text


def test_the_exported_facts_tell_ranks_and_scales(config: TrainConfig):
    lora = Lora(rank=4, alpha=6.0, ranks=("blocks/audio/ff/*=16",), rslora=True)
    meta = fitting.plan(dataclasses.replace(config, lora=lora)).run.meta
    # Recorded is the usual scale, alpha / sqrt(rank), times the rank.
    assert (meta.rank, meta.alpha) == (16, 12.0)
    assert meta.extra["ranks"] == "blocks/audio/ff/*=16"
    full = dataclasses.replace(config, mode="full")
    meta = fitting.plan(full).run.meta
    assert (meta.rank, meta.targets, meta.extra["mode"]) == (0, (), "full")


@pytest.mark.parametrize("name", ["ranks", "alphas"])
def test_patterns_of_ranks_and_alphas_must_fit_a_module(
    no_weights: None, config: TrainConfig, name: str
):
    lora = Lora(rank=2, alpha=2.0, **{name: ("blocks/audio/ff/*=4", "*/nose=3")})
    with pytest.raises(ValueError, match=r"no adapted module matches \['\*/nose'\]"):
        fitting.plan(dataclasses.replace(config, lora=lora))


def test_text_to_video_needs_no_references(config: TrainConfig, tmp_path: pathlib.Path):
    data = latent_folder.write(tmp_path / "data", 4, text=TEXT)
    for path in (data / latents.REFERENCE).rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="missing in reference_audio_latents"):
        fitting.plan(dataclasses.replace(config, data=data))
    spec = Strategy(name="text_to_video")
    fitting.plan(dataclasses.replace(config, data=data, strategy=spec))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=2", "got data=2 = 2 devices, expected at most the 1 that there are"),
        ("tensor=3", "tensor=3, but the transformer has 4 heads"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_weights_are_read(
    no_weights: None, config: TrainConfig, mesh: str, message: str
):
    with pytest.raises(UsageError, match=message):
        fitting.plan(dataclasses.replace(config, mesh=mesh))
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": pathlib.Path("nowhere")}, "no such folder nowhere"),
        ({"base": pathlib.Path("nowhere.safetensors")}, "nowhere.safetensors"),
        ({"heldout": HeldOut(clips=6)}, "at least one to train on"),
        (
            {"batch_size": 5},
            r"fewer clips to train on than batch_size 5:\n.* 25 fps: 4",
        ),
    ],
)
def test_wrong_input_is_refused_before_weights_are_read(
    no_weights: None, config: TrainConfig, change: Any, message: str
):
    with pytest.raises(ValueError, match=message):
        fitting.plan(dataclasses.replace(config, **change))
    assert not config.output.exists()


def test_targets_that_match_nothing_are_refused(config: TrainConfig):
    lora = Lora(rank=2, alpha=2.0, targets=("blocks/sound/*",))
    with pytest.raises(ValueError, match="no module matches"):
        fitting.plan(dataclasses.replace(config, lora=lora))
    assert not config.output.exists()


@pytest.mark.slow
def test_a_run_ended_by_sigterm_and_resumed_gives_the_same_adapter_bitwise(
    config: TrainConfig, tmp_path: pathlib.Path
):
    env = environment(tmp_path / "cache")
    options: dict[str, Any] = {"cwd": ROOT, "env": env, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    straight = subprocess.run(command(config, *EIGHTY), **options)
    assert straight.returncode == 0, straight.stderr
    stopped = dataclasses.replace(config, output=tmp_path / "stopped")
    log = stopped.output / "log.jsonl"
    resume: list[str] = []
    seen = []
    for line in (1, 30):
        process = subprocess.Popen(command(stopped, *EIGHTY, *resume), **options)
        wait_for_line(log, process, line)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert "stopped by SIGTERM" in out
        assert "--resume" in out
        seen.append(states.latest(stopped.output / "state"))
        assert (
            stopped.output / f"lora_weights_step_{seen[-1]:05d}.safetensors"
        ).exists()
        resume = ["--resume"]
    assert 1 <= seen[0] < 30 <= seen[1] < 80
    last = subprocess.run(command(stopped, *EIGHTY, "--resume"), **options)
    assert last.returncode == 0, last.stderr
    name = "lora_weights_step_00080.safetensors"
    assert (stopped.output / name).read_bytes() == (config.output / name).read_bytes()
    steps = [json.loads(row)["step"] for row in log.read_text().splitlines()]
    assert steps == [*range(1, 81)]


@pytest.mark.slow
def test_train_py_says_what_is_wrong_in_one_line(
    config: TrainConfig, tmp_path: pathlib.Path
):
    wrong = dataclasses.replace(config, data=tmp_path / "nowhere")
    done = subprocess.run(
        command(wrong), cwd=ROOT, env=environment(tmp_path), text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: data: no such folder")
    assert "Traceback" not in done.stderr


def test_the_held_out_batch_follows_from_data_heldout_and_strategy_alone(
    config: TrainConfig,
):
    def fixed(**changes: Any) -> Any:
        made = dataclasses.replace(config, **changes)
        connect = lambda features, mask: Prompt(features.video, features.audio)
        plan = fitting.plan(made)
        return heldout.fixed(plan.run.config, plan.held, connect)

    want = fixed()
    free = {"batch_size": 1, "seed": 9, "steps": 99, "lora": Lora(rank=2, seed=4)}
    free |= {"optimizer": Optimizer(accumulation=2), "resume": True}
    jax.tree.map(np.testing.assert_array_equal, fixed(**free), want)
    ((batch, noise),), ((same, other),) = fixed(heldout=HeldOut(seed=1)), want
    jax.tree.map(np.testing.assert_array_equal, batch, same)
    assert np.abs(noise.audio - other.audio).mean() > 0.5


def test_the_held_out_loss_is_told_with_what_the_adapter_does():
    numbers = {"loss": 2.0, "video_loss": 0.5, "audio_loss": 1.5, "ema_loss": 3.0}
    numbers |= {"adapter_effect_video": 0.012, "ema_adapter_effect_video": 9.0}
    line = heldout.told("after", numbers)
    assert line == (
        "held-out after: loss 2.00000, video loss 0.50000, audio loss 1.50000, ema "
        "loss 3.00000, the adapter changes video by 1.2%"
    )


@pytest.mark.slow
def test_held_out_losses_are_given_before_and_after(config: TrainConfig):
    lines: list[str] = []
    short = dataclasses.replace(config, steps=8)
    result = fitting.fit(fitting.plan(short), lines.append)
    assert result.before is not None
    assert result.after is not None
    assert result.before["audio_loss"] > result.after["audio_loss"]
    assert [line.split(":")[0] for line in lines[1:]] == [
        "held-out before", "held-out after",
    ]  # fmt: skip
    run = runs.Run(
        short, fitting.plan(dataclasses.replace(short, resume=True)).run.meta
    )
    assert result.adapter == run.adapter(8)
    tensors, _ = checkpoints.read_tensors(result.adapter)
    assert len(tensors) == 2 * 18 * 4
    assert all(np.isfinite(t).all() and t.dtype == np.float32 for t in tensors.values())


@pytest.mark.slow
def test_the_whole_transformer_is_trained_exported_and_read_again(config: TrainConfig):
    rate = Optimizer(learning_rate=1e-3, schedule="constant")
    none = HeldOut(clips=0)
    full = dataclasses.replace(
        config, mode="full", steps=4, optimizer=rate, heldout=none
    )
    result = fitting.fit(fitting.plan(full), lambda line: None)
    rows = (full.output / "log.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows]
    assert losses[-1] < 0.9 * losses[0]
    assert result.adapter.name == "transformer_step_00004.safetensors"
    found = io.load_network(io.open_base(result.adapter), "transformer")
    # In the dtypes of the base's file.
    old = io.load_network(io.open_base(config.base), "transformer")
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(
        lambda a: a.dtype, old
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
        found,
        result.state.adapter,
    )
    # Clips are sampled with what `sample.py` would read of that file.
    plan = fitting.plan(dataclasses.replace(full, resume=True))
    shapes = jax.eval_shape(lambda: old)
    served = fitting.served(plan, shapes, {})(result.state.adapter)
    jax.tree.map(np.testing.assert_array_equal, served, found)
    with pytest.raises(ValueError, match="add --resume"):
        fitting.plan(full)

"""Every training mode from a folder to an adapter, on the tiny model."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import latent_folder
import numpy as np
import pytest
from safetensors import safe_open

from idlora_jax import as_trained, checkpoints, fitting, strategies
from idlora_jax.data import latents
from idlora_jax.experiment import HeldOut, Lora, Strategy, TrainConfig
from idlora_jax.presets import tiny_train
from idlora_jax.weights import io

TEXT = (128, 48)
SEEN = (2, 1, 1)
"""Latents of the video references: half the sides."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("clips")
    return latent_folder.write(folder, 3, text=TEXT, seen=SEEN)


@pytest.fixture
def config(tiny_model: Any, clips: pathlib.Path, tmp_path: pathlib.Path) -> TrainConfig:
    return dataclasses.replace(
        tiny_train(),
        base=tiny_model[0],
        data=clips,
        output=tmp_path / "train",
        lora=Lora(rank=2, alpha=2.0, targets=("blocks/*/ff/*",)),
        heldout=HeldOut(clips=1, sigmas=(0.25, 0.75)),
        steps=2,
        save_every=2,
    )


@pytest.mark.parametrize("name", strategies.MODES)
def test_a_mode_reads_its_folders_and_no_others(
    name: Any, config: TrainConfig, clips: pathlib.Path, tmp_path: pathlib.Path
):
    spec = Strategy(name=name)
    read = fitting.folders(spec)
    for folder in read:
        shutil.copytree(clips / folder, tmp_path / "only" / folder)
    only = dataclasses.replace(config, strategy=spec, data=tmp_path / "only")
    plan = fitting.plan(only)
    row, clip = strategies.mode(spec), plan.clips.clips[0]
    got = [bool(size) for size in (clip.audio, clip.reference, clip.video_reference)]
    assert got == [row.audio, row.reference, row.video_reference]
    shutil.rmtree(tmp_path / "only" / read[-1])
    with pytest.raises(ValueError, match=read[-1]):
        fitting.plan(only)


@pytest.mark.parametrize("name", ["text_to_video", "video_to_video"])
def test_an_adapter_of_sound_cannot_learn_from_video_alone(
    name: Any, config: TrainConfig
):
    spec = Strategy(name=name, with_audio=False)
    silent = dataclasses.replace(config, strategy=spec)
    fitting.plan(silent)
    with pytest.raises(ValueError, match=r"only sound passes; expected .*self_attn"):
        fitting.plan(dataclasses.replace(silent, lora=Lora()))


def test_text_to_video_without_sound_reads_none():
    silent = Strategy(name="text_to_video", with_audio=False)
    assert fitting.folders(silent) == (latents.VIDEO, latents.TEXT)


@pytest.mark.slow
def test_both_references_train_and_the_adapter_says_how(config: TrainConfig):
    spec = Strategy(
        name="audio_video_ic", negative_video=True, gap_s=0.5, reference_p_drop=0.5
    )
    run = dataclasses.replace(config, strategy=spec, numerics="reference")
    result = fitting.fit(fitting.plan(run), say=lambda _: None)
    assert result.before is not None and result.after is not None
    for part in ("video_loss", "audio_loss"):
        levels = [result.after[f"{part}@{s:g}"] for s in (0.25, 0.75)]
        np.testing.assert_allclose(np.mean(levels), result.after[part], rtol=1e-5)
        assert levels[0] != levels[1]
    assert result.before["loss"] != result.after["loss"]
    shapes = io.shapes(io.open_base(config.base), "transformer")
    _, meta = checkpoints.load_adapter(result.adapter, shapes)
    assert meta.extra["reference_downscale_factor"] == "2"
    with safe_open(result.adapter, framework="numpy") as file:
        assert file.metadata()["reference_downscale_factor"] == "2"
    assert meta.extra["reference_p_drop"] == "0.5"
    found = as_trained.of(meta)
    assert found is not None
    assert found.placing == strategies.placing(spec, "train_bf16")
    assert found.branch == strategies.branch(spec)

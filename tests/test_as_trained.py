"""Sampling as an adapter was trained: what is applied, what is asked for, refused."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import sample_files
from small_transformer import GRID, SOUND, base, config, draw, prompt

from idlora_jax import as_trained, jobs, pipeline, plans, strategies
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.experiment import Strategy
from idlora_jax.references import USUAL, Placing
from idlora_jax.sample_config import Guidance, SampleConfig
from idlora_jax.types import Branch, Layout

PLAN = plans.two_stage(steps=2, adapters={"anna": 1.0}, refining={"distilled": 0.8})
MASKED = Branch(video_sees_ref=False, ref_sees_text=False)


def meta(numerics: str = "exact", **changes: Any) -> AdapterMeta:
    """What training with these settings would record."""
    spec = Strategy(**changes)
    sees = strategies.branch(spec)
    return AdapterMeta(
        numerics=numerics,
        reference_gap_s=spec.gap_s,
        video_sees_ref=sees.video_sees_ref,
        ref_sees_text=sees.ref_sees_text,
        extra=as_trained.recorded(spec),
    )


def applied(*metas: AdapterMeta, **options: Any) -> plans.Plan:
    named = {f"adapter {n}": one for n, one in enumerate(metas)}
    return as_trained.applied(PLAN, named, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_positions": False, "ref_sees_text": True},
        {"name": "audio_video_ic", "negative_video": True, "gap_s": 0.5},
    ],
)
def test_what_training_records_is_what_it_did(changes: dict[str, Any]):
    spec = Strategy(**changes)
    found = as_trained.of(meta(**changes))
    assert found is not None
    assert found.branch == strategies.branch(spec)
    assert found.placing == strategies.placing(spec)
    rounded = as_trained.of(meta("reference", **changes))
    assert rounded is not None
    assert rounded.placing == strategies.placing(spec, "train_bf16")


def test_files_of_others_and_training_without_references_change_nothing():
    assert as_trained.of(AdapterMeta(generation="2.0")) is None
    assert as_trained.of(meta(name="text_to_video", gap_s=0.5)) is None
    assert applied() == applied(AdapterMeta()) == PLAN
    assert applied(meta()) == PLAN


def test_places_of_references_are_applied_and_masks_only_when_asked():
    far = meta(gap_s=0.5, negative_positions=False)
    first, second = applied(far, AdapterMeta()).stages
    assert first.placing == Placing(0.5, audio_before=False)
    assert first.positive == Branch()
    assert second == PLAN.stages[1]
    first, second = applied(far, masks="as_trained").stages
    assert first.positive == MASKED
    assert second == PLAN.stages[1]


def test_rounding_of_positions_is_applied_when_asked():
    assert applied(meta("reference")).stages[0].placing == USUAL
    first, second = applied(meta("reference"), rounding="as_trained").stages
    assert first.placing == dataclasses.replace(USUAL, rounding="train_bf16")
    assert second.placing == USUAL
    assert applied(meta("exact"), rounding="as_trained") == PLAN


def test_adapters_that_were_trained_differently_are_refused_together():
    with pytest.raises(ValueError, match=r"places of references(.|\n)*adapter 1: Pl"):
        applied(meta(), meta(gap_s=0.5))
    both = meta(), meta(ref_sees_text=True)
    assert applied(*both) == PLAN
    with pytest.raises(ValueError, match="different masks"):
        applied(*both, masks="as_trained")
    # One without audio references has no masks.
    other = meta(name="video_to_video")
    assert applied(meta(), other, masks="as_trained").stages[0].positive == MASKED


@pytest.mark.parametrize(
    ("setting", "message"),
    [("masks", "masks: got 'as_trained'"), ("rounding", "position_rounding: got")],
)
def test_asking_for_what_no_file_records_is_refused(setting: str, message: str):
    with pytest.raises(ValueError, match=message):
        applied(AdapterMeta(), **{setting: "as_trained"})


def test_sample_py_applies_what_the_file_records(
    tiny_model: Any, tmp_path: pathlib.Path
):
    files = sample_files.written(tiny_model, tmp_path)
    asked = {"masks": "as_trained", "position_rounding": "as_trained"}
    asked_for = SampleConfig(
        base=files["base"],
        text_encoder=files["text_encoder"],
        lora=(files["lora"],),
        prompt="[VISUAL]: a face [SPEECH]: hello [SOUNDS]: none",
        guidance=Guidance(stg_layer=3),
        output_dir=tmp_path,
        **asked,
    )
    found = jobs.opened(asked_for)
    with pytest.raises(ValueError, match="no adapter in use records"):
        jobs.check(asked_for, found)
    far = meta("reference", gap_s=0.5)
    metas = {name: far for name in found.metas}
    job, _ = jobs.check(asked_for, found._replace(metas=metas))
    (stage,) = job.plan.stages
    assert stage.placing == Placing(0.5, rounding="train_bf16")
    assert stage.positive == MASKED
    usual = dataclasses.replace(asked_for, masks="off", position_rounding="off")
    (stage,) = jobs.check(usual, found._replace(metas=metas))[0].plan.stages
    assert (stage.placing, stage.positive) == (Placing(0.5), Branch())


class StartedError(Exception):
    """Raised where a stage would be compiled."""


def test_the_sampler_builds_its_streams_as_the_stage_says(
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[Any] = []

    def start(*args: Any, **options: Any) -> Any:
        seen.append(real(*args, **options))
        raise StartedError

    real = pipeline.start
    monkeypatch.setattr(pipeline, "start", start)
    request = pipeline.Request(
        (prompt("2.0"),),
        draw(1, 1, 3, 16, 8),
        video_reference=draw(2, 1, 1, 2, 1, 128),
    )
    where = Placing(0.5, audio_before=False, video_before=True)
    stage = plans.Stage("one", sigmas=plans.Levels((1.0, 0.0)), placing=where)
    args = (stage, config("2.0"), {"params": base("2.0")}, request, jax.random.key(0))
    with pytest.raises(StartedError):
        pipeline.sample(*args, layout=Layout(GRID, SOUND))
    (s,) = seen
    np.testing.assert_allclose(s.video.pos[0, 0, -1, 1], -0.5, atol=1e-6)
    np.testing.assert_array_equal(s.audio.pos[:, :, 5:], s.audio.pos[:, :, :3])

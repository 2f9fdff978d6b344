"""Pipelines as data: what is on, with which weight, at which noise levels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from idlora_jax import guidance, plans, schedules, solvers
from idlora_jax.plans import Plan, Sigmas, Stage
from idlora_jax.sample_config import Guidance
from idlora_jax.types import AudioGrid, Layout, Skip, VideoGrid

LAYOUT = Layout(VideoGrid(17, 64, 96, 25.0), AudioGrid(17))
OFF = {"video_cfg": 1, "audio_cfg": 1, "identity": 0, "stg": 0, "bimodal": 1}


def stage(**options) -> Stage:
    (only,) = plans.one_stage(**options).stages
    return only


def names(s: Stage) -> list[str]:
    return [term.name for term in s.terms]


def test_one_stage_has_the_published_weights():
    s = stage()
    assert names(s) == ["text", "identity", "stg", "bimodal"]
    want = [(2, 6), (0, 3), (1, 1), (2, 2)]
    table = s.weights(np.linspace(1, 0, 31))
    np.testing.assert_array_equal(table, np.broadcast_to(want, (30, 4, 2)))


def test_one_stage_takes_thirty_euler_steps_of_the_default_schedule():
    s = stage()
    assert s.solver == "euler"
    for numerics in ("exact", "reference"):
        want = schedules.ltx2(30, tokens=4096, numerics=numerics)
        np.testing.assert_array_equal(s.sigmas.table(LAYOUT, numerics), want)


def test_stg_skips_self_attention_of_one_layer():
    term = stage(stg_layer=3).terms[2]
    assert (term.layers, term.skip) == ((3,), Skip(video_self=True, audio_self=True))


@pytest.mark.parametrize(
    ("scale", "name"),
    [("identity", "identity"), ("stg", "stg"), ("bimodal", "bimodal")],
)
def test_a_scale_that_does_nothing_makes_its_term_absent(scale: str, name: str):
    rest = [n for n in names(stage()) if n != name]
    assert names(stage(**{scale: OFF[scale]})) == rest


def test_text_guidance_is_absent_only_if_off_for_both_modalities():
    assert "text" in names(stage(video_cfg=1))
    assert "text" in names(stage(audio_cfg=1))
    assert "text" not in names(stage(video_cfg=1, audio_cfg=1))


def test_with_everything_off_one_pass_is_left():
    s = stage(**OFF)
    assert s.terms == ()
    assert s.weights(np.linspace(1, 0, 5)).shape == (4, 0, 2)
    assert len(guidance.branches(s.terms, 48)) == 1


def test_without_a_reference_the_identity_term_is_absent():
    s = plans.without_reference(stage())
    assert names(s) == ["text", "stg", "bimodal"]
    assert s == dataclasses.replace(stage(identity=0))


def test_scales_are_no_part_of_a_term():
    """Terms key compiled stages, scales must not."""
    assert stage(audio_cfg=5, stg=2).terms == stage().terms


def test_adapters_keep_their_order_and_strength():
    assert stage(adapters={"b": 0.5, "a": 1}).adapters == (("b", 0.5), ("a", 1))


def test_plans_are_hashable_and_equal_by_value():
    assert hash(plans.one_stage()) == hash(plans.one_stage())
    assert plans.one_stage() == Plan((stage(),))


@pytest.mark.parametrize("name", plans.RECIPES)
def test_every_recipe_falls_from_one_to_zero(name: str):
    table = Sigmas(name, steps=10).table(LAYOUT)
    assert table[-1] == 0
    assert np.all(np.diff(table) < 0)


def test_tokens_may_be_counted_from_the_clip():
    table = Sigmas(steps=5, tokens=None).table(LAYOUT)
    np.testing.assert_array_equal(table, schedules.ltx2(5, tokens=3 * 2 * 3))
    with pytest.raises(ValueError, match="there is no video; give a number"):
        Sigmas(tokens=None).table(Layout(None, AudioGrid(4)))


def test_levels_of_ones_own_are_used_as_they_are():
    levels = plans.Levels((0.9, 0.5, 0.0))
    np.testing.assert_array_equal(levels.table(LAYOUT), np.float32([0.9, 0.5, 0.0]))
    assert levels.steps == 2


def test_a_solver_is_given_by_name_or_as_itself():
    own = solvers.euler()
    assert plans.solver_of(Stage("a", solver=own)) is own
    assert plans.solver_of(Stage("a", solver="res2s")).noisy


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="schedule 'cosine' is unknown, use one of"):
        Sigmas("cosine")
    with pytest.raises(ValueError, match="solver 'heun' is unknown, use one of"):
        Stage("a", solver="heun")


def test_every_term_needs_its_scale():
    with pytest.raises(ValueError, match="stage 'a' has 1 terms and 0 scales"):
        Stage("a", terms=(guidance.text_cfg(),))


def test_two_stages_are_the_published_ones():
    first, second = plans.two_stage(
        adapters={"id": 1.0}, refining={"distilled": 0.8}
    ).stages
    (alone,) = plans.one_stage(adapters={"id": 1.0}).stages
    assert first == dataclasses.replace(alone, name="first")
    assert second.refines and not second.terms and second.solver == "euler"
    assert second.adapters == (("distilled", 0.8),)
    levels = second.sigmas.table(LAYOUT)
    np.testing.assert_allclose(levels, [0.909375, 0.725, 0.421875, 0], rtol=1e-6)


def test_the_hq_plan_counts_tokens_and_scales_the_negative_prediction():
    first, second = plans.two_stage_hq().stages
    assert (first.solver, second.solver) == ("res2s", "res2s")
    assert (first.sigmas.steps, first.sigmas.tokens) == (15, None)
    assert [term.name for term in first.terms] == ["text", "identity", "bimodal"]
    assert first.terms[0].project == (guidance.star, guidance.star)
    (half, _) = plans.two_stage_hq(audio_star=False).stages
    assert half.terms[0].project == (guidance.star, None)
    assert second.refines and not second.terms


def test_the_distilled_plan_runs_one_pass_at_eight_levels():
    (stage,) = plans.distilled().stages
    assert not stage.terms and len(stage.sigmas.table(LAYOUT)) == 9
    (stage,) = plans.distilled(identity=3.0).stages
    assert [term.name for term in stage.terms] == ["identity"]


def test_a_plan_needs_a_first_stage_that_starts_from_noise():
    (_, second) = plans.two_stage().stages
    for stages in ((), (second,)):
        with pytest.raises(ValueError, match="first stage"):
            Plan(stages)
    with pytest.raises(TypeError, match="audio_cgf"):
        plans.one_stage(audio_cgf=2)


def test_a_window_switches_a_term_off_outside_of_it():
    s = stage(identity_window=(0.25, 0.8), text_window=(0.0, 0.5))
    table = s.weights(np.array([1.0, 0.8, 0.5, 0.2, 0.0]))
    np.testing.assert_array_equal(table[:, 1, 1], [0, 3, 3, 0])
    np.testing.assert_array_equal(table[:, 0], [[0, 0], [0, 0], [2, 6], [2, 6]])
    np.testing.assert_array_equal(table[:, 2:], stage().weights(np.ones(5))[:, 2:])
    assert s.terms == stage().terms


def test_any_function_of_the_noise_level_may_be_a_scale():
    s = stage(identity=lambda sigma: 4 * sigma, identity_window=(0.3, 1.0))
    table = s.weights(np.array([1.0, 0.5, 0.25, 0.0]))
    np.testing.assert_array_equal(table[:, 1], [[0, 4], [0, 2], [0, 0]])


def test_a_window_of_a_term_that_is_off_leaves_it_off():
    assert names(stage(identity=0, identity_window=(0.2, 0.4))) == names(
        stage(identity=0)
    )


def test_text_guidance_may_be_projected_and_rescaled():
    s = stage(apg=True, apg_eta=0.5, apg_norm=8, apg_momentum=-0.5, audio_rescale=0.7)
    text = s.terms[0]
    assert text.project == guidance.Apg(0.5, 8) and text.momentum == -0.5
    assert s.rescale == (0.0, 0.7) and stage().rescale is None
    assert stage(apg=True).terms[0].project == guidance.Apg(1.0, None)


def test_the_configurations_guidance_is_that_of_the_plans():
    ours = {f.name: f.default for f in dataclasses.fields(plans.Scales)}
    theirs = {f.name: f.default for f in dataclasses.fields(Guidance)}
    assert ours == theirs

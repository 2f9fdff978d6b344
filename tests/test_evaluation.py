"""The fixed evaluation: levels, and how much an adapter does."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training as toy

from idlora_jax import evaluation, experiment, strategies
from idlora_jax.types import AV

SIGMAS = jnp.asarray(experiment.HeldOut().sigmas)
BATCH = toy.batch(9)
NOISE = strategies.draw(jax.random.key(1), BATCH, toy.SPEC).noise
FIXED = toy.base(), BATCH, SIGMAS, NOISE


def moved(size: float) -> Any:
    """An adapter that changes both modalities, the audio twice as much."""
    made = toy.adapter()
    for name, factor in (("video", 1.0), ("audio", 2.0)):
        pair = made["blocks"][name]["ff"]["up"]["kernel"]
        pair["b"] = jnp.full_like(pair["b"], factor * size)
    return made


@pytest.fixture(scope="module")
def evaluate() -> evaluation.Evaluation:
    return evaluation.make_evaluate(toy.task())


def test_the_losses_are_means_over_the_fixed_levels(evaluate: evaluation.Evaluation):
    alone = []
    for n in range(8):
        args = toy.base(), BATCH, SIGMAS[n : n + 1], NOISE
        alone.append(evaluate(moved(0.1), *args)["loss"])
    found = evaluate(moved(0.1), *FIXED)
    np.testing.assert_allclose(found["loss"], np.mean(alone), rtol=1e-5)
    levels = found["video_loss_levels"] + found["audio_loss_levels"]
    np.testing.assert_allclose(levels, alone, rtol=1e-5)


def test_an_adapter_of_zeros_does_exactly_nothing(evaluate: evaluation.Evaluation):
    without = evaluate.without(moved(0.5), *FIXED)
    found = evaluate(toy.adapter(1), *FIXED, without)
    assert found["adapter_effect_video"] == found["adapter_effect_audio"] == 0


def test_without_is_what_a_base_alone_predicts(evaluate: evaluation.Evaluation):
    without = evaluate.without(moved(0.5), *FIXED)
    kernel = toy.base()["blocks"]["video"]["ff"]["up"]["kernel"][0]
    noisy = []
    for level in SIGMAS:
        first = jnp.ones(2, bool)
        sigma = jnp.full(2, level)
        draws = strategies.Draws(first, AV(sigma, sigma), NOISE)
        inputs = strategies.prepare(draws, BATCH, toy.SPEC)
        noisy.append(inputs.streams.video.x)
    text = 0.01 * jnp.mean(BATCH.prompt.video)
    want = jnp.stack(noisy) @ kernel + text
    np.testing.assert_allclose(without.video, want, atol=1e-5)


def test_the_effect_is_the_relative_change_of_each_modality(
    evaluate: evaluation.Evaluation,
):
    without = evaluate.without(moved(0.0), *FIXED)
    small = evaluate(moved(1e-3), *FIXED, without)
    large = evaluate(moved(3e-3), *FIXED, without)
    for name in ("video", "audio"):
        effect = f"adapter_effect_{name}"
        # The toy is linear in b.
        np.testing.assert_allclose(large[effect], 3 * small[effect], rtol=1e-3)
    now = evaluate.velocities(moved(3e-3), *FIXED)
    # All audio targets count in the loss, the references are no targets.
    assert now.audio.shape == (8, *NOISE.audio.shape)
    change = np.linalg.norm(now.audio - without.audio) / np.linalg.norm(without.audio)
    np.testing.assert_allclose(large["adapter_effect_audio"], change, rtol=1e-5)
    # The first frame is given, so that its tokens do not count.
    after = [np.asarray(x.video)[:, :, 2:] for x in (now, without)]
    change = np.linalg.norm(after[0] - after[1]) / np.linalg.norm(after[1])
    np.testing.assert_allclose(large["adapter_effect_video"], change, rtol=1e-5)


def test_padding_does_not_count_in_the_effect(evaluate: evaluation.Evaluation):
    lengths = jnp.asarray([2, 5], jnp.int32)
    spec = dataclasses.replace(toy.SPEC, name="text_to_video")
    evaluate = evaluation.make_evaluate(toy.task(spec=spec))
    effects = []
    for filler in (0.0, 9.0):
        audio = BATCH.audio.at[0, 2:].set(filler)
        batch = BATCH._replace(audio=audio, audio_length=lengths, reference=None)
        given = toy.base(), batch, SIGMAS, NOISE
        without = evaluate.without(moved(0.0), *given)
        found = evaluate(moved(1e-2), *given, without)
        effects.append(found["adapter_effect_audio"])
    assert effects[0] == effects[1] > 0


def test_without_sound_there_is_no_effect_on_it():
    spec = dataclasses.replace(toy.SPEC, name="text_to_video", with_audio=False)
    evaluate = evaluation.make_evaluate(toy.task(spec=spec))
    given = toy.base(), BATCH, SIGMAS, AV(NOISE.video, None)
    found = evaluate(moved(1e-2), *given, evaluate.without(moved(0.0), *given))
    assert found["adapter_effect_video"] > 0
    assert "adapter_effect_audio" not in found

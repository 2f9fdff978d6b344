"""Errors of weights in int8, of kernels and of a whole sample of both generations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import small_transformer as small
from small_transformer import GRID, SOUND, draw, prompt
from test_hosted import in_int8

from idlora_jax import pipeline, plans, quality, quantized
from idlora_jax.pipeline import Request
from idlora_jax.trajectories import Recorder
from idlora_jax.types import AV, Layout, Tree

STEPS = 8
LAYOUT = Layout(GRID, SOUND)


class Seen(NamedTuple):
    latents: AV


def test_an_error_is_relative_to_the_size_of_what_is_right():
    want = np.array([3.0, 4.0])
    assert quality.relative(want * 1.01, want) == pytest.approx(0.01)
    assert quality.relative(want * -1, want) == pytest.approx(2)
    assert quality.relative(np.zeros(2), np.zeros(2)) == 0


def test_steps_are_compared_one_by_one_and_modality_by_modality():
    one = [Seen(AV(np.full(3, 1.0), None)), Seen(AV(np.full(3, 2.0), None))]
    two = [Seen(AV(np.full(3, 1.0), None)), Seen(AV(np.full(3, 1.0), None))]
    assert quality.steps(one, two) == [AV(0.0, None), AV(1.0, None)]
    with pytest.raises(ValueError, match="zip"):
        quality.steps(one, two[:1])


def test_kernels_are_as_wrong_as_rounding_to_127_steps_of_the_largest_makes_them():
    """Of normal values, the error is largest / (127 sqrt(12)) of a channel."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(2, 1024, 64)).astype(np.float32)
    plain = {"blocks": {"ff": {"kernel": normal, "bias": normal[:, 0]}}}
    blocks = in_int8(plain)
    found = quality.kernels(plain, blocks)
    largest = np.sqrt((np.abs(normal).max(axis=1) ** 2).mean())
    want = largest / 127 / math.sqrt(12)
    assert found == {"ff": pytest.approx(want, rel=0.02)}
    assert not quality.kernels(plain, plain)


def sampled(generation: Any, base: Tree) -> Recorder:
    """Every step of a sample with all terms of guidance."""
    stage = plans.one_stage(steps=STEPS, stg_layer=1).stages[0]
    voice = draw(30, 1, 3, 16, 8)
    request = Request((prompt(generation), prompt(generation, 5)), (voice,))
    recorder, cfg = Recorder(), small.config(generation)
    args = (stage, cfg, {"params": base}, request, jax.random.key(0))
    pipeline.sample(*args, layout=LAYOUT, watch=recorder)
    return recorder


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_a_sample_with_int8_stays_close_to_the_plain_one(generation: Any):
    plain = small.base(generation)
    narrow = in_int8(plain)
    assert max(quality.kernels(plain, narrow).values()) < 0.01
    args = (sampled(generation, base).steps for base in (narrow, plain))
    errors = quality.steps(*args)
    assert len(errors) == STEPS and quantized.any_in(narrow)
    print(generation, [f"{e.video:.2g} {e.audio:.2g}" for e in errors])
    for error in errors:
        assert 0 < error.video < 0.05 and 0 < error.audio < 0.05

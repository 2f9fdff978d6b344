"""One step of LoRA training, with what the backward pass keeps of the forward pass."""

from __future__ import annotations

from typing import cast

import jax

from benchmarks import cases
from benchmarks.backends import diffusers, reference, reference_training
from benchmarks.backends import jax as jax_backend
from benchmarks.backends import jax_training as ours
from benchmarks.rows import Row
from benchmarks.session import Session, Weights
from benchmarks.works import NotRun, Work
from idlora_jax import training
from idlora_jax.weights import lora


def remats(asked: tuple[str, ...]) -> tuple[ours.Remat, ...]:
    """The policies that are measured.

    Raises:
        ValueError: for a name that is none.
    """
    unknown = [name for name in asked if name not in ours.REMATS]
    if unknown:
        raise ValueError(f"--variants: got {unknown}, expected some of {ours.REMATS}")
    return cast(tuple[ours.Remat, ...], asked) or ("full", "selective")


def theirs(case: cases.TrainCase, weights: Weights) -> Work:
    """The reference's step, from the same adapter, batch and noise.

    Raises:
        NotRun: if it cannot be run here.
    """
    inputs = training.inputs_of(ours.task(case, "full"), case.draws, case.batch)
    adapter = jax.device_get(ours.adapter(case, weights.base))
    model = weights.models[reference.NAME]
    args = (case, model, inputs.streams, inputs.velocity, lora.export(adapter))
    return reference_training.train(*args)


def run(session: Session) -> list[Row]:
    """Rows of the reference and of ours; without it ratios are to our first."""
    options = session.options
    chosen = remats(options.variants)
    weights = Weights(options)
    missing = dict(weights.missing)
    there = reference.NAME in weights.models
    blind = "fused" if there else "softmax"
    case = cases.training(options.size, options.generation, blind_gradient=blind)
    works: list[Work] = []
    if there:
        try:
            works.append(theirs(case, weights))
        except NotRun as error:
            missing[reference.NAME] = str(error)
    if diffusers.NAME in options.backends:
        missing[diffusers.NAME] = "it has no training step"
    if jax_backend.NAME in options.backends:
        works += [ours.train(case, weights.base, remat) for remat in chosen]
    return session.not_run(missing, "checkpoint") + session.compare(works)

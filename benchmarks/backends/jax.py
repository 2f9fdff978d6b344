"""Ours, through the library's public functions. Everything that depends on how these
are called stands here, so that a change of the library is followed in one place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import programs
from benchmarks.cases import Case
from benchmarks.works import Outputs, Work
from idlora_jax import denoise, guidance, pipeline, schedules, solvers
from idlora_jax.denoise import Mode
from idlora_jax.guidance import Term
from idlora_jax.model import transformer
from idlora_jax.types import AV, Branch, Tree, each

NAME = "jax"
SCALES = {"text": (3, 7), "identity": (0, 3), "stg": (1, 1), "bimodal": (3, 3)}
"""Of the measured guided step, for video and audio."""

Variant = Literal["sweep", "batch", "pair", "separate", "five passes"]
VARIANTS: tuple[Variant, ...] = ("sweep", "batch", "separate", "five passes")


def terms(layer: int) -> tuple[Term, ...]:
    """The guidance of the measured step; `layer` is the one that STG skips."""
    return (
        guidance.text_cfg(),
        guidance.identity(),
        guidance.stg([layer]),
        guidance.bimodal(),
    )


def weights(own: tuple[Term, ...]) -> np.ndarray:
    """[terms 2], of one step."""
    return np.asarray(guidance.weights(own, SCALES, 1)[0])


def arrays(pair: AV) -> Outputs:
    """Results to be compared."""
    return {"video": np.asarray(pair.video), "audio": np.asarray(pair.audio)}


def dtype_of(base: Tree) -> Any:
    """What the transformer computes in."""
    return base["blocks"]["video"]["ff"]["up"]["kernel"].dtype


def network(case: Case, base: Tree, **options: Any) -> Any:
    """The transformer as sampling takes it; options are of `transformer.apply`."""
    if options:
        return transformer.bind(case.cfg, **options)
    return pipeline.network(case.cfg, jnp.dtype(dtype_of(base)).name)


def prepare(case: Case, variables: Mapping[str, Tree]) -> Any:
    """Rotary tables and projected prompts."""
    return transformer.prepare(case.cfg, variables, case.streams, case.prompts)


def prepared(case: Case, variables: Mapping[str, Tree]) -> Any:
    """The same, made once and compiled; of shapes, their shapes."""
    make = lambda v: prepare(case, v)
    abstract = isinstance(jax.tree.leaves(variables)[0], jax.ShapeDtypeStruct)
    if abstract:
        return jax.eval_shape(make, variables)
    return jax.block_until_ready(jax.jit(make)(variables))


def levels(case: Case) -> AV:
    """Noise levels, [B] each."""
    return AV(*(jnp.full(s.x.shape[:1], case.sigma, jnp.float32) for s in case.streams))


def forward_call(case: Case, base: Tree, **options: Any) -> programs.Call:
    """One pass: the function, and the arguments it is called with.

    Args:
        case: what of.
        base: weights, or their `shapes`.
        options: of `transformer.apply`.
    """
    variables, dtype = {"params": base}, dtype_of(base)

    def run(variables: Any, prepared: Any, streams: AV, sigma: AV) -> AV:
        cast = each(lambda s: s._replace(x=s.x.astype(dtype)), streams)
        args = (case.cfg, variables, prepared, cast, sigma)
        return transformer.apply(*args, targets=case.targets, **options)[0]

    args = (variables, prepared(case, variables), case.streams, levels(case))
    return programs.Call(run, args)


def forward(case: Case, base: Tree, **options: Any) -> Work:
    """One pass with the positive prompt: velocities of all tokens."""
    call = forward_call(case, base, **options)
    program = programs.build(*call)
    run = lambda: jax.block_until_ready(program.call(*call.args))
    return Work("pass", NAME, run, arrays, program.facts)


def denoiser(
    case: Case, base: Tree, mode: Mode = "sweep", *, plain: bool = False, **options: Any
) -> Any:
    """The guided prediction as sampling makes it; a pytree of its arrays.

    Args:
        case: what of.
        base: weights, or their `shapes`.
        mode: how branches are laid out.
        plain: without guidance, as in a second stage.
        options: of `transformer.apply`.
    """
    variables = {"params": base}
    return denoise.make_denoiser(
        network(case, base, **options),
        variables,
        prepared(case, variables),
        () if plain else terms(case.size.stg),
        case.targets,
        depth=case.cfg.layers,
        branches=mode,
    )


def sampler(
    case: Case, base: Tree, steps: int, *, plain: bool = False, **options: Any
) -> Any:
    """Sampling from noise by so many guided steps: call it for the streams at the end.

    Args:
        case: what of; its tokens are the noise.
        base: weights.
        steps: of the published schedule, by Euler.
        plain: without guidance.
        options: see `denoiser`.
    """
    predict = denoiser(case, base, plain=plain, **options)
    sigmas, own = schedules.ltx2(steps), () if plain else terms(case.size.stg)
    table = guidance.weights(own, {t.name: SCALES[t.name] for t in own}, steps)
    run = functools.partial(denoise.sample, predict, solvers.euler(), sigmas)
    return lambda: jax.block_until_ready(run(case.streams, weights=table))


def guided(predict: Any, streams: AV, sigma: Any, weights: Any) -> AV:
    """The clean prediction of one step."""
    return predict(streams, sigma, weights, ())[0]


def step_call(
    case: Case, base: Tree, mode: Mode = "sweep", **options: Any
) -> programs.Call:
    """One guided step, and the arguments it is called with; see `step`."""
    made = denoiser(case, base, mode, **options)
    table = weights(terms(case.size.stg))
    args = (made, case.streams, np.float32(case.sigma), table)
    return programs.Call(guided, args)


def step(case: Case, base: Tree, variant: Variant = "sweep", **options: Any) -> Work:
    """The guided prediction of one step: five passes and their sum.

    Args:
        case: what of.
        base: weights.
        variant: `sweep`, `pair`, `batch`: how the sampler lays out its branches;
            `separate`: five calls of one branch that share tables and prompts;
            `five passes`: the same, and each makes these again.
        options: of `transformer.apply`.
    """
    if variant in ("separate", "five passes"):
        shared = variant == "separate"
        return _separate(case, base, shared, variant, **options)
    call = step_call(case, base, variant, **options)
    program = programs.build(*call)
    run = lambda: jax.block_until_ready(program.call(*call.args))
    return Work(variant, NAME, run, arrays, program.facts)


def _separate(
    case: Case, base: Tree, shared: bool, variant: str, **options: Any
) -> Work:
    own, variables = terms(case.size.stg), {"params": base}
    branches = guidance.branches(own, case.cfg.layers)
    bound = network(case, base, **options)
    made = prepared(case, variables)

    def one(branch: Branch, variables: Any, made: Any, streams: AV, s: Any) -> AV:
        if not shared:
            made = prepare(case._replace(streams=streams), variables)
        args = (bound, variables, made, streams, s, (branch,))
        return denoise.predict(*args, targets=case.targets)[0]

    def fold(x0: tuple[AV, ...], table: Any) -> AV:
        return guidance.combine(x0, table)

    args = (variables, made, case.streams, np.float32(case.sigma))
    passes = [programs.build(functools.partial(one, b), args) for b in branches]
    table = weights(own)
    found = tuple(p.call(*args) for p in passes)
    last = programs.build(fold, (found, table))

    def run() -> AV:
        return jax.block_until_ready(
            last.call(tuple(p.call(*args) for p in passes), table)
        )

    return Work(variant, NAME, run, arrays, programs.together(*passes, last))

"""Ours, through the library's public functions. Everything that depends on how these
are called stands here, so that a change of the library is followed in one place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import programs
from benchmarks.cases import Case, TrainCase
from benchmarks.programs import Program
from benchmarks.works import Outputs, Work
from idlora_jax import (
    adapters,
    denoise,
    experiment,
    guidance,
    optimizers,
    training,
)
from idlora_jax.config import AUDIO_TARGETS, TransformerConfig
from idlora_jax.denoise import Mode
from idlora_jax.guidance import Term
from idlora_jax.model import transformer
from idlora_jax.optimizer_config import Optimizer
from idlora_jax.types import AV, Adapter, Branch, Tree
from idlora_jax.weights import lora

NAME = "jax"
SCALES = {"text": (3, 7), "identity": (0, 3), "stg": (1, 1), "bimodal": (3, 3)}
"""Of the measured guided step, for video and audio."""
STEPS = 1000
"""Updates over which the learning rate of the measured training falls."""

Variant = Literal["sweep", "batch", "pair", "separate", "five passes"]
VARIANTS: tuple[Variant, ...] = ("sweep", "batch", "separate", "five passes")
Remat = Literal["none", "selective", "full"]
REMATS: tuple[Remat, ...] = ("full", "selective", "none")


def random_base(cfg: TransformerConfig, dtype: Any = jnp.float32) -> Tree:
    """Weights where nobody else makes them: as `init` does, tables of deviation 0.1."""

    @jax.jit
    def make(key: Any) -> Tree:
        def one(path: Any, leaf: Any) -> Any:
            name = path[-1].key
            if name.endswith("table"):
                seed = hash_of(jax.tree_util.keystr(path))
                noise = jax.random.normal(jax.random.fold_in(key, seed), leaf.shape)
                leaf = 0.1 * noise
            return leaf.astype(dtype)

        return jax.tree_util.tree_map_with_path(one, transformer.init(cfg, key))

    return make(jax.random.key(0))


def hash_of(text: str) -> int:
    """A number that is the same in every run (Python's own hash of text is not)."""
    return sum((n + 1) * ord(c) for n, c in enumerate(text)) % 2**31


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


def prepare(case: Case, variables: Mapping[str, Tree]) -> Any:
    """Rotary tables and projected prompts, made once."""
    return transformer.prepare(case.cfg, variables, case.streams, case.prompts)


def levels(case: Case) -> AV:
    """Noise levels, [B] each."""
    return AV(*(jnp.full(s.x.shape[:1], case.sigma, s.x.dtype) for s in case.streams))


def forward_program(case: Case, base: Tree, **options: Any) -> tuple[Program, Any]:
    """One pass, and the arguments it is called with."""
    variables = {"params": base}
    prepared = jax.block_until_ready(jax.jit(lambda v: prepare(case, v))(variables))

    def run(variables: Any, prepared: Any, streams: AV, sigma: AV) -> AV:
        args = (case.cfg, variables, prepared, streams, sigma)
        return transformer.apply(*args, targets=case.targets, **options)[0]

    args = (variables, prepared, case.streams, levels(case))
    return programs.build(run, *args), args


def forward(case: Case, base: Tree, **options: Any) -> Work:
    """One pass with the positive prompt: velocities of all tokens."""
    program, args = forward_program(case, base, **options)
    run = lambda: jax.block_until_ready(program.call(*args))
    return Work("pass", NAME, run, arrays, program.facts)


def denoiser(case: Case, base: Tree, mode: Mode, **options: Any) -> Any:
    """The guided prediction as sampling makes it; a pytree of its arrays."""
    variables = {"params": base}
    prepared = jax.block_until_ready(jax.jit(lambda v: prepare(case, v))(variables))
    return denoise.make_denoiser(
        transformer.bind(case.cfg, **options),
        variables,
        prepared,
        terms(case.size.stg),
        case.targets,
        depth=case.cfg.layers,
        branches=mode,
    )


def guided(predict: Any, streams: AV, sigma: Any, weights: Any) -> AV:
    """The clean prediction of one step."""
    return predict(streams, sigma, weights, ())[0]


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
    made = denoiser(case, base, variant, **options)
    table = weights(terms(case.size.stg))
    args = (made, case.streams, np.float32(case.sigma), table)
    program = programs.build(guided, *args)
    run = lambda: jax.block_until_ready(program.call(*args))
    return Work(variant, NAME, run, arrays, program.facts)


def _separate(
    case: Case, base: Tree, shared: bool, variant: str, **options: Any
) -> Work:
    own, variables = terms(case.size.stg), {"params": base}
    branches = guidance.branches(own, case.cfg.layers)
    bound = transformer.bind(case.cfg, **options)
    prepared = jax.block_until_ready(jax.jit(lambda v: prepare(case, v))(variables))

    def one(branch: Branch, variables: Any, prepared: Any, streams: AV, s: Any) -> AV:
        if not shared:
            prepared = prepare(case._replace(streams=streams), variables)
        args = (bound, variables, prepared, streams, s, (branch,))
        return denoise.predict(*args, targets=case.targets)[0]

    def fold(x0: tuple[AV, ...], table: Any) -> AV:
        return guidance.combine(x0, table)

    args = (variables, prepared, case.streams, np.float32(case.sigma))
    passes = [programs.build(functools.partial(one, b), *args) for b in branches]
    table = weights(own)
    found = tuple(p.call(*args) for p in passes)
    last = programs.build(fold, found, table)

    def run() -> AV:
        return jax.block_until_ready(
            last.call(tuple(p.call(*args) for p in passes), table)
        )

    return Work(variant, NAME, run, arrays, programs.together(*passes, last))


def adapter(case: TrainCase, base: Tree) -> Adapter:
    """Of ID-LoRA's modules; b is not zero, so that a has gradients, too."""
    rng = np.random.default_rng(1)
    made = adapters.init(jax.random.key(0), base, case.size.rank, AUDIO_TARGETS)

    def one(path: Any, leaf: Any) -> Any:
        if path[-1].key == "a":
            return leaf
        return jnp.asarray(0.02 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, made)


def task(case: TrainCase, remat: Remat, dtype: Any = jnp.float32) -> training.Task:
    """The published training mode at alpha = rank."""
    strategy = experiment.Strategy(sigma=case.cfg.generation)
    bound = transformer.bind(case.cfg, remat=remat)
    prepare = functools.partial(transformer.prepare, case.cfg)
    return training.Task(bound, prepare, strategy, dtype=dtype)


def optimizer() -> Any:
    """The published one."""
    return optimizers.make_optimizer(Optimizer(), STEPS)


def train_program(
    case: TrainCase, base: Tree, remat: Remat, dtype: Any = jnp.float32
) -> tuple[Program, Any]:
    """One training step, and the state it starts from; states are written over."""
    tx = optimizer()
    state = training.init(adapter(case, base), base, tx)
    made = training.make_train_step(task(case, remat, dtype), tx, jax.random.key(0))
    return programs.build(made, state, base, case.batch, case.draws), state


def train(case: TrainCase, base: Tree, remat: Remat = "full") -> Work:
    """One step of LoRA training, the optimizer's update included.

    Compared are the loss and, as the first moment that AdamW keeps of it, the gradient
    (clipped, times 0.1). Every run goes on from the state of the last one.
    """
    program, state = train_program(case, base, remat)
    held = [state]

    def run() -> Any:
        held[0], metrics = program.call(held[0], base, case.batch, case.draws)
        return jax.block_until_ready((metrics, held[0]))

    return Work(f"remat {remat}", NAME, run, _trained, program.facts)


def _trained(done: Any) -> Outputs:
    metrics, state = done
    moment = optax.tree.get(state.opt_state, "mu")
    tensors = lora.export(jax.tree.map(jnp.asarray, moment))
    return gradient_outputs(metrics["loss"], tensors)


def gradient_outputs(loss: Any, moments: Mapping[str, Any]) -> Outputs:
    """Loss and first moments, one array, in the order of the original keys."""
    flat = [np.ravel(np.asarray(moments[name])) for name in sorted(moments)]
    return {"loss": np.asarray(loss), "gradient": np.concatenate(flat)}



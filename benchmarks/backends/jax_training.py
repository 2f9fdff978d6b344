"""Our training step, as the library ships it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import programs
from benchmarks.backends.jax import NAME
from benchmarks.cases import TrainCase
from benchmarks.works import Outputs, Work
from idlora_jax import adapters, experiment, optimizers, training
from idlora_jax.config import AUDIO_TARGETS
from idlora_jax.model import transformer
from idlora_jax.optimizer_config import Optimizer
from idlora_jax.types import Adapter, Tree
from idlora_jax.weights import lora

STEPS = 1000
"""Updates over which the learning rate of the measured training falls."""

Remat = Literal["none", "selective", "full"]
REMATS: tuple[Remat, ...] = ("full", "selective", "none")


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


def train_call(
    case: TrainCase, base: Tree, remat: Remat, dtype: Any = jnp.float32
) -> programs.Call:
    """One training step, and its arguments; the state, the first, is written over.

    Args:
        case: the batch.
        base: weights, or their shapes.
        remat: what the backward pass keeps.
        dtype: of the computation.
    """
    tx = optimizer()  # reads its schedule: not while something is traced
    start = lambda base: training.init(adapter(case, base), base, tx)
    abstract = isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct)
    state = jax.eval_shape(start, base) if abstract else start(base)
    made = training.make_train_step(task(case, remat, dtype), tx, jax.random.key(0))
    return programs.Call(made, (state, base, case.batch, case.draws))


def train(
    case: TrainCase, base: Tree, remat: Remat = "full", dtype: Any = jnp.float32
) -> Work:
    """One step of LoRA training, the optimizer's update included.

    Compared are the loss and, as the first moment that AdamW keeps of it, the gradient
    (clipped, times 0.1). Every run goes on from the state of the last one.
    """
    call = train_call(case, base, remat, dtype)
    program, held = programs.build(*call), [call.args[0]]

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

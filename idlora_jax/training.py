"""One training step.

    loss = mse(velocity of the video's unfixed tokens)
         + audio_weight * mse(velocity of the audio's target tokens)

is differentiated with respect to the adapter alone: the base is another argument, so
that freezing needs no mask and no gradient of it exists. In mode "full" the base itself
stands in the adapter's place, and there is nothing frozen. A step reads its batch, in
`accumulation` parts one after the other (`accumulation`); part n of a step draws from
`fold_in(key, step * accumulation + n)`. The state after some steps is so a function of
the seed: stopping and resuming changes nothing.

The model is two functions that `model.transformer` binds to a configuration:
`apply(variables, prepared, streams, sigma, branches, targets=...)` gives velocities and
`prepare(variables, streams, prompts)` gives rope tables and projected prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from idlora_jax import (
    accumulation,
    adapters,
    experiment,
    geometry,
    losses,
    norms,
    optimizers,
    programs,
    shares,
    strategies,
)
from idlora_jax.strategies import Batch, Draws, TrainInputs
from idlora_jax.types import AV, Adapter, Numerics, Tree, each

Apply = Callable[..., tuple[AV, ...]]
Prepare = Callable[..., Any]
Metrics = dict[str, Array]
Real = float | int
_DROPOUT = 1
"""Folded into a step's key: draws split that key, dropout has another."""


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
        adapter: unscaled, float32; in mode "full" the base's parameters.
        opt_state: of the optimizer (`optimizers`), its averages included.
        step: number of steps taken, those that were not finite too.
    """

    adapter: Adapter
    opt_state: Any
    step: Int[Array, ""]

    @property
    def evaluated(self) -> Adapter:
        """What to evaluate and to export; see `optimizers.evaluated`."""
        return optimizers.evaluated(self.opt_state, self.adapter)

    @property
    def ema(self) -> Adapter | None:
        """The moving average, or None where none is kept."""
        return optimizers.averaged(self.opt_state)


Step = Callable[..., tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Task:
    """What is trained: the transformer's two functions and the training mode.

    Attributes:
        apply: see the module.
        prepare: see the module.
        spec: the training mode.
        fps: of clips whose batch does not say it.
        scale: alpha / rank, folded into the adapter inside the loss; or a function of
            a module's path and rank (`Lora.factor`).
        dtype: of the computation; the loss is float32.
        numerics: see `geometry.positions`; `prepare` has its own.
        rounding: of all positions, see there.
        dropout: probability that an input of the adapter is left out in a step.
        mode: what the state holds: an adapter, or the base itself. For the latter give
            `apply` the option `scanned=("params",)`: gradients stack, not scatter.
        accumulation: parts of a batch that a step takes one after the other; the
            gradient is the mean of theirs.
    """

    apply: Apply
    prepare: Prepare
    spec: experiment.Strategy
    fps: Real = 25.0
    scale: adapters.Factor = 1.0
    dtype: Any = jnp.float32
    numerics: Numerics = "exact"
    rounding: geometry.Rounding | None = None
    dropout: float = 0.0
    mode: Literal["lora", "full"] = "lora"
    accumulation: int = 1


def init(
    adapter: Adapter,
    base: Tree,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
        adapter: what is trained.
        base: what it must fit; empty where the base itself is trained.
        tx: from `optimizers.make_optimizer`.
        mesh: devices that it is divided over, see `shares`.

    Raises:
        ValueError: if the adapter does not fit the base; the forward pass would ignore
            what it does not know.
    """
    if base:
        adapters.check(adapter, base)

    def start(adapter: Adapter) -> TrainState:
        return TrainState(adapter, tx.init(adapter), jnp.zeros((), jnp.int32))  # pyright: ignore

    return shares.made(start, mesh, adapter)


def _cast(inputs: TrainInputs, dtype: Any) -> TrainInputs:
    """Tokens and prompts in the dtype of the computation."""
    tokens = each(lambda s: s._replace(x=s.x.astype(dtype)), inputs.streams)
    text = inputs.prompt
    text = text._replace(**each(lambda t: t.astype(dtype), AV(*text[:2]))._asdict())
    return inputs._replace(streams=tokens, prompt=text)


def _variables(
    task: Task, base: Tree, adapter: Adapter, key: PRNGKeyArray | None
) -> dict[str, Tree]:
    if task.mode == "full":
        return {"params": adapter}
    lora = adapters.scale(adapter, task.scale)
    if key is not None and task.dropout > 0:
        lora = adapters.with_dropout(lora, key, task.dropout)
    return {"params": base, "lora": lora}


def predict(
    task: Task,
    base: Tree,
    adapter: Adapter,
    inputs: TrainInputs,
    tables: Any = None,
    *,
    key: PRNGKeyArray | None = None,
) -> AV:
    """Velocities of all tokens, AV of [B T C].

    Args:
        task: what is trained.
        base: its parameters; empty in mode "full".
        adapter: unscaled; in mode "full" the parameters.
        inputs: from `strategies.prepare`.
        tables: `prepare(variables, streams, ())` of the same positions, where known.
        key: of dropout; None: nothing is left out.
    """
    variables = _variables(task, base, adapter, key)
    inputs = _cast(inputs, task.dtype)
    if tables is None:
        tables = task.prepare(variables, inputs.streams, ())
    text = task.prepare(variables, AV(None, None), (inputs.prompt,))
    return task.apply(
        variables,
        tables._replace(prompts=text.prompts),
        inputs.streams,
        inputs.sigma,
        (strategies.branch(task.spec),),
        targets=strategies.targets(inputs),
    )[0]


def loss(
    task: Task,
    base: Tree,
    adapter: Adapter,
    inputs: TrainInputs,
    tables: Any = None,
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss and its two parts, in float32; see `predict` for the arguments.

    Source: ltx_trainer/training_strategies/audio_ref_only_ic.py: compute_loss.
    """
    pred = predict(task, base, adapter, inputs, tables, key=key)
    return loss_of(task, pred, inputs)


def loss_of(
    task: Task, pred: AV, inputs: TrainInputs
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of velocities, AV of [B T C], whose first tokens are the targets."""
    parts = each(
        lambda p, v, mask: losses.masked_mse(p[:, : v.shape[1]], v, mask),
        pred,
        inputs.velocity,
        inputs.mask,
    )
    audio = jnp.zeros(()) if parts.audio is None else parts.audio
    total = parts.video + task.spec.audio_weight * audio
    return total, {"loss": total, "video_loss": parts.video, "audio_loss": audio}


def inputs_of(task: Task, draws: Draws, batch: Batch) -> TrainInputs:
    """What a batch becomes by given draws."""
    how = {"numerics": task.numerics, "rounding": task.rounding}
    fps = task.fps if batch.rate is None else batch.rate.fps
    return strategies.prepare(draws, batch, task.spec, fps=fps, **how)


def seen(
    task: Task,
    key: PRNGKeyArray,
    count: Int[Array, ""],
    batch: Batch,
    draws: Draws | None = None,
) -> tuple[TrainInputs, PRNGKeyArray]:
    """What is made of a batch, or of a part of one, and the key of its dropout.

    Args:
        task: what is trained.
        key: the run's key.
        count: number of parts of batches seen before.
        batch: the clips.
        draws: in place of those of `fold_in(key, count)`.
    """
    at = jax.random.fold_in(key, count)
    if draws is None:
        draws = strategies.draw(at, batch, task.spec)
    return inputs_of(task, draws, batch), jax.random.fold_in(at, _DROPOUT)


def gradients(
    task: Task,
    key: PRNGKeyArray,
    state: TrainState,
    base: Tree,
    batch: Batch,
    draws: Draws | None = None,
    tables: Any = None,
    places: Any = None,
) -> tuple[Tree, Metrics]:
    """The gradient of what is trained, and the losses: means over the batch's parts.

    Args:
        task: what is trained.
        key: the run's key.
        state: before the step.
        base: what is frozen.
        batch: the clips of all parts.
        draws: of all of them, in place of those that follow from the key.
        tables: see `predict`.
        places: where the arrays of the gradient lie; None: anywhere.

    Returns:
        A tree of the adapter's structure and float32 losses.

    Raises:
        ValueError: if the batch cannot be divided into parts of equal size.

    Source: ltx_trainer/trainer.py: the accumulating loop (mean of the losses).
    """
    count = task.accumulation
    parts, before = accumulation.split((batch, draws), count), state.step * count

    def one(number: Any, part: Any) -> tuple[Tree, Metrics]:
        inputs, left_out = seen(task, key, before + number, *part)

        def of(adapter: Adapter) -> tuple[Array, Metrics]:
            return loss(task, base, adapter, inputs, tables, key=left_out)

        return jax.grad(of, has_aux=True)(state.adapter)

    def keep(found: tuple[Tree, Metrics]) -> tuple[Tree, Metrics]:
        if places is None:
            return found
        return jax.lax.with_sharding_constraint(found[0], places), found[1]

    return accumulation.mean(one, count, parts, keep)


def _if(ok: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


def _sizes(task: Task, adapter: Adapter) -> Metrics:
    """How large what is trained is, by group."""
    if task.mode == "full":
        return norms.of_tree(adapter, "weight_norm")
    return norms.of_change(adapters.scale(adapter, task.scale), "adapter_norm")


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    places: TrainState | None = None,
) -> Step:
    """Build the jitted `step(state, base, batch, draws=None, tables=None)`.

    It returns the next state (the given one is donated) and float32 metrics: loss,
    video_loss, audio_loss, grad_norm (before clipping) and skipped, which is 1 where
    the loss or a gradient was not finite. Such a step counts but changes nothing else.
    `grad_norm/GROUP` and `adapter_norm/GROUP` (or `weight_norm/GROUP` in mode "full")
    are those of groups of modules, see `norms`.

    Args:
        task: what is trained.
        tx: from `optimizers.make_optimizer`.
        key: the run's key, which all draws follow from where no `draws` are given.
        places: where the arrays of a state lie (`shares.places_of`), which the step
            keeps; None: on one device. Every device gets all metrics.
    """

    def step(
        state: TrainState,
        base: Tree,
        batch: Batch,
        draws: Draws | None = None,
        tables: Any = None,
    ) -> tuple[TrainState, Metrics]:
        given = task, key, state, base, batch, draws, tables
        grads, metrics = gradients(*given, places and places.adapter)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        extra = {"grad_norm": norm, "skipped": 1.0 - ok.astype(jnp.float32)}
        extra |= norms.of_tree(grads, "grad_norm")
        old: Any = state.adapter
        updates, opt_state = tx.update(grads, state.opt_state, old)
        adapter = optax.apply_updates(old, updates)
        adapter, opt_state = _if(ok, (adapter, opt_state), (old, state.opt_state))
        state = TrainState(adapter, opt_state, state.step + 1)
        return state, metrics | extra | _sizes(task, adapter)

    out = None if places is None else (places, places.step)
    options: dict[str, Any] = {"donate_argnums": 0, "out_shardings": out}
    return programs.jit(step, "training step", **options)

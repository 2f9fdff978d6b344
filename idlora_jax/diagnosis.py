"""Why a step was not finite: the first tensor that is not, in the order of the step.

    latents -> prompts -> base -> adapter -> velocities -> loss -> gradients

A step in use looks at its loss and gradient only. When these were not finite several
times, `first` does that step again and looks at everything.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from idlora_jax import accumulation, shares, training
from idlora_jax.strategies import Batch
from idlora_jax.training import Task, TrainState
from idlora_jax.types import Tree


class Finding(NamedTuple):
    """A tensor that is not finite.

    Attributes:
        kind: "latents", "prompts", "base", "adapter", "velocities", "loss" or
            "gradients".
        name: its path in them.
        row: the first index of its first axis where it is not finite (a clip of the
            batch, a layer of stacked parameters); None for a number.
    """

    kind: str
    name: str
    row: int | None


@jax.jit
def _bad(x: Array) -> Array:
    """Which rows are not finite; [1] of a number."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros(1, bool)
    rows = jnp.atleast_1d(~jnp.isfinite(x))
    return jnp.any(rows, axis=tuple(range(1, rows.ndim)))


def _found(kind: str, tree: Any) -> Iterator[Finding]:
    """The tensors of a tree that are not finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        rows = shares.seen(_bad(jnp.asarray(leaf)))
        if rows.any():
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            row = int(rows.argmax()) if jnp.ndim(leaf) else None
            yield Finding(kind, name, row)


def _step(
    task: Task, key: PRNGKeyArray, state: TrainState, base: Tree, batch: Batch
) -> Iterator[Finding]:
    """What is not finite of what the step computes, part by part."""

    @jax.jit
    def forward(adapter: Tree, base: Tree, batch: Batch, count: Array) -> Any:
        inputs, left_out = training.seen(task, key, count, batch)
        return training.predict(task, base, adapter, inputs, key=left_out)

    @jax.jit
    def backward(adapter: Tree, base: Tree, batch: Batch, count: Array) -> Any:
        inputs, left_out = training.seen(task, key, count, batch)
        of = lambda adapter: training.loss(task, base, adapter, inputs, key=left_out)
        return jax.grad(of, has_aux=True)(adapter)

    parts = accumulation.split(batch, task.accumulation)
    for part in range(task.accumulation):
        count = state.step * task.accumulation + part
        own = jax.tree.map(operator.itemgetter(part), parts)
        given = state.adapter, base, own, count
        for found in _found("velocities", forward(*given)._asdict()):
            row = accumulation.row(part, found.row or 0, task.accumulation)
            yield found._replace(row=row)
        gradients, losses = backward(*given)
        names = "video_loss", "audio_loss", "loss"
        yield from _found("loss", {name: losses[name] for name in names})
        yield from _found("gradients", gradients)


def first(
    task: Task, key: PRNGKeyArray, state: TrainState, base: Tree, batch: Batch
) -> Finding | None:
    """The first tensor of a step that is not finite, or None if all are.

    Args:
        task: what is trained.
        key: as given to `training.make_train_step`.
        state: before that step; only its adapter and its number are read.
        base: the frozen parameters.
        batch: the clips of that step.
    """
    fields = batch._asdict()
    prompt = fields.pop("prompt")._asdict()
    given = (
        _found("latents", fields),
        _found("prompts", prompt),
        _found("base", base),
        _found("adapter", state.adapter),
    )
    every = itertools.chain(*given, _step(task, key, state, base, batch))
    return next(every, None)


def told(found: Finding | None, names: Sequence[str] = ()) -> str:
    """A finding in words.

    Args:
        found: from `first`.
        names: of the batch's clips.
    """
    if found is None:
        return (
            "none, done again all of that step was finite; look for a failing device, "
            "or for values at the edge of the dtype's range"
        )
    if found.row is None:
        return f"{found.kind} {found.name}"
    of_batch = found.kind in ("latents", "prompts", "velocities")
    if of_batch and found.row < len(names):
        return f"{found.kind} {found.name} of clip {names[found.row]}"
    return f"{found.kind} {found.name}[{found.row}]"

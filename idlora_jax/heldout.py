"""The held-out loss of a run, and what the adapter does to its predictions.

    losses(config, held, task, ...) -> (state) -> numbers by name, or None
    told(when, numbers) -> one line

Clips, noise and noise levels are fixed: they follow from the data and the settings
`heldout` and `strategy` alone, so that the losses of two runs can be compared whatever
else differs in them, and a resumed run goes on in the same curve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from idlora_jax import evaluation, parallel, shares, strategies
from idlora_jax.data import latents
from idlora_jax.data.collection import Collection
from idlora_jax.data.latents import Index
from idlora_jax.experiment import TrainConfig
from idlora_jax.losses import by_level
from idlora_jax.strategies import Batch
from idlora_jax.training import Metrics, Task, TrainState
from idlora_jax.types import AV, Tree

Numbers = dict[str, float]
Losses = Callable[[TrainState], Numbers | None]


def _share(
    config: TrainConfig, held: Index, connect: latents.Connect, mesh: Mesh | None
) -> tuple[Batch, AV]:
    """The clips of one size, of which each process reads its own, and their noise."""
    count = len(held.clips)
    rows = parallel.own_rows(mesh, count)
    clips = tuple(held.clips[row] for row in rows)
    read = latents.whole(replace(held, clips=clips), connect)
    batch: Batch = parallel.from_own_rows(read, mesh, count)
    key = jax.random.key(config.heldout.seed)
    noise = strategies.draw(key, batch, config.strategy).noise
    own = jax.tree.map(lambda x: x[rows], noise)
    return batch, parallel.from_own_rows(own, mesh, count)


def fixed(
    config: TrainConfig,
    held: Collection,
    connect: latents.Connect,
    mesh: Mesh | None = None,
) -> list[tuple[Batch, AV]]:
    """The held-out clips, a batch of each size, and the noise of their tokens.

    Args:
        config: `heldout` and `strategy` are read.
        held: from `collection.split`.
        connect: the connectors.
        mesh: devices that the clips are divided over.
    """
    return [_share(config, bucket, connect, mesh) for bucket in held.buckets]


def _floats(metrics: Metrics, sigmas: Sequence[float]) -> Numbers:
    """Metrics as numbers; those of each noise level by its name."""
    out: Numbers = {}
    for name, value in metrics.items():
        part = name.removesuffix("_levels")
        out |= {name: float(value)} if part == name else by_level(part, value, sigmas)
    return out


def losses(
    config: TrainConfig,
    held: Collection,
    task: Task,
    adapter: Tree,
    base: Tree,
    connect: latents.Connect,
    mesh: Mesh | None = None,
) -> Losses:
    """A function from a training state to its held-out losses.

    It also gives what the adapter does; what is predicted without it is the same all
    the time, and made once. A moving average has the same numbers, as `ema_...`.

    Args:
        config: all settings.
        held: from `collection.split`; without clips there are no losses.
        task: what is trained.
        adapter: any of its kind.
        base: what is frozen.
        connect: the connectors.
        mesh: devices that the clips are divided over.
    """
    settings = config.heldout
    if settings.clips == 0:
        return lambda _: None
    sigmas = np.asarray(settings.sigmas, np.float32)
    pairs = fixed(config, held, connect, mesh)
    given = [(base, batch, sigmas, noise) for batch, noise in pairs]
    evaluate = evaluation.make_evaluate(task, shares.everywhere(mesh))
    full = task.mode == "full"
    without = [None if full else evaluate.without(adapter, *one) for one in given]

    def at(adapter: Any) -> Numbers:
        """Means over the sizes, each by its number of clips."""
        pairs = zip(given, without, strict=True)
        found = [_floats(evaluate(adapter, *g, w), settings.sigmas) for g, w in pairs]
        mean = functools.partial(np.average, weights=held.counts)
        return {name: float(mean([row[name] for row in found])) for name in found[0]}

    def of(state: TrainState) -> Numbers:
        found = at(state.evaluated)
        if state.ema is None:
            return found
        return found | {f"ema_{name}": value for name, value in at(state.ema).items()}

    return of


def told(when: str, numbers: Numbers) -> str:
    """The losses in one line, and how much the adapter does.

    Args:
        when: before or after training.
        numbers: from `losses`.
    """
    names = ("loss", "video_loss", "audio_loss", "ema_loss")
    shown = [f"{n.replace('_', ' ')} {numbers[n]:.5f}" for n in names if n in numbers]
    for name in ("video", "audio"):
        if f"adapter_effect_{name}" in numbers:
            share = numbers[f"adapter_effect_{name}"]
            shown.append(f"the adapter changes {name} by {share:.1%}")
    return f"held-out {when}: {', '.join(shown)}"

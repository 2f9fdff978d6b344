"""The held-out loss of a run, and what the adapter does to its predictions.

    losses(config, held, task, ...) -> (state) -> numbers by name, or None
    told(when, numbers) -> one line

Clips, noise and noise levels are fixed: they follow from the data and the settings
`heldout` and `strategy` alone, so that the losses of two runs can be compared whatever
else differs in them, and a resumed run goes on in the same curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from idlora_jax import evaluation, strategies
from idlora_jax.data import latents
from idlora_jax.data.latents import Index
from idlora_jax.experiment import TrainConfig
from idlora_jax.losses import by_level
from idlora_jax.strategies import Batch
from idlora_jax.training import Metrics, Task, TrainState
from idlora_jax.types import AV, Tree

Numbers = dict[str, float]
Losses = Callable[[TrainState], Numbers | None]


def fixed(
    config: TrainConfig, held: Index, connect: latents.Connect
) -> tuple[Batch, AV]:
    """The held-out clips as one batch, and the noise of their tokens.

    Args:
        config: `heldout` and `strategy` are read.
        held: from `latents.split`.
        connect: the connectors.
    """
    batch = latents.whole(held, connect)
    key = jax.random.key(config.heldout.seed)
    return batch, strategies.draw(key, batch, config.strategy).noise


def _floats(metrics: Metrics, sigmas: Sequence[float]) -> Numbers:
    """Metrics as numbers; those of each noise level by its name."""
    out: Numbers = {}
    for name, value in metrics.items():
        part = name.removesuffix("_levels")
        out |= {name: float(value)} if part == name else by_level(part, value, sigmas)
    return out


def losses(
    config: TrainConfig,
    held: Index,
    task: Task,
    adapter: Tree,
    base: Tree,
    connect: latents.Connect,
) -> Losses:
    """A function from a training state to its held-out losses.

    It also gives what the adapter does; what is predicted without it is the same all
    the time, and made once. A moving average has the same numbers, as `ema_...`.

    Args:
        config: all settings.
        held: from `latents.split`; without clips there are no losses.
        task: what is trained.
        adapter: any of its kind.
        base: what is frozen.
        connect: the connectors.
    """
    settings = config.heldout
    if settings.clips == 0:
        return lambda _: None
    batch, noise = fixed(config, held, connect)
    given = base, batch, jnp.asarray(settings.sigmas), noise
    evaluate = evaluation.make_evaluate(task)
    full = task.mode == "full"
    without = None if full else evaluate.without(adapter, *given)

    def at(adapter: Any) -> Numbers:
        return _floats(evaluate(adapter, *given, without), settings.sigmas)

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

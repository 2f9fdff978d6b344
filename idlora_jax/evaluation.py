"""The fixed evaluation: losses at given noise and levels, and what the adapter does.

    evaluate = make_evaluate(task)
    without = evaluate.without(adapter, base, batch, sigmas, noise)
    metrics = evaluate(adapter, base, batch, sigmas, noise, without)

Everything random is an argument, so that the numbers of two runs can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from idlora_jax import adapters, programs, training
from idlora_jax.strategies import Batch, Draws, TrainInputs
from idlora_jax.training import Metrics, Task
from idlora_jax.types import AV, Adapter, Tree, each

Levels = Float[Array, " n"] | Float[np.ndarray, " n"]
"""Noise levels."""


@dataclass(frozen=True)
class Evaluation:
    """The fixed evaluation; from `make_evaluate`.

    Attributes:
        velocities: `(adapter, base, batch, sigmas, noise)` to the predictions for the
            target tokens, AV of [n B T C]; jitted.
        measure: those, `batch`, `sigmas`, `noise` and predictions `without` the adapter
            (or None) to metrics; jitted.
    """

    velocities: Callable[..., AV]
    measure: Callable[..., Metrics]

    def __call__(
        self,
        adapter: Adapter,
        base: Tree,
        batch: Batch,
        sigmas: Levels,
        noise: AV,
        without: AV | None = None,
    ) -> Metrics:
        """Losses, and how much the adapter does; see `make_evaluate`."""
        found = self.velocities(adapter, base, batch, sigmas, noise)
        return self.measure(found, batch, sigmas, noise, without)

    def without(
        self,
        adapter: Adapter,
        base: Tree,
        batch: Batch,
        sigmas: Levels,
        noise: AV,
    ) -> AV:
        """What is predicted without the adapter, AV of [n B T C].

        By the same compiled function, its b set to 0: what differs is the adapter's
        doing and no rounding.
        """
        off = adapters.scale(adapter, 0.0)
        return self.velocities(off, base, batch, sigmas, noise)


def _squares(found: AV, without: AV, mask: AV) -> AV:
    """Sums of squares of what differs and of what it differs from, each [2]."""

    def one(v: Array, w: Array, m: Array) -> Float[Array, " 2"]:
        v, w = (jnp.where(m[..., None], x.astype(jnp.float32), 0.0) for x in (v, w))
        return jnp.stack([jnp.sum(jnp.square(v - w)), jnp.sum(jnp.square(w))])

    return each(one, found, without, mask)


def make_evaluate(task: Task, place: NamedSharding | None = None) -> Evaluation:
    """Build `evaluate(adapter, base, batch, sigmas, noise, without=None) -> metrics`.

    The losses are means over the given noise levels [n], with the same noise (AV of
    [B T C]) at each; `video_loss_levels` and `audio_loss_levels` [n] are those of each
    level (`losses.by_level` names them). The first frame is given where training gives
    it mostly, and references always are. So they depend on nothing but the arguments.

    With `without` (from `Evaluation.without`) there are `adapter_effect_video` and
    `adapter_effect_audio`, too: the norm of what the adapter changes in the velocities
    of all tokens that count in the loss, over the norm of those without it.

    Args:
        task: what is trained.
        place: where the metrics go, see `shares.everywhere`.
    """

    def fixed(level: Array, batch: Batch, noise: AV) -> TrainInputs:
        size = batch.video.shape[0]
        first = jnp.full(size, task.spec.first_frame_p >= 0.5)
        sigma = each(lambda _: jnp.broadcast_to(level, (size,)), noise)
        return training.inputs_of(task, Draws(first, sigma, noise), batch)

    def velocities(
        adapter: Adapter,
        base: Tree,
        batch: Batch,
        sigmas: Levels,
        noise: AV,
    ) -> AV:
        def at(level: Array) -> AV:
            inputs = fixed(level, batch, noise)
            pred = training.predict(task, base, adapter, inputs)
            return each(lambda p, v: p[:, : v.shape[1]], pred, inputs.velocity)

        return jax.lax.map(at, sigmas)

    def measure(
        found: AV,
        batch: Batch,
        sigmas: Levels,
        noise: AV,
        without: AV | None = None,
    ) -> Metrics:
        def at(row: Any) -> Any:
            level, now, before = row
            inputs = fixed(level, batch, noise)
            change = None if before is None else _squares(now, before, inputs.mask)
            return training.loss_of(task, now, inputs)[1], change

        each_level, change = jax.lax.map(at, (sigmas, found, without))
        parts = ("video_loss", "audio_loss")
        levels = {f"{name}_levels": each_level[name] for name in parts}
        shares = {} if change is None else change._asdict()
        effect = {
            f"adapter_effect_{name}": jnp.sqrt(jnp.divide(*jnp.sum(squares, 0)))
            for name, squares in shares.items()
            if squares is not None
        }
        return jax.tree.map(jnp.mean, each_level) | levels | effect

    return Evaluation(
        programs.jit(velocities, "held-out predictions"),
        programs.jit(measure, "held-out losses", out_shardings=place),
    )

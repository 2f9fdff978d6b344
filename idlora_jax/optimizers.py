"""Gradients to updates: the method, its learning rate, and what stands around them.

    clip by the global norm -> method -> factor of b (LoRA+) -> average (EMA)

Each part is an optax transformation and its state is part of the optimizer's, so that
all of it is saved, resumed, donated, divided over devices and taken back with a step
that was not finite in one way.

| method | memory, bytes a parameter | note |
|---|---|---|
| adamw | 8 | the reference's |
| adamw8bit | 2 | moments in 8 bits (`adam8bit`) |
| lion | 4 | sign of a moment; a rate of a third to a tenth of AdamW's |
| prodigy | 16 | finds the rate by itself; `learning_rate` is a factor, 1 |
| schedule_free | 8 | needs no falling rate; use `evaluated` parameters |

Source: ltx_trainer/trainer.py: _init_optimizer; arXiv 2302.06675 (Lion), 2306.06101
(Prodigy), 2405.15682 (schedule-free), 2402.12354 (LoRA+).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int

from idlora_jax import adam8bit, schedules
from idlora_jax.optimizer_config import Ema, Optimizer
from idlora_jax.types import Tree

Transformation = optax.GradientTransformation


class Average(NamedTuple):
    """The exponential moving average of what is trained.

    Attributes:
        count: number of updates.
        tree: the average, of the parameters' structure.
    """

    count: Int[Array, ""]
    tree: Any


def learning_rate(cfg: Optimizer, steps: int) -> optax.Schedule:
    """The learning rate at each update: up over `warmup`, then down over the others.

    Args:
        cfg: the settings.
        steps: all updates.

    Raises:
        ValueError: if there are not more updates than the warm-up has.
    """
    rate, end, rest = cfg.learning_rate, cfg.end_factor, steps - cfg.warmup
    if rest < 1:
        raise ValueError(
            f"optimizer.warmup: got {cfg.warmup} of {steps} steps, expected fewer"
        )
    cycle = cfg.cycle or max(1, rest // 4)
    shapes: dict[str, Callable[[], optax.Schedule]] = {
        "constant": lambda: schedules.constant(rate),
        "linear": lambda: schedules.linear_decay(rate, rest, end),
        "cosine": lambda: schedules.cosine(rate, rest, end_factor=end),
        "restarts": lambda: schedules.restarts(
            rate, rest, cycle=cycle, growth=cfg.cycle_growth, end_factor=end
        ),
        "polynomial": lambda: schedules.polynomial(
            rate, rest, power=cfg.power, end_factor=end
        ),
    }
    return schedules.warmed(shapes[cfg.schedule](), cfg.warmup)


def factor_of_b(ratio: float) -> Transformation:
    """Multiply the updates of an adapter's b; those of a stay.

    Source: LoRA+, arXiv 2402.12354.
    """

    def one(path: tuple[Any, ...], update: Array) -> Array:
        return update * ratio if path[-1].key == "b" else update

    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(one, updates)
    )


def average(cfg: Ema) -> Transformation:
    """Pass updates on, and keep e = decay e + (1 - decay) p of the parameters p.

    Up to `cfg.start` updates the average is p itself.
    """
    decay = cfg.decay or 0.0

    def init(params: Any) -> Average:
        return Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Average, params: Any = None) -> tuple[Any, Average]:
        count = jnp.asarray(optax.safe_increment(state.count))
        keep = jnp.where(count <= cfg.start, 0.0, decay)
        new = optax.apply_updates(params, updates)
        tree = jax.tree.map(lambda e, p: keep * e + (1 - keep) * p, state.tree, new)
        return updates, Average(count, tree)

    return optax.GradientTransformation(init, update)  # pyright: ignore


def _adamw(cfg: Optimizer, rate: optax.Schedule) -> Transformation:
    b1, b2 = cfg.betas
    return optax.adamw(rate, b1=b1, b2=b2, eps=cfg.eps, weight_decay=cfg.weight_decay)


def _decayed(scaled: Transformation, cfg: Optimizer, rate: Any) -> Transformation:
    """Decoupled weight decay and the learning rate, as in AdamW."""
    decay = optax.add_decayed_weights(cfg.weight_decay)
    return optax.chain(scaled, decay, optax.scale_by_learning_rate(rate))


def _adamw8bit(cfg: Optimizer, rate: optax.Schedule) -> Transformation:
    return _decayed(adam8bit.scale_by_adam(*cfg.betas, cfg.eps), cfg, rate)


def _lion(cfg: Optimizer, rate: optax.Schedule) -> Transformation:
    b1, b2 = cfg.betas
    return optax.lion(rate, b1=b1, b2=b2, weight_decay=cfg.weight_decay)


def _prodigy(cfg: Optimizer, rate: optax.Schedule) -> Transformation:
    made = optax.contrib.prodigy(
        rate,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        safeguard_warmup=cfg.warmup > 0,
    )
    # Its state begins with the parameters: the very arrays cannot be donated twice.
    return optax.GradientTransformation(
        lambda params: made.init(jax.tree.map(jnp.copy, params)), made.update
    )


def _schedule_free(cfg: Optimizer, rate: optax.Schedule) -> Transformation:
    b1, b2 = cfg.betas
    scaled = optax.scale_by_rms(b2, cfg.eps, eps_in_sqrt=False, bias_correction=True)
    inner = _decayed(scaled, cfg, rate)
    if cfg.b_ratio != 1:
        inner = optax.chain(inner, factor_of_b(cfg.b_ratio))
    return optax.contrib.schedule_free(inner, rate, b1=b1)


METHODS: dict[str, Callable[[Optimizer, optax.Schedule], Transformation]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "lion": _lion,
    "prodigy": _prodigy,
    "schedule_free": _schedule_free,
}


def make_optimizer(
    cfg: Optimizer, steps: int, *, ema: Ema | None = None
) -> Transformation:
    """The whole chain; see the module.

    Args:
        cfg: the settings.
        steps: updates over which the learning rate changes.
        ema: of the average; see `averaged`.

    Raises:
        ValueError: if the warm-up takes all steps.

    Source: ltx_trainer/trainer.py: _init_optimizer, _create_scheduler.
    """
    parts = [METHODS[cfg.name](cfg, learning_rate(cfg, steps))]
    if cfg.clip is not None:
        parts = [optax.clip_by_global_norm(cfg.clip), *parts]
    if cfg.b_ratio != 1 and cfg.name != "schedule_free":
        parts.append(factor_of_b(cfg.b_ratio))
    if ema is not None and ema.decay is not None:
        parts.append(average(ema))
    return optax.chain(*parts)


def _find(opt_state: Any, kind: type) -> Any:
    """The part of that type in an optimizer's state, or None."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind))
    return next((leaf for leaf in leaves if isinstance(leaf, kind)), None)


def evaluated(opt_state: Any, params: Tree) -> Tree:
    """What to evaluate and export: of schedule-free its mean, else `params` itself.

    Args:
        opt_state: of the optimizer.
        params: what is trained.
    """
    found = _find(opt_state, optax.contrib.ScheduleFreeState)
    if found is None:
        return params
    return optax.contrib.schedule_free_eval_params(found, params)


def averaged(opt_state: Any) -> Tree | None:
    """The moving average, or None where none is kept."""
    found = _find(opt_state, Average)
    return None if found is None else found.tree

"""What `train.py` does: a configuration in, an adapter out.

    plan(config) -> Fit     settings, data and output folder checked; no weights yet
    fit(plan) -> Result     weights, training loop, held-out loss before and after

The connectors run once per clip, when it is first read; the base is frozen, so that the
training state holds the adapter and its optimizer only.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from idlora_jax import adapters, geometry, loop, prompts, strategies, training
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.data import latents
from idlora_jax.data.latents import Index
from idlora_jax.experiment import Strategy, TrainConfig
from idlora_jax.loop import Run
from idlora_jax.model import transformer
from idlora_jax.strategies import Batch
from idlora_jax.training import Metrics, Task, TrainState
from idlora_jax.types import Tree
from idlora_jax.weights import io, networks
from idlora_jax.weights.check import verify_watched
from idlora_jax.weights.networks import Networks

NAMES = ("transformer", "text_connector")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """What is to be trained, checked.

    Attributes:
        run: settings and what to write.
        nets: what the networks are.
        clips: to train on.
        held: kept out of training.
        resumed: batches already seen; None: a new run.
    """

    run: Run
    nets: Networks
    clips: Index
    held: Index
    resumed: int | None


class Result(NamedTuple):
    """What came out.

    Attributes:
        state: the last training state.
        adapter: where it was exported to.
        before: held-out losses at the start of this call, or None.
        after: held-out losses now, or None.
        signal: what stopped the run early, or None.
    """

    state: TrainState
    adapter: Path
    before: dict[str, float] | None
    after: dict[str, float] | None
    signal: int | None


def folders(spec: Strategy) -> tuple[str, ...]:
    """Which folders of the data a training mode reads."""
    if spec.name == "audio_ref_only_ic":
        return latents.FOLDERS
    return (latents.VIDEO, latents.TEXT, latents.AUDIO)


def _meta(config: TrainConfig, nets: Networks, index: Index) -> AdapterMeta:
    spec = config.strategy
    extra = {"strategy": spec.name, "seed": str(config.seed)}
    if not spec.negative_positions:
        extra["negative_positions"] = "false"
    return AdapterMeta(
        generation=nets.generation,
        base_name=Path(config.base).name,
        base_hash=nets.base_hash,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
        numerics=config.numerics,
        reference_gap_s=spec.gap_s,
        video_sees_ref=spec.video_sees_ref,
        ref_sees_text=spec.ref_sees_text,
        fps=index.fps,
        reference_s=index.reference / geometry.AUDIO_LATENTS_PER_S,
        extra=extra,
    )


def _fingerprint(index: Index) -> str:
    names = "\n".join(clip.name for clip in index.clips)
    return f"{len(index.clips)} clips, {hashlib.sha256(names.encode()).hexdigest()[:8]}"


def plan(config: TrainConfig) -> Fit:
    """Check everything that can be checked without reading weights.

    Raises:
        ValueError: naming what was got, what was expected, and what to do.
    """
    index = latents.index(config.data, folders(config.strategy))
    clips, held = latents.split(index, config.heldout.clips)
    if config.verify:
        verify_watched(io.open_base(config.base))
    nets, _ = networks.load(config.base, ())
    facts = {"base": nets.base_hash, "clips": _fingerprint(index)}
    run = Run(config, _meta(config, nets, index), facts)
    return Fit(run, nets, clips, held, loop.newest(run))


def task_of(fit: Fit) -> Task:
    """The transformer's functions with the run's settings."""
    config, cfg = fit.run.config, fit.nets.transformer
    return Task(
        apply=transformer.bind(cfg, remat=config.remat),
        prepare=functools.partial(transformer.prepare, cfg, numerics=config.numerics),
        spec=config.strategy,
        fps=fit.clips.fps,
        scale=config.lora.alpha / config.lora.rank,
        dtype=jnp.dtype(config.dtype),
        numerics=config.numerics,
    )


def _floats(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _held_out(
    fit: Fit, task: Task, base: Tree, connect: latents.Connect
) -> Callable[[TrainState], dict[str, float] | None]:
    """The loss of the held-out clips at fixed noise and fixed levels."""
    settings = fit.run.config.heldout
    if settings.clips == 0:
        return lambda _: None
    batch: Batch = latents.whole(fit.held, connect)
    noise = strategies.draw(jax.random.key(settings.seed), batch, task.spec).noise
    sigmas = jnp.asarray(settings.sigmas)
    evaluate = training.make_evaluate(task)
    return lambda s: _floats(evaluate(s.adapter, base, batch, sigmas, noise))


def _told(when: str, losses: dict[str, float] | None, say: Say) -> None:
    if losses is not None:
        names = ("loss", "video_loss", "audio_loss")
        shown = (f"{name.replace('_', ' ')} {losses[name]:.5f}" for name in names)
        say(f"held-out {when}: {', '.join(shown)}")


def fit(plan: Fit, say: Say = print) -> Result:
    """Load the weights, train, save.

    Args:
        plan: from `plan`.
        say: takes lines for the user.

    Raises:
        ValueError: if weights are missing or do not fit, or the loss is not finite.
        OSError: if something cannot be written.
    """
    config, nets = plan.run.config, plan.nets
    dtype = jnp.dtype(config.dtype)
    _, params = networks.load(config.base, NAMES, dtype=dtype, fp8=config.fp8)
    base = params["transformer"]

    def connect(features: Any, mask: Any) -> Any:
        return prompts.prompts(nets, params, features, mask, numerics=config.numerics)

    lora = config.lora
    adapter = adapters.init(jax.random.key(lora.seed), base, lora.rank, lora.targets)
    tx = training.make_optimizer(config.optimizer, config.steps)
    state = loop.start(plan.run, plan.resumed, training.init(adapter, base, tx))
    task = task_of(plan)
    evaluate = _held_out(plan, task, base, connect)
    before = evaluate(state)
    seen = int(state.step)
    say(
        f"training on {len(plan.clips.clips)} clips, {config.steps} steps"
        + (f", after {seen} batches seen" if seen else "")
    )
    _told("before", before, say)
    step = training.make_train_step(task, tx, jax.random.key(config.seed))
    batches = latents.batches(plan.clips, connect, config.batch_size, seed=config.seed)
    state, signal = loop.train(plan.run, step, state, base, batches)
    after = None if signal else evaluate(state)
    _told("after", after, say)
    return Result(state, loop.save(plan.run, state), before, after, signal)

"""What `train.py` does: a configuration in, an adapter out.

    plan(config) -> Fit     settings, data and output folder checked; no weights yet
    fit(plan) -> Result     weights, training loop, held-out loss before and after

The connectors run once per clip, when it is first read; the base is frozen, so that the
training state holds the adapter and its optimizer only. In mode "full" it holds the
transformer's parameters instead, and nothing is frozen.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from idlora_jax import (
    adapters,
    as_trained,
    diagnosis,
    experiment,
    geometry,
    loop,
    optimizers,
    prompts,
    references,
    runs,
    strategies,
    training,
)
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.config import TransformerConfig
from idlora_jax.data import latents
from idlora_jax.data.latents import Index
from idlora_jax.experiment import Strategy, TrainConfig
from idlora_jax.losses import by_level
from idlora_jax.model import transformer
from idlora_jax.runs import Run
from idlora_jax.strategies import Batch
from idlora_jax.training import Metrics, Task, TrainState
from idlora_jax.types import Tree
from idlora_jax.weights import io, networks, rules
from idlora_jax.weights.check import verify_watched
from idlora_jax.weights.networks import Networks

NAMES = ("transformer", "text_connector")
Say = Callable[[str], None]
HeldOutLoss = Callable[[TrainState], dict[str, float] | None]


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
    row = strategies.mode(spec)
    wanted = {
        latents.AUDIO: row.audio,
        latents.REFERENCE: row.reference,
        latents.VIDEO_REFERENCE: row.video_reference,
    }
    return (latents.VIDEO, latents.TEXT, *(f for f, used in wanted.items() if used))


def _lora_facts(config: TrainConfig) -> dict[str, Any]:
    """Ranks and scales as a file says them: alpha is the usual scale times the rank."""
    lora = config.lora
    if config.mode == "full":
        return {"extra": {"mode": "full"}}
    ranks = experiment.patterns("lora.ranks", lora.ranks).values()
    said = {name: " ".join(getattr(lora, name)) for name in ("ranks", "alphas")}
    return {
        "rank": max(lora.rank, *map(int, ranks)) if ranks else lora.rank,
        "alpha": lora.alpha * (math.sqrt(lora.rank) if lora.rslora else 1.0),
        "targets": lora.targets,
        "extra": {name: text for name, text in said.items() if text},
    }


def _downscale(index: Index) -> int | None:
    """How many times smaller video references are, where there are any."""
    if not index.video_reference:
        return None
    return references.downscale(index.clips[0].video[1:], index.video_reference[1:])


def _meta(config: TrainConfig, nets: Networks, index: Index) -> AdapterMeta:
    spec, sees = config.strategy, strategies.branch(config.strategy)
    facts = _lora_facts(config)
    about = as_trained.recorded(spec, _downscale(index))
    extra = facts.pop("extra") | {"seed": str(config.seed)} | about
    return AdapterMeta(
        generation=nets.generation,
        base_name=Path(config.base).name,
        base_hash=nets.base_hash,
        numerics=config.numerics,
        reference_gap_s=spec.gap_s,
        video_sees_ref=sees.video_sees_ref,
        ref_sees_text=sees.ref_sees_text,
        fps=index.fps,
        reference_s=index.reference / geometry.AUDIO_LATENTS_PER_S,
        extra=extra,
        **facts,
    )


def _fingerprint(index: Index) -> str:
    names = "\n".join(clip.name for clip in index.clips)
    return f"{len(index.clips)} clips, {hashlib.sha256(names.encode()).hexdigest()[:8]}"


def _export_base(path: Path, params: Tree, about: AdapterMeta, *, like: Path) -> None:
    """A trained transformer under the original key names, in the base's dtypes."""
    opened = io.open_base(like)
    stored, _ = io.locate(opened, "transformer")
    flat = rules.flatten(jax.device_get(params))
    kinds = {p: jnp.bfloat16 if f.narrow else f.spec.dtype for p, f in stored.items()}
    tree = rules.nest({path: w.astype(kinds[path]) for path, w in flat.items()})
    said = opened.metadata | {"training": json.dumps(asdict(about))}
    io.save_original(path, {"transformer": tree}, opened.config, said)


def check_targets(config: TrainConfig, shapes: Tree) -> None:
    """Refuse targets and patterns that fit no module of a transformer.

    Raises:
        ValueError: naming them.
    """
    if config.mode == "full":
        return
    modules = adapters.select(shapes, config.lora.targets)
    strategies.check_trained(config.strategy, modules)
    for name in ("ranks", "alphas"):
        rows = experiment.patterns(name, getattr(config.lora, name))
        adapters.require_used(modules, rows)


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
    config = experiment.of_generation(config, nets.generation)
    check_targets(config, io.shapes(io.open_base(config.base), "transformer"))
    facts = {"base": nets.base_hash, "clips": _fingerprint(index)}
    full = functools.partial(_export_base, like=config.base)
    export = full if config.mode == "full" else None
    run = Run(config, _meta(config, nets, index), facts, export)
    return Fit(run, nets, clips, held, runs.newest(run))


def task_for(config: TrainConfig, cfg: TransformerConfig, fps: float) -> Task:
    """The transformer's functions with a run's settings.

    Args:
        config: the settings.
        cfg: the transformer.
        fps: frames per second of the clips.
    """
    scanned = ("params" if config.mode == "full" else "lora",)
    return Task(
        apply=transformer.bind(cfg, remat=config.remat, scanned=scanned),
        prepare=functools.partial(transformer.prepare, cfg, numerics=config.numerics),
        spec=config.strategy,
        fps=fps,
        scale=config.lora.factor,
        dtype=jnp.dtype(config.dtype),
        numerics=config.numerics,
        rounding="train_bf16" if config.numerics == "reference" else None,
        dropout=config.lora.dropout,
        mode=config.mode,
    )


def task_of(fit: Fit) -> Task:
    """The transformer's functions with the run's settings."""
    return task_for(fit.run.config, fit.nets.transformer, fit.clips.fps)


def trained(config: TrainConfig, base: Tree) -> tuple[Tree, Tree]:
    """What is trained, in float32, and what is frozen: nothing in mode "full"."""
    if config.mode == "full":
        return jax.tree.map(lambda w: w.astype(jnp.float32), base), {}
    lora = config.lora
    key = jax.random.key(lora.seed)
    return adapters.init(key, base, lora.rank_of, lora.targets), base


def _floats(metrics: Metrics, sigmas: Sequence[float]) -> dict[str, float]:
    """Metrics as numbers; those of each noise level by its name."""
    out: dict[str, float] = {}
    for name, value in metrics.items():
        part = name.removesuffix("_levels")
        out |= {name: float(value)} if part == name else by_level(part, value, sigmas)
    return out


def _held_out(
    fit: Fit, task: Task, base: Tree, connect: latents.Connect
) -> HeldOutLoss:
    """The loss of the held-out clips at fixed noise and fixed levels."""
    settings = fit.run.config.heldout
    if settings.clips == 0:
        return lambda _: None
    batch: Batch = latents.whole(fit.held, connect)
    noise = strategies.draw(jax.random.key(settings.seed), batch, task.spec).noise
    sigmas = jnp.asarray(settings.sigmas)
    evaluate = training.make_evaluate(task)

    def at(adapter: Any) -> dict[str, float]:
        found = evaluate(adapter, base, batch, sigmas, noise)
        return _floats(found, settings.sigmas)

    def of(state: TrainState) -> dict[str, float]:
        losses = at(state.evaluated)
        if state.ema is None:
            return losses
        averaged = at(state.ema)
        return losses | {f"ema_{name}": value for name, value in averaged.items()}

    return of


def _told(when: str, losses: dict[str, float] | None, say: Say) -> None:
    if losses is not None:
        names = ("loss", "video_loss", "audio_loss")
        shown = (f"{name.replace('_', ' ')} {losses[name]:.5f}" for name in names)
        if "ema_loss" in losses:
            shown = (*shown, f"loss of the average {losses['ema_loss']:.5f}")
        say(f"held-out {when}: {', '.join(shown)}")


def hooks(
    plan: Fit, task: Task, key: PRNGKeyArray, base: Tree, evaluate: HeldOutLoss
) -> loop.Hooks:
    """What the loop asks: clips' names, held-out losses, what is not finite."""
    config, clips = plan.run.config, plan.clips.clips

    def names(seen: int) -> list[str]:
        rows = latents.chosen(len(clips), config.batch_size, seen, config.seed)
        return [clips[row].name for row in rows]

    def explain(state: TrainState, batch: Batch, names: Sequence[str]) -> str:
        found = diagnosis.first(task, key, state, base, batch)
        return diagnosis.told(found, names)

    def validate(updates: int, state: TrainState) -> dict[str, float] | None:
        every = config.validate_every
        return evaluate(state) if every and updates % every == 0 else None

    return loop.Hooks(names=names, validate=validate, explain=explain)


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
    _, found = networks.load(config.base, NAMES, dtype=dtype, fp8=config.fp8)
    params = dict(found)
    adapter, base = trained(config, params.pop("transformer"))

    def connect(features: Any, mask: Any) -> Any:
        return prompts.prompts(nets, params, features, mask, numerics=config.numerics)

    make = optimizers.make_optimizer
    tx = make(config.optimizer, config.steps, ema=config.ema)
    state = runs.start(plan.run, plan.resumed, training.init(adapter, base, tx))
    task = task_of(plan)
    evaluate = _held_out(plan, task, base, connect)
    before = evaluate(state)
    seen = int(state.step)
    say(
        f"training on {len(plan.clips.clips)} clips, {config.steps} steps"
        + (f", after {seen} batches seen" if seen else "")
    )
    _told("before", before, say)
    key = jax.random.key(config.seed)
    step = training.make_train_step(task, tx, key)
    batches = latents.batches(plan.clips, connect, config.batch_size, seed=config.seed)
    asked = hooks(plan, task, key, base, evaluate)
    state, signal = loop.train(plan.run, step, state, base, batches, asked)
    after = None if signal else evaluate(state)
    _told("after", after, say)
    return Result(state, runs.exported(plan.run, state), before, after, signal)

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
from collections.abc import Callable, Iterable, Sequence
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
    heldout,
    loop,
    optimizers,
    prompts,
    references,
    runs,
    strategies,
    training,
    validation,
    wandb_run,
)
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.data import latents
from idlora_jax.data.latents import Index
from idlora_jax.experiment import Strategy, TrainConfig
from idlora_jax.heldout import Losses, Numbers
from idlora_jax.model import transformer
from idlora_jax.records import Sampled
from idlora_jax.runs import Run
from idlora_jax.strategies import Batch
from idlora_jax.training import Task, TrainState
from idlora_jax.types import Tree
from idlora_jax.validation import Planned
from idlora_jax.weights import io, networks, rules
from idlora_jax.weights.check import verify_watched
from idlora_jax.weights.networks import Networks

NAMES = ("transformer", "text_connector")
Say = Callable[[str], None]
Sample = Callable[[int, TrainState], Iterable[Sampled]]


@dataclass(frozen=True)
class Fit:
    """What is to be trained, checked.

    Attributes:
        run: settings and what to write.
        nets: what the networks are.
        clips: to train on.
        held: kept out of training.
        resumed: batches already seen; None: a new run.
        samples: what is sampled while training goes on, or None.
    """

    run: Run
    nets: Networks
    clips: Index
    held: Index
    resumed: int | None
    samples: Planned | None = None


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


def _as_stored(params: Tree, like: Path) -> Tree:
    """A transformer in the dtypes of a base's file; what is in 8 bits there in 16."""
    stored, _ = io.locate(io.open_base(like), "transformer")
    kinds = {p: jnp.bfloat16 if f.narrow else f.spec.dtype for p, f in stored.items()}
    flat = rules.flatten(params)
    return rules.nest({path: w.astype(kinds[path]) for path, w in flat.items()})


def _export_base(path: Path, params: Tree, about: AdapterMeta, *, like: Path) -> None:
    """A trained transformer under the original key names, in the base's dtypes."""
    opened = io.open_base(like)
    tree = _as_stored(jax.device_get(params), like)
    said = opened.metadata | {"training": json.dumps(asdict(about))}
    io.save_original(path, {"transformer": tree}, opened.config, said)


def plan(config: TrainConfig) -> Fit:
    """Check everything that can be checked without reading weights.

    Raises:
        ValueError: naming what was got, what was expected, and what to do.
    """
    wandb_run.check(config)
    index = latents.index(config.data, folders(config.strategy))
    clips, held = latents.split(index, config.heldout.clips)
    if config.verify:
        verify_watched(io.open_base(config.base))
    nets, _ = networks.load(config.base, ())
    if config.mode == "lora":
        shapes = io.shapes(io.open_base(config.base), "transformer")
        modules = adapters.select(shapes, config.lora.targets)
        strategies.check_trained(config.strategy, modules)
        for name in ("ranks", "alphas"):
            rows = experiment.patterns(name, getattr(config.lora, name))
            adapters.require_used(modules, rows)
    facts = {"base": nets.base_hash, "clips": _fingerprint(index)}
    full = functools.partial(_export_base, like=config.base)
    export = full if config.mode == "full" else None
    run = Run(config, _meta(config, nets, index), facts, export)
    return Fit(run, nets, clips, held, runs.newest(run), validation.plan(run))


def task_of(fit: Fit) -> Task:
    """The transformer's functions with the run's settings."""
    config, cfg = fit.run.config, fit.nets.transformer
    scanned = ("params" if config.mode == "full" else "lora",)
    return Task(
        apply=transformer.bind(cfg, remat=config.remat, scanned=scanned),
        prepare=functools.partial(transformer.prepare, cfg, numerics=config.numerics),
        spec=config.strategy,
        fps=fit.clips.fps,
        scale=config.lora.factor,
        dtype=jnp.dtype(config.dtype),
        numerics=config.numerics,
        rounding="train_bf16" if config.numerics == "reference" else None,
        dropout=config.lora.dropout,
        mode=config.mode,
    )


def trained(config: TrainConfig, base: Tree) -> tuple[Tree, Tree]:
    """What is trained, in float32, and what is frozen: nothing in mode "full"."""
    if config.mode == "full":
        return jax.tree.map(lambda w: w.astype(jnp.float32), base), {}
    lora = config.lora
    key = jax.random.key(lora.seed)
    return adapters.init(key, base, lora.rank_of, lora.targets), base


def served(plan: Fit, read: Tree, base: Tree) -> Callable[[Tree], Tree]:
    """From what is trained to the parameters that `sample.py` would read.

    Args:
        plan: from `plan`.
        read: the base as it was read, or its shapes.
        base: what is frozen.
    """
    config = plan.run.config
    if config.mode == "lora":
        return lambda _: base
    kinds = jax.tree.map(lambda w: w.dtype, read)

    def exported(params: Tree) -> Tree:
        stored = _as_stored(params, config.base)
        return jax.tree.map(lambda w, kind: w.astype(kind), stored, kinds)

    return exported


def hooks(
    plan: Fit,
    task: Task,
    key: PRNGKeyArray,
    base: Tree,
    evaluate: Losses,
    *,
    before: Numbers | None = None,
    sample: Sample = loop.NOTHING.sample,
) -> loop.Hooks:
    """What the loop asks: clips' names, losses, samples, what is not finite.

    Args:
        plan: from `plan`.
        task: from `task_of`.
        key: the run's.
        base: what is frozen.
        evaluate: from a state to its held-out losses.
        before: those before the first step.
        sample: see `loop.Hooks`.
    """
    config, clips = plan.run.config, plan.clips.clips

    def names(seen: int) -> list[str]:
        rows = latents.chosen(len(clips), config.batch_size, seen, config.seed)
        return [clips[row].name for row in rows]

    def explain(state: TrainState, batch: Batch, names: Sequence[str]) -> str:
        found = diagnosis.first(task, key, state, base, batch)
        return diagnosis.told(found, names)

    def validate(updates: int, state: TrainState) -> dict[str, float] | None:
        every = config.validate_every
        if not updates:
            return before
        return evaluate(state) if every and updates % every == 0 else None

    return loop.Hooks(names, validate, sample, explain)


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
    # Before the base is read: the text encoder and it are never in memory together.
    shown = None if plan.samples is None else validation.load(plan.samples, say)
    _, found = networks.load(config.base, NAMES, dtype=dtype, fp8=config.fp8)
    params = dict(found)
    read = params.pop("transformer")
    adapter, base = trained(config, read)
    parameters = served(plan, read, base)
    del read

    def connect(features: Any, mask: Any) -> Any:
        return prompts.prompts(nets, params, features, mask, numerics=config.numerics)

    make = optimizers.make_optimizer
    tx = make(config.optimizer, config.steps, ema=config.ema)
    state = runs.start(plan.run, plan.resumed, training.init(adapter, base, tx))
    task = task_of(plan)
    evaluate = heldout.losses(config, plan.held, task, state.adapter, base, connect)
    before = evaluate(state)
    seen = int(state.step)
    say(
        f"training on {len(plan.clips.clips)} clips, {config.steps} steps"
        + (f", after {seen} batches seen" if seen else "")
    )
    if before is not None:
        say(heldout.told("before", before))
    key = jax.random.key(config.seed)
    step = training.make_train_step(task, tx, key)
    batches = latents.batches(plan.clips, connect, config.batch_size, seed=config.seed)
    sample: Sample = loop.NOTHING.sample
    if plan.samples is not None and shown is not None:
        sample = validation.sampler(plan.samples, shown, parameters)
        for name, line in plan.samples.warnings:
            say(f"warning: {name}: {line}")
    asked = hooks(plan, task, key, base, evaluate, before=before, sample=sample)
    state, signal = loop.train(plan.run, step, state, base, batches, asked)
    after = None if signal else evaluate(state)
    if after is not None:
        say(heldout.told("after", after))
    return Result(state, runs.exported(plan.run, state), before, after, signal)

"""What `train.py` does: a configuration in, an adapter out.

    plan(config) -> Fit     settings, data and output folder checked; no weights yet
    fit(plan) -> Result     weights, training loop, held-out loss before and after

The connectors run when a clip is read, ahead of its use; the base is frozen, so that
the training state holds the adapter and its optimizer only. In mode "full" it holds the
transformer's parameters instead, and nothing is frozen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from idlora_jax import (
    adapters,
    diagnosis,
    distributed,
    experiment,
    heldout,
    loop,
    optimizers,
    outlines,
    parallel,
    prompts,
    run_files,
    runs,
    shares,
    strategies,
    training,
    validation,
    wandb_run,
)
from idlora_jax.config import TransformerConfig
from idlora_jax.data import collection, latents, reading
from idlora_jax.data.collection import Collection
from idlora_jax.data.order import Order
from idlora_jax.experiment import Strategy, TrainConfig
from idlora_jax.heldout import Losses, Numbers
from idlora_jax.model import transformer
from idlora_jax.records import Sampled
from idlora_jax.runs import Run
from idlora_jax.sessions import Loaded
from idlora_jax.strategies import Batch
from idlora_jax.training import Task, TrainState
from idlora_jax.types import Tree
from idlora_jax.validation import Planned
from idlora_jax.weights import io, networks
from idlora_jax.weights.check import verify_watched
from idlora_jax.weights.networks import Networks

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
        resumed: steps already taken; None: a new run.
        samples: what is sampled while training goes on, or None.
    """

    run: Run
    nets: Networks
    clips: Collection
    held: Collection
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


def check_base(config: TrainConfig) -> None:
    """Refuse to train a base itself that holds its kernels in int8.

    Raises:
        ValueError: if it does.
    """
    if config.mode == "full" and outlines.stored_as(config.base) == "int8":
        raise ValueError(
            f"mode: got 'full' with {config.base}, whose kernels are in int8, expected "
            "a base that is not; use the one that it was converted from, or mode 'lora'"
        )


def plan(config: TrainConfig) -> Fit:
    """Check everything that can be checked without reading weights.

    Raises:
        ValueError: naming what was got, what was expected, and what to do.
    """
    wandb_run.check(config)
    index = collection.index(config.data, folders(config.strategy))
    clips, held = collection.split(index, config.heldout.clips)
    collection.require_batches(clips, config.batch_size)
    if config.verify:
        verify_watched(io.open_base(config.base))
    nets, _ = networks.load(config.base, ())
    shares.mesh_of(config.mesh, nets.transformer)
    config = experiment.of_generation(config, nets.generation)
    check_base(config)
    check_targets(config, io.shapes(io.open_base(config.base), "transformer"))
    facts = {"base": nets.base_hash, "clips": run_files.fingerprint(index)}
    full = functools.partial(run_files.export_base, like=config.base)
    export = full if config.mode == "full" else None
    run = Run(config, run_files.meta(config, nets, index), facts, export)
    return Fit(run, nets, clips, held, runs.newest(run), validation.plan(run))


def task_for(
    config: TrainConfig, cfg: TransformerConfig, fps: float, mesh: Mesh | None = None
) -> Task:
    """The transformer's functions with a run's settings.

    Args:
        config: the settings.
        cfg: the transformer.
        fps: frames per second of the clips.
        mesh: devices that a step is divided over.
    """
    scanned = ("params" if config.mode == "full" else "lora",)
    options: dict[str, Any] = {"remat": config.remat, "without": config.without}
    options |= {"scanned": scanned, "mesh": mesh, "numerics": config.numerics}
    return Task(
        apply=transformer.bind(cfg, **options),
        prepare=functools.partial(transformer.prepare, cfg, numerics=config.numerics),
        spec=config.strategy,
        fps=fps,
        scale=config.lora.factor,
        dtype=jnp.dtype(config.dtype),
        numerics=config.numerics,
        rounding="train_bf16" if config.numerics == "reference" else None,
        dropout=config.lora.dropout,
        mode=config.mode,
        accumulation=config.optimizer.accumulation,
    )


def task_of(fit: Fit, mesh: Mesh | None = None) -> Task:
    """The transformer's functions with the run's settings."""
    return task_for(fit.run.config, fit.nets.transformer, fit.clips.fps, mesh)


def trained(
    config: TrainConfig, base: Tree, mesh: Mesh | None = None
) -> tuple[Tree, Tree]:
    """What is trained, in float32, and what is frozen: nothing in mode "full"."""
    lora, full = config.lora, config.mode == "full"

    def adapter(base: Tree) -> Tree:
        key = jax.random.key(lora.seed)
        return adapters.init(key, base, lora.rank_of, lora.targets)

    def whole(base: Tree) -> Tree:
        return jax.tree.map(lambda w: w.astype(jnp.float32), base)

    return shares.made(whole if full else adapter, mesh, base), {} if full else base


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
        stored = run_files.as_stored(params, config.base)
        return jax.tree.map(lambda w, kind: w.astype(kind), stored, kinds)

    return exported


def _silent(line: str) -> None:
    """What other processes than the first say."""


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
    """What the loop asks: losses, samples, what is not finite.

    Args:
        plan: from `plan`.
        task: from `task_of`.
        key: the run's.
        base: what is frozen.
        evaluate: from a state to its held-out losses.
        before: those before the first step.
        sample: see `loop.Hooks`.
    """
    config = plan.run.config

    def explain(state: TrainState, batch: Batch, names: Sequence[str]) -> str:
        found = diagnosis.first(task, key, state, base, batch)
        return diagnosis.told(found, names)

    def validate(updates: int, state: TrainState) -> dict[str, float] | None:
        every = config.validate_every
        if not updates:
            return before
        return evaluate(state) if every and updates % every == 0 else None

    return loop.Hooks(validate=validate, sample=sample, explain=explain)


@contextlib.contextmanager
def reading_of(
    plan: Fit, connect: latents.Connect, mesh: Mesh | None, seen: int
) -> Iterator[tuple[loop.Batches, reading.Batches, reading.Reader]]:
    """The batches of a run, read ahead: of each, a process reads its own rows.

    Args:
        plan: from `plan`.
        connect: the connectors.
        mesh: devices that a batch is divided over.
        seen: steps before; the saved position of the reader must be behind them.

    Returns:
        From the number of steps taken to the next one's batch on its devices; what
        knows the names of its clips, and what knows the position.

    Raises:
        ValueError: if the saved position is another one.
    """
    config = plan.run.config
    size = config.clips_per_step
    rows = parallel.own_rows(mesh, size)
    order = Order(plan.clips.counts, size, config.seed)
    data = reading.batches(plan.clips, connect, order, count=config.steps, rows=rows)
    position = runs.position(plan.run, plan.resumed)
    ahead = {"ahead": config.read_ahead, "seen": seen, "position": position}
    with reading.opened(data, **ahead) as reader:
        whole = lambda seen: parallel.from_own_rows(reader(seen), mesh, size)
        yield whole, data, reader


def _load(config: TrainConfig, mesh: Mesh | None) -> Iterator[Tree]:
    """The connectors' parameters, then the transformer's."""
    options: dict[str, Any] = {
        "dtype": jnp.dtype(config.dtype),
        "weights": config.weights,
        "weights_in": config.weights_in,
    }
    # Each process connects the prompts of its own clips, on its own device.
    yield networks.load(config.base, ("text_connector",), **options)[1]
    found = networks.load(config.base, ("transformer",), mesh=mesh, **options)[1]
    yield found.pop("transformer")


def connector(plan: Fit, params: Tree) -> latents.Connect:
    """From stored features to prompts, given {"text_connector": its parameters}."""
    nets, numerics = plan.nets, plan.run.config.numerics

    def connect(features: Any, mask: Any) -> Any:
        return prompts.prompts(nets, params, features, mask, numerics=numerics)

    return connect


def _read(
    plan: Fit, mesh: Mesh | None
) -> tuple[Tree, Tree, Callable[[Tree], Tree], latents.Connect]:
    """What is trained, what is frozen, see `served`, and the connectors."""
    params, read = _load(plan.run.config, mesh)
    made, base = trained(plan.run.config, read, mesh)
    return made, base, served(plan, read, base), connector(plan, params)


def _sample(
    plan: Fit, shown: Loaded | None, parameters: Callable[[Tree], Tree], say: Say
) -> Sample:
    """What samples clips on the way, after what is to be said of them."""
    if plan.samples is None or shown is None:
        return loop.NOTHING.sample
    for name, line in plan.samples.warnings:
        say(f"warning: {name}: {line}")
    return validation.sampler(plan.samples, shown, parameters)


def fit(plan: Fit, say: Say = print) -> Result:
    """Load the weights, train, save.

    Args:
        plan: from `plan`.
        say: takes lines for the user.

    Raises:
        ValueError: if weights are missing or do not fit, or the loss is not finite.
        OSError: if something cannot be written.
    """
    config = plan.run.config
    mesh = shares.mesh_of(config.mesh, plan.nets.transformer)
    say = say if distributed.is_first() else _silent
    # Before the base is read: the text encoder and it are never in memory together.
    shown = None if plan.samples is None else validation.load(plan.samples, say)
    made, base, parameters, connect = _read(plan, mesh)
    tx = optimizers.make_optimizer(config.optimizer, config.steps, ema=config.ema)
    state = training.init(made, base, tx, mesh)
    del made  # is in the state, which may be replaced
    places = shares.places_of(state, mesh)
    state = runs.start(plan.run, plan.resumed, state)
    task = task_of(plan, mesh)
    given = config, plan.held, task, state.adapter, base, connect, mesh
    evaluate = heldout.losses(*given)
    del given
    before, seen = evaluate(state), int(state.step)
    after_some = f", of which {seen} are taken" if seen else ""
    say(f"training on {len(plan.clips.clips)} clips, {config.steps} steps{after_some}")
    if before is not None:
        say(heldout.told("before", before))
    key = jax.random.key(config.seed)
    step = training.make_train_step(task, tx, key, places)
    sample = _sample(plan, shown, parameters, say)
    asked = hooks(plan, task, key, base, evaluate, before=before, sample=sample)
    with reading_of(plan, connect, mesh, seen) as (batches, data, reader):
        asked = replace(asked, names=data.names, position=reader.position)
        state, signal = loop.train(plan.run, step, state, base, batches, asked)
    after = None if signal else evaluate(state)
    if after is not None:
        say(heldout.told("after", after))
    return Result(state, runs.exported(plan.run, state), before, after, signal)

"""All that a run compiles, compiled without its weights: `--precompile`.

    for row in samples(session): ...     of `sample.py`
    for row in training(plan): ...       of `train.py`

The code of a run goes through with shapes in place of weights, as their files' headers
say them (see `programs`): every stage, encoding and decoding; or the evaluation, a step
for every size of clips, and the clips that are sampled on the way. With the persistent
cache (`compile_cache`), the run that follows compiles nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape
from jax.sharding import Mesh

from idlora_jax import (
    adapters,
    fitting,
    heldout,
    hosted,
    jobs,
    optimizers,
    outlines,
    parallel,
    programs,
    prompt_cache,
    prompts,
    sampling,
    sessions,
    shares,
    validation,
)
from idlora_jax import training as steps
from idlora_jax.data import latents, tokenize
from idlora_jax.fitting import Fit
from idlora_jax.programs import Compiled
from idlora_jax.sessions import Loaded, Outcome, Session
from idlora_jax.training import TrainState
from idlora_jax.types import Prompt, Tree


def _placed(params: Mapping[str, Tree], mesh: Mesh | None) -> dict[str, Tree]:
    """Shapes of networks' parameters that say where on a mesh they would be."""
    if mesh is None:
        return dict(params)

    def one(name: str, keys: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        place = parallel.sharding(mesh, f"{name}/{path}", leaf.shape)
        place = hosted.on_host(place) if hosted.is_host(leaf) else place
        return Shape(leaf.shape, leaf.dtype, sharding=place)

    return {
        name: jax.tree.map_with_path(lambda k, x, name=name: one(name, k, x), tree)
        for name, tree in params.items()
    }


def _texts(session: Session) -> dict[str, Prompt]:
    """Zeros for the prompts of all samples; what encodes new ones is compiled."""
    found, config = session.found, session.todo[0]
    wanted = dict.fromkeys(
        t for c in session.todo for t in (c.prompt, c.negative_prompt)
    )
    tokenizer = tokenize.load(config.text_encoder)
    args = (config, found.nets, [*wanted], jobs.text_parts(config, found))
    if prompt_cache.lacking(*args):
        params = outlines.parameters(
            config.base,
            text_encoder_path=config.text_encoder,
            dtype=config.dtype,
            names=("text_connector",),
        )
        params = _placed(params, sampling.mesh_of(config))
        made = prompts.features(found.nets, params, tokenizer, [*wanted][:1])
        prompts.prompts(found.nets, params, *made, numerics=config.numerics)
    shapes = prompt_cache.shapes_of(found.nets, tokenizer)
    zeros = (np.zeros(shape, jnp.dtype(config.dtype)) for shape in shapes)
    return dict.fromkeys(wanted, Prompt(*zeros))


def _loaded(session: Session) -> Loaded:
    """What `sessions.load` gives, in shapes."""
    config, nets = session.todo[0], session.found.nets
    params = outlines.parameters(
        config.base,
        upsampler_path=None if nets.upsampler is None else config.upsampler,
        dtype=config.dtype,
        choice=config.weights,
        where=config.weights_in,
        names=sampling.MEDIA_SIDE,
    )
    return Loaded(_placed(params, sampling.mesh_of(config)), _texts(session))


def samples(session: Session) -> tuple[list[Compiled], list[Outcome]]:
    """Compile what a session's samples need.

    Args:
        session: from `sessions.prepare`.

    Returns:
        What was compiled, and the samples for which that was not possible.

    Raises:
        ValueError: if weights are missing or do not fit.
    """
    with programs.collected() as rows:
        failed = _rehearsed(session)
    return rows, failed


def _rehearsed(session: Session) -> list[Outcome]:
    return [*sessions.rehearse(session, _loaded(session))] if session.todo else []


def _state(
    plan: Fit, read: Tree, tx: Any, mesh: Mesh | None
) -> tuple[TrainState, Tree]:
    """A new training state, and what is frozen; in mode "full", in shapes.

    Arrays are held to their devices, as those of a run are.
    """
    config = plan.run.config
    if config.mode == "lora":
        made, base = fitting.trained(config, read, mesh)
        state = steps.init(made, base, tx, mesh)
        return jax.device_put(state, jax.tree.map(lambda x: x.sharding, state)), base
    start = lambda read: steps.init(*fitting.trained(config, read), tx)
    state = jax.eval_shape(start, read)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = shares.places_of(state, mesh) or jax.tree.map(lambda _: one, state)
    held = lambda x, place: Shape(x.shape, x.dtype, sharding=place)
    return jax.tree.map(held, state, places), {}


def training(plan: Fit) -> tuple[list[Compiled], list[Outcome]]:
    """Compile what a run needs: its evaluation, a step of each size, sampled clips.

    Args:
        plan: from `fitting.plan`; a clip of each size is read.

    Returns:
        What was compiled, and the samples for which that was not possible.

    Raises:
        ValueError: if weights are missing or do not fit, or clips are damaged.
    """
    config, nets = plan.run.config, plan.nets
    mesh = shares.mesh_of(config.mesh, nets.transformer)
    options: dict[str, Any] = {"dtype": config.dtype, "choice": config.weights}
    options["where"] = config.weights_in
    names = ("text_connector", "transformer")
    params = outlines.parameters(config.base, names=names, **options)
    read = _placed({"transformer": params.pop("transformer")}, mesh)["transformer"]
    connect = fitting.connector(plan, params)
    tx = optimizers.make_optimizer(config.optimizer, config.steps, ema=config.ema)
    key, task = jax.random.key(config.seed), fitting.task_of(plan, mesh)
    size = config.clips_per_step
    with programs.collected() as rows:
        state, base = _state(plan, read, tx, mesh)
        given = config, plan.held, task, state.adapter, base, connect, mesh
        heldout.losses(*given)(state)
        step = steps.make_train_step(task, tx, key, shares.places_of(state, mesh))
        for bucket in plan.clips.buckets:
            own = len(parallel.own_rows(mesh, size))
            clips = itertools.islice(itertools.cycle(bucket.clips), own)
            some = replace(bucket, clips=tuple(clips))
            batch = latents.whole(some, connect)
            batch = parallel.from_own_rows(batch, mesh, size)
            step.compile(state, base, batch)
        # What is logged and exported.
        optimizers.learning_rate(config.optimizer, config.steps)(0)
        if config.mode == "lora":
            adapters.scale(jax.device_get(state.evaluated), config.lora.factor)
        failed: list[Outcome] = []
        if plan.samples is not None:
            failed = _rehearsed(_clips(plan.samples, state))
    return rows, failed


def _clips(planned: validation.Planned, state: TrainState) -> Session:
    """The clips before the first step."""
    run = planned.run
    args = run.config.output, run.adapter(0), state.adapter, run.meta
    return validation.session(planned, validation.Now(validation.FOLDER, *args))

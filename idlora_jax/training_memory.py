"""What a training run needs of a device, before anything is put there.

    of(outline) -> MemoryPlan       from shapes and traced functions alone

Weights, adapter, optimizer and gradients are exact. What a step and the held-out
evaluation need for their own work is estimated from their traced operations
(`liveness`), with the run's remat policy, and so is the update. Compared with what XLA
says of compiled steps of a small model in float32: 0.9 to 1.2 times as large for the
activations of each policy in XLA's default order on CPU, 1.1 to 1.4 times where it
orders operations to save memory; of the update 0.4 times (8-bit moments, default
order) and more.

With a mesh, the numbers are of one device: its part of the base and of the state, its
clips. Its work is that of whole widths: `tensor` makes it less than estimated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from idlora_jax import axes, geometry, jobs, liveness, memory, shares
from idlora_jax.experiment import TrainConfig
from idlora_jax.memory import Device
from idlora_jax.phases import MemoryPlan, Phase
from idlora_jax.training_outlines import Outline
from idlora_jax.validation import Planned

Rows = list[tuple[str, int]]


def device_of(config: TrainConfig, platform: str = "gpu") -> Device:
    """One of the devices of a run."""
    return Device(platform, axes.parse(config.mesh))


def _part(tree: Any, device: Device) -> int:
    """Bytes of one device's part of what is trained, or of what belongs to it."""
    if not device.mesh:
        return memory.size(tree)
    sizes = tuple(device.mesh.get(axis, 1) for axis in axes.AXES)
    places = shares.places_of(tree, AbstractMesh(sizes, axes.AXES))

    def one(leaf: Any, place: NamedSharding) -> int:
        shape = place.shard_shape(tuple(leaf.shape))
        return liveness.nbytes(jax.ShapeDtypeStruct(shape, leaf.dtype))

    return sum(jax.tree.leaves(jax.tree.map(one, tree, places)))


def _base(outline: Outline, device: Device) -> Rows:
    """What is loaded."""
    return [
        (name.replace("_", " "), device.held(tree, name))
        for name, tree in outline.params.items()
    ]


def _state(outline: Outline, device: Device) -> Rows:
    """What training changes, by what it is for."""
    state = outline.state
    own = _part(state.adapter, device)
    average = 0 if state.ema is None else _part(state.ema, device)
    moments = _part(state[1:], device) - average
    name = "adapter" if outline.config.mode == "lora" else "trained"
    return [(name, own), ("optimizer", moments), ("average", average)]


def _held(outline: Outline) -> int:
    """The clips of the evaluation, their noise, and predictions without the adapter."""
    if outline.evaluation is None:
        return 0
    batch, made = outline.batch(outline.held), outline.evaluation.jaxpr.outvars
    noise = sum(liveness.nbytes(x) for x in jax.tree.leaves(outline.noise))
    return memory.size(batch) + noise + sum(liveness.nbytes(v.aval) for v in made)


def _between(outline: Outline, device: Device) -> Rows:
    """All that is there between steps."""
    config, base = outline.config, dict(_base(outline, device))
    copies = 0
    if config.mode == "full":
        del base["transformer"]
    else:
        copies = device.widened(outline.frozen, "blocks")
    more = ("float32 copies", copies), ("held-out clips", _held(outline))
    return [*base.items(), *_state(outline, device), *more]


def _phase(name: str, rows: Rows, work: int) -> Phase:
    return Phase(name, tuple((what, n) for what, n in rows if n), max(0, work))


def _load(outline: Outline, device: Device) -> Phase:
    """The base on its way: the host holds one stack beside it, which on CPU counts."""
    largest = max(map(liveness.nbytes, jax.tree.leaves(dict(outline.params))))
    work = largest if device.platform == "cpu" else 0
    if outline.config.mode == "full":
        work = max(work, _part(outline.state.adapter, device))
    return _phase("load", _base(outline, device), work)


def _step(outline: Outline, device: Device, rows: Rows) -> Phase:
    """A step: forwards and backwards, then the update, which a mesh divides."""
    adapter, count = outline.state.adapter, len(jax.tree.leaves(outline.state))
    whole, part = memory.size(adapter), _part(adapter, device)
    # Of several batches there are their sum and that of the one at hand.
    trees = 1 if outline.config.optimizer.accumulation == 1 else 2
    work = liveness.temporary(outline.step, donated=count) - trees * whole
    if part < whole:
        idle = liveness.temporary(outline.idle_step, donated=count) - trees * whole
        work = max(idle, round(work * part / whole))
    batch = memory.size(outline.batch(outline.share))
    sums = "accumulated gradients", (trees - 1) * part
    more = [("batch", batch), ("gradients", part), sums]
    return _phase("training step", rows + more, work)


def _save(outline: Outline, device: Device, rows: Rows) -> Phase:
    """What is exported is scaled on the device; copies for the background are on the
    host, which is the device on CPU."""
    state, config, work = outline.state, outline.config, 0
    if config.mode == "lora":
        leaves = jax.tree_util.tree_leaves_with_path(state.adapter)
        work = sum(liveness.nbytes(x) for path, x in leaves if path[-1].key == "b")
    if config.optimizer.name == "schedule_free":
        work += _part(state.adapter, device)
    if device.platform == "cpu":
        work += memory.size(state)
    return _phase("save", rows, work)


def _samples(planned: Planned, device: Device, rows: Rows) -> Phase:
    """The part of sampling that needs most, beside what training holds."""
    one = Device(device.platform)

    def plans() -> Iterator[MemoryPlan]:
        for config in planned.configs:
            job, inputs = jobs.read(config, planned.found)
            yield memory.for_job(job, inputs, device=one, encodes=False)

    phases = (phase for plan in plans() for phase in plan.phases)
    most = max(phases, key=lambda phase: phase.total)
    held = dict(rows)
    adapter = "adapter, scaled", held.get("adapter", 0)
    every = [*{**dict(most.resident), **held}.items(), adapter]
    return _phase("samples", every, most.temporary)


def _title(outline: Outline, device: Device) -> str:
    config = outline.config
    frames, height, width, _ = outline.clips.like.video.shape
    unit = geometry.PIXELS_PER_LATENT
    size = f"{geometry.FRAMES_PER_LATENT * (frames - 1) + 1} frames of "
    size += f"{unit * width} x {unit * height}"
    mesh = "".join(f", {axis}={n}" for axis, n in device.mesh.items())
    return (
        f"training, batch {config.batch_size}, {size}, {config.dtype}, remat "
        f"{config.remat}, {config.optimizer.name}{mesh}"
    )


def of(
    outline: Outline, device: Device | None = None, planned: Planned | None = None
) -> MemoryPlan:
    """The memory plan of a training run; nothing is allocated.

    Args:
        outline: the run.
        device: what runs it (default: a GPU, as many as the run's mesh has).
        planned: what is sampled on the way.
    """
    device = device or device_of(outline.config)
    rows = _between(outline, device)
    phases = [_load(outline, device), _step(outline, device, rows)]
    if outline.evaluation is not None:
        work = liveness.temporary(outline.evaluation)
        phases.append(_phase("held-out loss", rows, work))
    if planned is not None:
        phases.append(_samples(planned, device, rows))
    phases.append(_save(outline, device, rows))
    on_host = device.hosted(outline.params["transformer"], "transformer")
    on_host = 0 if device.platform == "cpu" else on_host
    return MemoryPlan(_title(outline, device), tuple(phases), on_host)

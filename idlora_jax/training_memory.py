"""What a training run needs of a device, before anything is put there.

    of(outline) -> MemoryPlan       from shapes and traced functions alone
    check(outline, plan)            raises if it does not fit, and says what would help

Weights, adapter, optimizer and gradients are exact. What a step and the held-out
evaluation need for their own work is estimated from their traced operations
(`liveness`), with the run's remat policy, and so is the update. Compared with what XLA
says of compiled steps of a small model in float32: 1.0 to 1.1 times as large for the
activations of each policy in XLA's default order on CPU, 1.1 to 1.4 times where it
orders operations to save memory; of the update 0.4 (8-bit moments, default order) to
1.6 times (accumulation).

With a mesh, the numbers are of one device: its part of the base and of the state, its
clips. Its work is that of whole widths: `tensor` makes it less than estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from idlora_jax import axes, geometry, liveness, memory, shares, training_outlines
from idlora_jax.experiment import TrainConfig
from idlora_jax.fitting import Fit
from idlora_jax.memory import Device
from idlora_jax.phases import GB, MemoryPlan, Phase
from idlora_jax.training_outlines import Outline, of_collection

Rows = list[tuple[str, int]]
Change = dict[str, Any]


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
        (name.replace("_", " "), memory.size(tree, name, device.mesh))
        for name, tree in outline.params.items()
    ]


def _state(outline: Outline, device: Device) -> Rows:
    """What training changes, by what it is for."""
    state = outline.state
    own = _part(state.adapter, device)
    average = 0 if state.ema is None else _part(state.ema, device)
    waiting = _part(getattr(state.opt_state, "acc_grads", ()), device)
    moments = _part(state[1:], device) - average - waiting
    name = "adapter" if outline.config.mode == "lora" else "trained"
    sums = "accumulated gradients"
    return [(name, own), ("optimizer", moments), ("average", average), (sums, waiting)]


def _between(outline: Outline, device: Device) -> Rows:
    """All that is there between steps."""
    config, base = outline.config, dict(_base(outline, device))
    copies = 0
    if config.mode == "full":
        del base["transformer"]
    else:
        copies = device.widened(outline.frozen, "blocks")
    held = memory.size(outline.batch(outline.held)) if config.heldout.clips else 0
    more = ("float32 copies", copies), ("held-out clips", held)
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
    work = liveness.temporary(outline.step, donated=count) - whole
    if part < whole:
        idle = liveness.temporary(outline.idle_step, donated=count) - whole
        work = max(idle, round(work * part / whole))
    batch = memory.size(outline.batch(outline.share))
    more = [("batch", batch), ("gradients", part)]
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


def of(outline: Outline, device: Device | None = None) -> MemoryPlan:
    """The memory plan of a training run; nothing is allocated.

    Args:
        outline: the run, for as many `parts` as the device's mesh has.
        device: what runs it (default: a GPU).
    """
    device = device or Device()
    rows = _between(outline, device)
    phases = [_load(outline, device), _step(outline, device, rows)]
    if outline.evaluation is not None:
        work = liveness.temporary(outline.evaluation)
        phases.append(_phase("held-out loss", rows, work))
    phases.append(_save(outline, device, rows))
    return MemoryPlan(_title(outline, device), tuple(phases))


def _named(changes: Change) -> str:
    """Settings as the command line takes them."""
    return " ".join(f"--{name.replace('_', '-')} {v}" for name, v in changes.items())


def _applied(config: TrainConfig, changes: Change) -> TrainConfig:
    """`{"optimizer.name": "lion"}` in place of what the settings say."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        inner = replace(getattr(config, first), **{rest: value}) if rest else value
        config = replace(config, **{first: inner})
    return config


def _groups(outline: Outline) -> Iterator[list[Change]]:
    """Settings that need less; each list from the least change on."""
    config = outline.config
    policies = ("none", "selective", "full")
    lighter = policies[policies.index(config.remat) + 1 :]
    yield [{"remat": policy} for policy in lighter]
    if config.optimizer.name == "adamw":
        yield [{"optimizer.name": "adamw8bit"}]
    if config.mode == "lora" and config.fp8 == "upcast" and outline.narrow:
        yield [{"fp8": "keep"}]
    size, times = config.batch_size, config.optimizer.accumulation
    smaller = [n for n in range(size - 1, 0, -1) if size % n == 0]
    yield [
        {"batch_size": n, "optimizer.accumulation": times * size // n}
        for n in smaller
        if n % outline.parts == 0
    ]
    if config.heldout.clips > 1:
        yield [{"heldout.clips": 1}]


def helps(outline: Outline, device: Device, most: int) -> list[str]:
    """The settings each of which would make a run fit, and what it would need then.

    Where none does alone, all of them together are tried.

    Args:
        outline: the run, which does not fit.
        device: what runs it.
        most: its bytes.
    """

    def needs(changes: Change) -> int:
        other = outline.other(_applied(outline.config, changes))
        return of(other, device).peak.total

    said: list[str] = []
    groups = [group for group in _groups(outline) if group]
    for group in groups:
        sizes = ((changes, needs(changes)) for changes in group)
        fits = next(((c, n) for c, n in sizes if n <= most), None)
        said += [f"{_named(fits[0])} ({fits[1] / GB:.2f} GB)"] if fits else []
    if not said and len(groups) > 1:
        every = {name: v for group in groups for name, v in group[-1].items()}
        peak = needs(every)
        said = [f"{_named(every)} ({peak / GB:.2f} GB)"] if peak <= most else []
    return said


def check(
    outline: Outline,
    found: MemoryPlan,
    device: Device,
    most: int | None,
    kind: str | None = None,
) -> str | None:
    """What is to be said of a run that does not fit; None if it does.

    Args:
        outline: the run; its setting `memory` says what happens.
        found: its plan.
        device: what runs it.
        most: its bytes, or None.
        kind: what it is called (default: as the first device is).

    Raises:
        ValueError: if it does not fit, and `memory` is "check": what is needed, what
            there is, and which settings help.
    """

    def others(most: int) -> Iterator[str]:
        if kind is None:
            yield from memory.held_back(device, found, most)
        yield from helps(outline, device, most)

    return memory.verdict(found, most, outline.config.memory, others, kind)


def announce(fit: Fit, say: Callable[[str], Any]) -> None:
    """Print the plan of a run and check it, before anything is on a device.

    Args:
        fit: from `fitting.plan`; its setting `memory` "off" leaves all of it away.
        say: takes lines for the user.

    Raises:
        ValueError: see `check`.
    """
    config = fit.run.config
    if config.memory == "off":
        return
    device = Device(jax.default_backend(), axes.parse(config.mesh))
    largest = of_collection(fit.clips)
    outline = training_outlines.of(config, fit.nets, largest, axes.parts(device.mesh))
    found = of(outline, device)
    say(found.table())
    line = check(outline, found, device, memory.limit())
    if line is not None:
        say(f"warning: {line}")

"""Whether a training run fits its device, and which settings would make it fit.

announce(fit, say)          the plan of a run, before anything is on a device
check(outline, plan, ...)   raises if it does not fit, and says what would help
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax

from idlora_jax import lighter, memory, training_memory, training_outlines
from idlora_jax.experiment import TrainConfig
from idlora_jax.fitting import Fit
from idlora_jax.memory import Device
from idlora_jax.phases import GB, MemoryPlan
from idlora_jax.training_outlines import Outline
from idlora_jax.validation import Planned

Change = dict[str, Any]
ASSUMED = 8
"""Devices that an assumed machine may have."""


def _applied(config: TrainConfig, changes: Change) -> TrainConfig:
    """`{"optimizer.name": "lion"}` in place of what the settings say, all at once."""
    found: Change = {}
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        before = found.get(first, getattr(config, first))
        found[first] = replace(before, **{rest: value}) if rest else value
    return replace(config, **found)


def _streaming(config: TrainConfig, changes: Change) -> Change:
    """The settings with the policy that goes with weights in host memory."""
    lacks = "weights_in" in changes and config.remat != "full"
    return {**changes, "remat": "full"} if lacks else changes


def _groups(outline: Outline, platform: str) -> Iterator[list[Change]]:
    """Settings that need less; each list from the least change on."""
    config = outline.config
    policies = ("none", "selective", "full")
    rest = policies[policies.index(config.remat) + 1 :]
    yield [{"remat": policy} for policy in rest]
    if config.optimizer.name == "adamw":
        yield [{"optimizer.name": "adamw8bit"}]
    if config.mode == "lora":
        asked = config.weights, config.weights_in, config.base, platform
        groups = lighter.weights(*asked)
        yield from [[_streaming(config, c) for c in group] for group in groups]
    size, times = config.batch_size, config.optimizer.accumulation
    smaller = [n for n in range(size - 1, 0, -1) if size % n == 0]
    yield [
        {"batch_size": n, "optimizer.accumulation": times * size // n}
        for n in smaller
        if n % outline.parts == 0
    ]
    if config.heldout.clips > 1:
        yield [{"heldout.clips": 1}]


def _meshes(outline: Outline, devices: int) -> Iterator[list[Change]]:
    """Divisions over more devices, from the fewest on."""
    config, cfg = outline.config, outline.nets.transformer
    counts = () if config.mesh else range(2, devices + 1)
    heads = math.gcd(cfg.video.heads, cfg.audio.heads)
    for axis, whole in (("fsdp", config.batch_size), ("tensor", heads)):
        yield [{"mesh": f"{axis}={n}"} for n in counts if whole % n == 0]


def helps(
    outline: Outline,
    platform: str,
    most: int,
    *,
    devices: int = 1,
    planned: Planned | None = None,
) -> list[str]:
    """The settings each of which would make a run fit, and what it would need then.

    Where none does alone, those of them that need no more devices are tried together.

    Args:
        outline: the run, which does not fit.
        platform: what runs it.
        most: bytes of each device.
        devices: how many there are.
        planned: what is sampled on the way.
    """

    def needs(changes: Change) -> int:
        other = outline.other(_applied(outline.config, changes))
        device = training_memory.device_of(other.config, platform)
        return training_memory.of(other, device, planned).peak.total

    said: list[str] = []
    own = [group for group in _groups(outline, platform) if group]
    for group in (*own, *_meshes(outline, devices)):
        sizes = ((changes, needs(changes)) for changes in group)
        fits = next(((c, n) for c, n in sizes if n <= most), None)
        said += [f"{lighter.named(fits[0])} ({fits[1] / GB:.2f} GB)"] if fits else []
    if not said and len(own) > 1:
        every = {name: v for group in own for name, v in group[-1].items()}
        peak = needs(every)
        said = [f"{lighter.named(every)} ({peak / GB:.2f} GB)"] if peak <= most else []
    return said


def check(
    outline: Outline,
    found: MemoryPlan,
    device: Device,
    most: int | None,
    *,
    kind: str | None = None,
    planned: Planned | None = None,
) -> str | None:
    """What is to be said of a run that does not fit; None if it does.

    Args:
        outline: the run; its setting `memory` says what happens.
        found: its plan.
        device: what runs it.
        most: its bytes, or None.
        kind: what it is called, where it is assumed; None: it is here.
        planned: what is sampled on the way.

    Raises:
        ValueError: if it does not fit, and `memory` is "check": what is needed, what
            there is, and which settings help.
    """
    here = kind is None

    def others(most: int) -> Iterator[str]:
        if here:
            yield from memory.held_back(device, found, most)
        options: dict[str, Any] = {"devices": jax.device_count() if here else ASSUMED}
        yield from helps(outline, device.platform, most, planned=planned, **options)

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
    device = training_memory.device_of(config, jax.default_backend())
    largest = training_outlines.of_collection(fit.clips)
    outline = training_outlines.of(config, fit.nets, largest)
    found = training_memory.of(outline, device, fit.samples)
    say(found.table())
    line = check(outline, found, device, memory.limit(), planned=fit.samples)
    if line is not None:
        say(f"warning: {line}")

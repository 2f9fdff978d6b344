"""What a training run is and what it will need, without running it: `--dry-run`.

    for report in reports(config):
        print(report)

Settings, files and data are checked as a run checks them. Nothing is read but headers
and one clip, nothing is written, and nothing is put on a device, so that full-size runs
can be looked at anywhere. Where base or data are not there, the published architecture
and clips as `assume` says stand in for them, and the first lines say so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax

from idlora_jax import (
    experiment,
    fitting,
    flops,
    geometry,
    memory,
    norms,
    parallel,
    quantized,
    training_checks,
    training_memory,
    training_outlines,
)
from idlora_jax.data import collection
from idlora_jax.data.collection import Collection
from idlora_jax.data.latents import Clip
from idlora_jax.experiment import TrainConfig
from idlora_jax.fitting import Fit
from idlora_jax.memory import Device
from idlora_jax.phases import GB
from idlora_jax.training_outlines import Nets, Outline
from idlora_jax.types import Tree
from idlora_jax.validation import Planned
from idlora_jax.weights import networks

HOUR = 3600.0


@dataclass(frozen=True)
class Seen:
    """What was found.

    Attributes:
        outline: the run.
        device: whose memory is planned.
        most: bytes that it has; None: nothing tells.
        clips: (to train on, held out); None: there is no data.
        notes: what was not there, and what stands in for it.
        samples: what is sampled on the way, where all is there.
    """

    outline: Outline
    device: Device
    most: int | None
    clips: tuple[Sequence[Clip], Sequence[Clip]] | None
    notes: tuple[str, ...] = ()
    samples: Planned | None = None

    @property
    def config(self) -> TrainConfig:
        """The settings, for the base's generation."""
        return self.outline.config


def _device(config: TrainConfig) -> tuple[Device, int | None, list[str]]:
    """Whose memory is planned, how much it has, and what is to be said of it."""
    assume, here = config.assume, jax.default_backend()
    platform = assume.platform or ("gpu" if here == "cpu" else here)
    most, notes = None, []
    if assume.memory_gb is not None:
        most = round(assume.memory_gb * GB)
    elif platform == here:
        most = memory.limit()
    if platform != here:
        missing = "" if most else "; --assume.memory-gb says what it has"
        notes.append(
            f"memory is planned for a {platform}, which is not here: attention counts "
            f"as on this {here}{missing}"
        )
    return training_memory.device_of(config, platform), most, notes


def _stand_in(config: TrainConfig) -> tuple[Nets, str]:
    """The published networks in place of a base that is not there."""
    if config.generation is None:
        raise ValueError(
            f"base: there is no {config.base}, and the settings do not say of which "
            "generation it would be; give --generation 2.0 or 2.3, or make it"
        )
    nets, _ = training_outlines.built_in(config.generation)
    kept = {
        "upcast": "",
        "keep": ", its blocks in 8 bits as published",
        "int8": ", its blocks in int8",
    }[config.weights]
    return nets, (
        f"base: there is no {config.base}; the published architecture of generation "
        f"{config.generation} stands in for it{kept}"
    )


def _clips(config: TrainConfig, fit: Fit | None) -> tuple[Collection, Collection]:
    """To train on, and held out."""
    if fit is not None:
        return fit.clips, fit.held
    found = collection.index(config.data, fitting.folders(config.strategy))
    train, held = collection.split(found, config.heldout.clips)
    collection.require_batches(train, config.batch_size)
    return train, held


def look(config: TrainConfig) -> Seen:
    """Check everything that is there.

    Raises:
        ValueError: for whatever a run would refuse, and if neither base nor settings
            say which generation it is.
    """
    config = replace(config, verify=False)  # which would read the whole base
    base, data = config.base.exists(), config.data.exists()
    # Nor need the devices of the mesh be here.
    fit = fitting.plan(replace(config, mesh="")) if base and data else None
    device, most, said = _device(config)
    nets, notes = networks.load(config.base, ())[0] if base else None, []
    if nets is None:
        nets, note = _stand_in(config)
        notes.append(note)
    config = experiment.of_generation(config, nets.generation)
    if base:
        fitting.check_base(config)
    parallel.check(config.mesh, nets.transformer)
    clips = None
    if data:
        train, held = _clips(config, fit)
        clips = train.clips, held.clips
        largest = training_outlines.of_collection(train)
    else:
        a, folders = config.assume, fitting.folders(config.strategy)
        largest = training_outlines.assumed(a, folders, nets)
        notes.append(
            f"data: there is no {config.data}; assumed are clips of {a.frames} frames "
            f"of {a.width} x {a.height} at {a.fps:g} fps and references of "
            f"{a.reference_s:g} s (--assume.frames and the like)"
        )
    outline = training_outlines.of(config, nets, largest)
    fitting.check_targets(config, outline.params["transformer"])
    samples = None if fit is None else fit.samples
    return Seen(outline, device, most, clips, (*notes, *said), samples)


def _table(title: str, rows: Mapping[str, str]) -> str:
    wide = max(map(len, rows)) + 2
    lines = (f"  {name:{wide}}{text}" for name, text in rows.items())
    return "\n".join([title, *lines])


def _span(values: Sequence[int], unit: str) -> str:
    low, high = min(values), max(values)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def _size(clip: Clip) -> str:
    frames, height, width = clip.video
    unit = geometry.PIXELS_PER_LATENT
    count = geometry.FRAMES_PER_LATENT * (frames - 1) + 1
    return f"{count} frames of {unit * width} x {unit * height} at {clip.fps:g} fps"


def _lengths(clips: Sequence[Clip]) -> dict[str, str]:
    named = {
        "sound": [clip.audio for clip in clips if clip.audio],
        "references": [clip.reference for clip in clips if clip.reference],
    }
    return {
        name: f"{_span(found, 'latents')} ({geometry.AUDIO_LATENTS_PER_S:g} a second)"
        for name, found in named.items()
        if found
    }


def _tokens(outline: Outline) -> str:
    """Of the largest clip, by what they are of."""
    one = outline.batch(1)
    parts = {
        "video": one.video,
        "video reference": one.video_reference,
        "sound": one.audio,
        "reference": one.reference,
    }
    counts = {
        name: math.prod(x.shape[1:-1]) if "video" in name else x.shape[1]
        for name, x in parts.items()
        if x is not None
    }
    shown = ", ".join(f"{name} {n}" for name, n in counts.items())
    return f"{outline.tokens} ({shown})"


def data(seen: Seen) -> str:
    """Clips, sizes, lengths, tokens, epochs."""
    config, count, rows = seen.config, seen.config.assume.clips, {}
    total = seen.config.clips_per_step * config.steps
    if seen.clips is None:
        rows["clips"] = "unknown" if count is None else f"{count}, as assumed"
    else:
        train, held = seen.clips
        every, count = [*train, *held], len(train)
        rows["clips"] = f"{count} to train on, {len(held)} held out"
        sizes = Counter(map(_size, every))
        rows["sizes"] = "; ".join(f"{n} of {size}" for size, n in sizes.items())
        rows |= _lengths(every)
    rows["tokens of a clip"] = _tokens(seen.outline)
    epochs = "" if count is None else f", {total / count:.1f} epochs"
    rows["clips seen"] = f"{total}{epochs}"
    return _table("data", rows)


def _count(tree: Tree) -> int:
    leaves = jax.tree.leaves(tree, is_leaf=quantized.is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves)


def _millions(count: int, whole: int | None = None) -> str:
    share = "" if whole is None else f"{100 * count / whole:>8.2f} %"
    return f"{count / 1e6:>12.2f} million{share}"


def parameters(seen: Seen) -> str:
    """Of the base, by network; of what is trained, by group of modules."""
    params, trained = seen.outline.params, seen.outline.state.adapter
    rows = {
        name.replace("_", " "): _millions(_count(tree)) for name, tree in params.items()
    }
    base, own = _count(dict(params)), _count(trained)
    rows["base together"] = _millions(base)
    groups: dict[str, int] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(trained):
        group = norms.group(tuple(key.key for key in keys))
        groups[group] = groups.get(group, 0) + leaf.size
    kind = "adapter" if seen.config.mode == "lora" else "trained"
    rows |= {f"{kind} {name}": _millions(n, own) for name, n in groups.items()}
    rows["trained"] = f"{_millions(own)}, {100 * own / base:.2f} % of the base"
    return _table("parameters", rows)


def _schedule(config: TrainConfig) -> dict[str, str]:
    """When things happen."""
    saves = math.ceil(config.steps / config.save_every)
    every, opt = config.validate_every, config.optimizer
    checks = f"every {every} steps" if every else "before and after training"
    warm = f", after {opt.warmup} steps of warm-up" if opt.warmup else ""
    end = opt.learning_rate * opt.end_factor
    falls = "" if opt.schedule == "constant" else f" to {end:g}"
    return {
        "saves": f"{saves}, every {config.save_every} steps and at the end",
        "held-out losses": checks if config.heldout.clips else "none",
        "learning rate": f"{opt.schedule}, {opt.learning_rate:g}{falls}{warm}",
    }


def steps(seen: Seen) -> str:
    """Tokens and operations of a step, how many there are, and when things happen."""
    config, outline, peak = seen.config, seen.outline, seen.config.assume.tflops
    times, devices = config.optimizer.accumulation, math.prod(seen.device.mesh.values())
    work = flops.count(outline.step) * outline.parts
    batches = "1 batch" if times == 1 else f"{times} batches"
    rows = {
        "steps": f"{config.steps}, each of {batches} of {config.batch_size} clips",
        "tokens": f"{outline.tokens * config.clips_per_step} a step",
        "operations": f"{work / 1e12:.1f} TFLOP a step (products and convolutions), "
        f"{work * config.steps / 1e18:.2f} EFLOP in all",
    }
    if peak is not None:
        least = work / (peak * 1e12 * devices)
        rows["floor of the time"] = (
            f"{least:.2f} s a step, {least * config.steps / HOUR:.1f} hours in all: "
            f"no forecast, but {peak:g} TFLOP/s on each of {devices} without a pause"
        )
    return _table("steps", rows | _schedule(config))


def reports(config: TrainConfig) -> Iterator[str]:
    """Lines for people: what is missing, data, parameters, memory, steps.

    Args:
        config: the settings.

    Raises:
        ValueError: for whatever a run would refuse; last of all if it does not fit and
            `memory` is "check".
    """
    seen = look(config)
    first = f"dry run: {config.steps} steps into {config.output}; nothing is written"
    yield "\n".join([first, *(f"  {note}" for note in seen.notes)])
    yield data(seen)
    yield parameters(seen)
    planned = seen.samples
    found = training_memory.of(seen.outline, seen.device, planned)
    yield found.table()
    yield steps(seen)
    kind = None if config.assume.memory_gb is None else "the assumed device"
    args, most = (seen.outline, found, seen.device), seen.most
    line = training_checks.check(*args, most, kind=kind, planned=planned)
    if line is not None:
        yield f"warning: {line}"
    elif most is not None:
        yield f"memory: {found.peak.total / GB:.2f} of {most / GB:.2f} GB"

"""What a sample needs of a device, before anything is put there.

    of(plan, nets, params, layout) -> MemoryPlan    from shapes alone, see `outlines`
    for_job(job, inputs) -> MemoryPlan              the same of a run of `sample.py`
    check(job, inputs, found)                       raises if it does not fit

Weights are exact. What a part of the run needs for its own work is estimated from its
traced operations (see `liveness`): the text side, encoding, each stage, decoding. It
was compared with what XLA says of the compiled parts of 19B and 22B in float32, at 256
to 1024 pixels. Where XLA orders operations to save memory, stages were estimated 1.1
times as large (five passes at 512) to 4 times (one at 256: 2 GB instead of 0.5). XLA's
default order on CPU runs independent work at the same time: there estimates count
`MORE` times, and were 0.85 to 1.6 times what it needs. So they do for decoding
everywhere, whose few large arrays cannot be packed without gaps (1.0 to 1.7 times).

On CPU, XLA also keeps float32 copies of bfloat16 stacks while it scans them (measured:
78 GB beside a transformer of 38 GB). They are counted, too.

With a mesh, the numbers are of one device: its part of the weights, its samples.
Weights in host memory are counted apart: of them a device holds the layer it works on
and the next one.
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from idlora_jax import (
    geometry,
    hosted,
    jobs,
    lighter,
    liveness,
    outlines,
    parallel,
    pipeline,
    tile_choice,
)
from idlora_jax.jobs import Inputs, Job
from idlora_jax.outlines import Asked
from idlora_jax.phases import GB, MemoryPlan, Phase
from idlora_jax.plans import Plan
from idlora_jax.sample_config import SampleConfig
from idlora_jax.types import Layout, Tree
from idlora_jax.weights.networks import Networks

MORE = 1.5
"""How much more than estimated everything on CPU needs, and decoding anywhere."""
TEXT_SIDE = ("text_encoder", "text_connector")
SMALLER = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)
"""Shares of the sides, or of the frames, that are tried where a clip does not fit."""


def size(
    tree: Any,
    network: str = "",
    mesh: Mapping[str, int] | None = None,
    *,
    where: hosted.Where = "device",
) -> int:
    """Bytes of arrays or shapes; with a mesh, of one device's part of a network.

    Args:
        tree: any.
        network: the name that `parallel.RULES` know its paths by.
        mesh: sizes of its axes.
        where: which of them are counted, those on the device or those on the host.
    """
    counts = lambda leaf: hosted.is_host(leaf) == (where == "host")
    bytes_of = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    if not mesh:
        return sum(bytes_of(leaf) for leaf in filter(counts, jax.tree.leaves(tree)))
    sizes = tuple(mesh.get(axis, 1) for axis in parallel.AXES)
    devices: Any = jax.sharding.AbstractMesh(sizes, parallel.AXES)

    def part(keys: Any, leaf: Any) -> int:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        place = parallel.sharding(devices, f"{network}/{path}", leaf.shape)
        shape = place.shard_shape(tuple(leaf.shape))
        return bytes_of(jax.ShapeDtypeStruct(shape, leaf.dtype))

    found = jax.tree_util.tree_leaves_with_path(tree)
    return sum(part(keys, leaf) for keys, leaf in found if counts(leaf))


@dataclass(frozen=True)
class Device:
    """What runs a plan.

    Attributes:
        platform: "cpu", "gpu", ...
        mesh: sizes of its axes; empty: one device.
    """

    platform: str = "gpu"
    mesh: Mapping[str, int] = field(default_factory=dict)

    def own(self, batch: int) -> int:
        """How many samples of a batch one device has."""
        parts = self.mesh.get("data", 1) * self.mesh.get("fsdp", 1)
        return batch if batch % parts else batch // parts

    def work(self, traced: list[Any], *, packed: bool = True) -> int:
        """Bytes that the largest of these functions needs for its own work."""
        most = max(map(liveness.temporary, traced), default=0)
        return round(most * (1 if packed and self.platform != "cpu" else MORE))

    def held(self, tree: Tree, network: str) -> int:
        """Bytes of a network on it; on CPU, host memory is its own."""
        return size(tree, network, self.mesh) + (
            self.hosted(tree, network) if self.platform == "cpu" else 0
        )

    def hosted(self, tree: Tree, network: str) -> int:
        """Bytes of a network that it has in host memory."""
        return size(tree, network, self.mesh, where="host")

    def widened(self, tree: Tree, stack: str) -> int:
        """Bytes of the copies that a scan over a stack makes on CPU."""
        if self.platform != "cpu":
            return 0
        narrow = [x for x in jax.tree.leaves(tree[stack]) if x.dtype == jnp.bfloat16]
        return 2 * (size(narrow) + size(narrow, where="host"))


def _entries(*pairs: tuple[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((name, n) for name, n in pairs if n)


WAITING = frozenset({"video vae", "audio vae", "vocoder", "upsampler"})
"""Networks that may be in host memory until they are used (`jobs.codecs_wait`)."""


def _used(
    weights: Iterable[tuple[str, int]], wait: bool, *names: str
) -> list[tuple[str, int]]:
    """Those of the weights that are on the device while some networks are used."""
    gone = WAITING - {*names} if wait else frozenset()
    return [(name, n) for name, n in weights if name not in gone]


def _text_phase(
    nets: Networks, params: Mapping[str, Tree], asked: Asked, device: Device
) -> Phase:
    sizes = [(n.replace("_", " "), device.held(params[n], n)) for n in TEXT_SIDE]
    copies = device.widened(params["text_encoder"], "layers")
    work = device.work([outlines.text(nets, params, asked)])
    return Phase("text", _entries(*sizes, ("float32 copies", copies)), work)


def of(
    plan: Plan,
    nets: Networks,
    params: Mapping[str, Tree],
    layout: Layout,
    *,
    adapters: Mapping[str, Tree] | None = None,
    asked: Asked | None = None,
    device: Device | None = None,
    title: str = "",
    wait: bool = False,
    tiles: tile_choice.Cut = "usual",
    most: int | None = None,
) -> MemoryPlan:
    """The memory plan of a run; nothing is allocated.

    Args:
        plan: from `plans`.
        nets: what the networks are.
        params: arrays or shapes by network, as `outlines.parameters` gives them; the
            text side may be absent if prompts are known.
        layout: the clip, at the size of the first stage.
        adapters: arrays or shapes, by the names that the plan uses.
        asked: batch, dtype, prompts' length, voices.
        device: what runs it.
        title: of the table.
        wait: whether all but the transformer are on the host until they are used.
        tiles: that the video is decoded in.
        most: bytes of the device, for which "usual" tiles are chosen; None: by size.

    Raises:
        ValueError: for whatever `pipeline.run` refuses.
    """
    asked, device = asked or Asked(), device or Device()
    asked = replace(asked, batch=device.own(asked.batch))
    layouts = pipeline.layouts(plan, layout)
    phases = []
    if "text_encoder" in params:
        phases.append(_text_phase(nets, params, asked, device))
    held = {n: tree for n, tree in params.items() if n not in TEXT_SIDE}
    weights = [(n.replace("_", " "), device.held(t, n)) for n, t in held.items()]
    wanted = outlines.request(nets, layouts, asked)
    inputs = outlines.inputs(nets, params, layouts[-1], asked)
    encoders = _used(weights, wait, "video vae", "audio vae")
    phases.append(Phase("inputs", _entries(*encoders), device.work(inputs)))
    weights.append(("prompts, references", size(wanted)))
    base = params["transformer"]
    beside = _used(weights, wait)
    copies = device.widened(base, "blocks")
    for number, stage in enumerate(plan.stages):
        own = outlines.variables(stage, params, adapters or {})
        traced = outlines.stage(plan, number, nets, params, own, layout, asked)
        change = size(own.get("lora", {}), "transformer", device.mesh)
        extra = ("adapters", change), ("float32 copies", copies)
        if wait and stage.refines:
            *enlarging, last = traced
            resident = _entries(*_used(weights, wait, "upsampler"))
            phases.append(Phase("enlarge", resident, device.work(enlarging)))
            traced = [last]
        phases.append(Phase(stage.name, _entries(*beside, *extra), device.work(traced)))
    decoders = _entries(*_used(weights, wait, "video vae", "audio vae", "vocoder"))

    def decoding(tiles: tile_choice.Cut) -> int:
        traced = outlines.decoding(nets, params, layouts[-1], asked, tiles)
        return device.work(traced, packed=False)

    if tiles == "usual" and most is not None:
        room = round((1 - tile_choice.SPARE) * most) - sum(n for _, n in decoders)
        tiles, work = tile_choice.largest(decoding, room)
    else:
        work = decoding(tiles)
    phases.append(Phase("decode", decoders, work))
    on_host = 0 if device.platform == "cpu" else device.hosted(base, "transformer")
    title = f"{title}{tile_choice.told(tiles)}"
    return MemoryPlan(title, tuple(phases), on_host, tiles)


def this_device(config: SampleConfig) -> Device:
    """The first device, and the configured mesh."""
    return Device(jax.default_backend(), parallel.parse(config.mesh))


def for_job(
    job: Job,
    inputs: Inputs,
    *,
    text_length: int = 1024,
    device: Device | None = None,
    encodes: bool = True,
    most: int | None = None,
) -> MemoryPlan:
    """The memory plan of a job; only headers of files are read.

    Args:
        job: from `jobs.check`.
        inputs: from `jobs.check`.
        text_length: tokens of a prompt, the tokenizer's `length`.
        device: what runs it (default: the first device, and the configured mesh).
        encodes: whether its prompts have to be encoded, too.
        most: bytes of the device, which decide how the video is cut for decoding; None:
            its size does.

    Raises:
        ValueError: if files are unreadable or incomplete.
    """
    config, grid = job.config, job.layout.video
    assert grid is not None, "a job has video"
    refining = job.nets.upsampler is not None
    params = outlines.parameters(
        config.base,
        text_encoder_path=config.text_encoder if encodes else None,
        upsampler_path=config.upsampler if refining else None,
        dtype=config.dtype,
        choice=config.weights,
        where=config.weights_in,
    )
    begins = inputs.image is not None or config.continue_from is not None
    asked = Asked(
        config.batch,
        config.dtype,
        text_length,
        tuple(wave.shape[-1] for wave in inputs.waves),
        begins,
        config.text_kv,
    )
    device = device or this_device(config)
    title = (
        f"{config.plan}, {grid.frames} frames of {grid.width} x {grid.height}, "
        f"{config.dtype}, branches {config.branches}, batch {config.batch}"
    )
    args = (job.plan, job.nets, params, job.layout)
    options: dict[str, Any] = {"adapters": inputs.adapters, "title": title}
    options["wait"] = jobs.codecs_wait(config, device.platform)
    options |= {"tiles": tile_choice.explicit(config), "most": most}
    return of(*args, asked=asked, device=device, **options)


def limit() -> int | None:
    """Bytes of the first device; on CPU, of the machine. None if nothing tells."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    found = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        group = pathlib.Path("/sys/fs/cgroup", name)
        if group.is_file() and (text := group.read_text().strip()).isdigit():
            found.append(int(text))
    about = pathlib.Path("/proc/meminfo")
    if about.is_file():
        words = about.read_text().split()
        found.append(int(words[words.index("MemTotal:") + 1]) * 1024)
    return min(found, default=None)


def _resized(job: Job, **changes: Any) -> Job:
    """The job with other settings."""
    config = replace(job.config, **changes)
    grid = job.layout.video
    assert grid is not None, "a job has video"
    sides = config.height or grid.height, config.width or grid.width
    layout = pipeline.clip(config.frames, *sides, config.fps, pre_roll=config.pre_roll)
    return replace(job, config=config, layout=layout, plan=jobs.plan_of(config))


def _lighter(job: Job, device: Device) -> Iterator[list[tuple[str, Job, Device]]]:
    """Settings that need less weights; each list from the least change on."""
    config = job.config
    asked = config.weights, config.weights_in, config.base, device.platform
    for group in lighter.weights(*asked):
        yield [(lighter.named(c), _resized(job, **c), device) for c in group]
    dtype = "float32" if device.platform == "cpu" else "bfloat16"
    if config.dtype != dtype:
        yield [(f"--dtype {dtype}", _resized(job, dtype=dtype), device)]
    if not device.mesh:
        cfg = job.nets.transformer
        counts = range(2, jax.device_count() + 1)
        fit = [n for n in counts if not (cfg.video.heads % n or cfg.audio.heads % n)]
        yield [
            (f"--mesh tensor={n}", job, replace(device, mesh={"tensor": n}))
            for n in fit
        ]


def _smaller(job: Job, device: Device) -> Iterator[list[tuple[str, Job, Device]]]:
    """Settings that need less for their own work; each list from the least change."""
    config, grid = job.config, job.layout.video
    assert grid is not None, "a job has video"
    if config.branches != "sweep":
        yield [("--branches sweep", _resized(job, branches="sweep"), device)]
    if config.text_kv != "shared" and not job.nets.transformer.text_adaln:
        yield [("--text-kv shared", _resized(job, text_kv="shared"), device)]
    if config.batch > 1:
        yield [("--batch 1", _resized(job, batch=1), device)]
    unit = geometry.PIXELS_PER_LATENT
    sizes = [
        tuple(max(1, int(share * n) // unit) * unit for n in (grid.height, grid.width))
        for share in SMALLER
    ]
    yield [
        (f"--height {h} --width {w}", _resized(job, height=h, width=w), device)
        for h, w in dict.fromkeys(sizes)
        if (h, w) != (grid.height, grid.width)
    ]
    lengths = [geometry.nearest_frames(share * grid.frames) for share in SMALLER]
    least = config.overlap if config.continue_from is not None else 0
    yield [
        (f"--frames {n}", _resized(job, frames=n), device)
        for n in dict.fromkeys(lengths)
        if least < n < grid.frames
    ]


def held_back(device: Device, found: MemoryPlan, most: int) -> Iterator[str]:
    """Whether memory that JAX leaves to others would do: by default a quarter."""
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    if device.platform == "gpu" and not any(name in os.environ for name in names):
        more = 0.95 / 0.75 * most
        if found.peak.total <= more:
            yield f"{names[0]}=0.95 in the environment ({more / GB:.2f} GB to use)"


def verdict(
    found: MemoryPlan,
    most: int | None,
    choice: Literal["check", "warn", "off"],
    helps: Callable[[int], Iterable[str]],
    kind: str | None = None,
) -> str | None:
    """What is to be said of a plan that does not fit; None if it does.

    Args:
        found: the plan.
        most: bytes of the device; None: nothing tells.
        choice: what happens then.
        helps: from `most` to the settings each of which would make it fit.
        kind: of the device (default: that of the first one).

    Raises:
        ValueError: if it does not fit, and the choice is "check": what is needed, what
            there is, and which settings help.
    """
    if choice == "off" or most is None or found.peak.total <= most:
        return None
    peak, kind = found.peak, kind or jax.devices()[0].device_kind
    settings = [*helps(most)]
    do = "no other setting makes it fit: use a larger device"
    if settings:
        do = f"each of these makes it fit: {', '.join(settings)}"
    line = (
        f"memory: {peak.name!r} needs about {peak.total / GB:.2f} GB, "
        f"but {kind} has {most / GB:.2f} GB; {do}"
    )
    if choice == "check":
        raise ValueError(f"{line} (--memory warn goes on anyway)")
    return line


def helps(
    job: Job, inputs: Inputs, found: MemoryPlan, most: int, **options: Any
) -> Iterator[str]:
    """The settings each of which would make a job fit, and what it would need then.

    Args:
        job: from `jobs.check`.
        inputs: from `jobs.check`.
        found: its plan, which does not fit.
        most: bytes of the device.
        options: of `for_job`.
    """
    device = options.pop("device", None) or this_device(job.config)
    yield from held_back(device, found, most)
    groups = [*_lighter(job, device)]
    if all(sum(n for _, n in phase.resident) < most for phase in found.phases):
        groups += _smaller(job, device)
    for group in groups:
        for text, other, on in group:
            peak = for_job(other, inputs, device=on, most=most, **options).peak.total
            if peak <= most:
                yield f"{text} ({peak / GB:.2f} GB)"
                break


def check(
    job: Job, inputs: Inputs, found: MemoryPlan, most: int | None = None, **options: Any
) -> str | None:
    """What is to be said of a job that does not fit; None if it does.

    Args:
        job: from `jobs.check`; `config.memory` says what happens.
        inputs: from `jobs.check`.
        found: its plan.
        most: bytes of the device (default: `limit()`).
        options: of `for_job`, as they were given to it.

    Raises:
        ValueError: if it does not fit, and `memory` is "check": what is needed, what
            there is, and which settings help.
    """
    most = limit() if most is None else most
    others = lambda most: helps(job, inputs, found, most, **options)
    return verdict(found, most, job.config.memory, others)

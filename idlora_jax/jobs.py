"""What is asked for, read and checked before any weights of the base are read.

opened(config) -> Opened               networks and adapters, shared by many samples
read(config, opened) -> Job, Inputs    one sample's files, layout and plan
check(config, opened) -> Job, Inputs   the same, and the output folder
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from idlora_jax import (
    adapters,
    as_trained,
    checkpoints,
    codecs,
    continuation,
    geometry,
    guidance,
    media,
    parallel,
    pipeline,
    plans,
    tagged,
    voices,
)
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.data import tokenize
from idlora_jax.experiment import plain
from idlora_jax.plans import Plan
from idlora_jax.sample_config import REFINING, SampleConfig
from idlora_jax.types import Adapter, Layout
from idlora_jax.voices import VoiceReport
from idlora_jax.weights import io, networks, text_encoder_files
from idlora_jax.weights.check import verify_watched
from idlora_jax.weights.networks import Networks
from idlora_jax.weights.upsampler_files import open_upsampler


@dataclass(frozen=True)
class Job:
    """What is asked for, checked.

    Attributes:
        config: all settings.
        nets: what the networks are.
        layout: the clip.
        plan: the stages.
        adapters: of the used adapter files, by name.
        hashes: of the media files given, by role.
        weights: hashes of the networks that lie in files of their own, by name.
        references: file name of each recording, and what its used part is like.
        warnings: what is likely to make a bad clip.
    """

    config: SampleConfig
    nets: Networks
    layout: Layout
    plan: Plan
    adapters: Mapping[str, AdapterMeta]
    hashes: Mapping[str, Any]
    weights: Mapping[str, str] = field(default_factory=dict)
    references: tuple[tuple[str, VoiceReport], ...] = ()
    warnings: tuple[str, ...] = ()


class Inputs(NamedTuple):
    """What the files of a job hold.

    Attributes:
        waves: float32 [2 N] at the audio VAE's rate, one per reference segment.
        image: uint8 [H W 3], or None.
        adapters: of the transformer, by name.
        text: of the text connector, scaled; few files have such a part.
        ending: of the clip that this one goes on from, or None.
    """

    waves: tuple[Any, ...]
    image: Any
    adapters: Mapping[str, Adapter]
    text: tuple[Adapter, ...] = ()
    ending: continuation.Ending | None = None


class Opened(NamedTuple):
    """What the samples of one run share.

    Attributes:
        nets: what the networks are.
        weights: see `Job`.
        parts: of the adapters, by name and network.
        metas: what the adapter files say of themselves, by name.
    """

    nets: Networks
    weights: Mapping[str, str]
    parts: Mapping[str, Mapping[str, Adapter]]
    metas: Mapping[str, AdapterMeta]


PLANS: Mapping[str, Callable[..., Plan]] = {
    "one_stage": plans.one_stage,
    "two_stage": plans.two_stage,
    "two_stage_hq": plans.two_stage_hq,
    "distilled": plans.distilled,
}
DISTILLED = {"two_stage": (0.0, 0.8), "two_stage_hq": (0.25, 0.5), "distilled": (1.0,)}
"""Strengths of the distilled LoRA in each stage."""


def plan_of(config: SampleConfig) -> Plan:
    """The configuration's plan, with its scales and adapters."""
    used = dict(zip(adapter_names(config.lora), _strengths(config), strict=True))
    options: dict[str, Any] = {"branches": config.branches, **plain(config.guidance)}
    if config.plan != "distilled":
        options["steps"] = config.steps
    own: Sequence[float] = ()
    if config.distilled_lora is not None:
        own = config.distilled_strength or DISTILLED.get(config.plan, ())
    first, *second = own or (0.0,)
    if first:
        used[distilled_name(config)] = first
    if second:
        options["refining"] = {distilled_name(config): second[0]}
    return PLANS[config.plan](adapters=used, **options)


def codecs_wait(config: SampleConfig, platform: str) -> bool:
    """Whether all networks but the transformer wait in host memory until they are used.

    So they do for plans with a distilled LoRA beside the transformer: its 7.6 GB and
    their 3.7 GB would not be needed at once. A host that computes has but one memory.
    """
    large = config.distilled_lora is not None
    return large and not config.mesh and platform != "cpu"


def _strengths(config: SampleConfig) -> tuple[float, ...]:
    return config.lora_strength or (1.0,) * len(config.lora)


def distilled_name(config: SampleConfig) -> str:
    """The name of the distilled LoRA among the adapters."""
    return f"distilled: {config.distilled_lora}"


def adapter_names(paths: Sequence[Path]) -> list[str]:
    """A name for each adapter file; the same file may be used twice."""
    return [f"{n}: {path}" for n, path in enumerate(paths)]


def adapter_files(config: SampleConfig) -> dict[str, Path]:
    """All adapter files, by name."""
    out = dict(zip(adapter_names(config.lora), config.lora, strict=True))
    if config.distilled_lora is not None:
        out[distilled_name(config)] = config.distilled_lora
    return out


def opened(config: SampleConfig) -> Opened:
    """Networks, from their headers alone, and adapters, checked against the base.

    Raises:
        ValueError: naming the file, what was got, what was expected, and what to do.
    """
    nets = _networks(config)
    parts: dict[str, Mapping[str, Adapter]] = {}
    metas: dict[str, AdapterMeta] = {}
    files, base = adapter_files(config), io.open_base(config.base)
    networks = ("transformer", "text_connector") if files else ()
    shapes = {part: io.shapes(base, part) for part in networks}
    for name, path in files.items():
        parts[name], meta = checkpoints.load_adapters(
            path, shapes, verify=config.verify
        )
        if meta.generation not in ("", nets.generation):
            raise ValueError(
                f"lora: {path} was trained on generation {meta.generation}, but the "
                f"base {config.base} is of generation {nets.generation}; use the base "
                "it was trained on"
            )
        metas[name] = meta
    return Opened(nets, _weights(config), parts, metas)


def _weights(config: SampleConfig) -> dict[str, str]:
    """Hashes of the text encoder and, where the plan refines, of the upsampler."""
    text = text_encoder_files.open_text_encoder(config.text_encoder).source_hash
    out = {"text_encoder": text}
    if config.plan in REFINING and config.upsampler is not None:
        out["upsampler"] = open_upsampler(config.upsampler).source_hash
    return out


def _networks(config: SampleConfig) -> Networks:
    """The networks of the base and the text encoder, from their headers alone."""
    base = io.open_base(config.base)
    if config.verify:
        verify_watched(base)
    for name in io.NETWORKS:
        io.network_config(base, name)
    tokenize.load(config.text_encoder)
    paths = {
        "text_encoder_path": config.text_encoder,
        "upsampler_path": config.upsampler if config.plan in REFINING else None,
    }
    nets = networks.load(config.base, (), **paths)[0]
    if config.mesh:
        parallel.check(config.mesh, nets.transformer, config.branches)
        parallel.make(config.mesh)
    return nets


def size_of(config: SampleConfig, image: Any) -> tuple[int, int]:
    """Height and width of the first stage: as set, or as a picture [H W 3] wants."""
    if config.height is not None and config.width is not None:
        return config.height, config.width
    return (512, 512) if image is None else geometry.size_like(*image.shape[:2])


def _check_folder(folder: Path) -> None:
    """Raise unless files can be written there; the folder is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"output_dir: cannot write to {folder} ({error.strerror})"
        ) from None


def text_parts(config: SampleConfig, found: Opened) -> tuple[Adapter, ...]:
    """What the adapters change in the text connector.

    The prompts are made once, for all stages: without the distilled LoRA, whose
    strength changes between them, as in the reference.
    """
    named = zip(adapter_names(config.lora), _strengths(config), strict=True)
    return tuple(
        adapters.scale(found.parts[name]["text_connector"], strength)
        for name, strength in named
        if "text_connector" in found.parts[name]
    )


def _waves(
    config: SampleConfig, nets: Networks
) -> tuple[tuple[Any, ...], tuple[tuple[str, VoiceReport], ...]]:
    """The parts of the recordings that are used, and what they are like, by name."""
    rate, waves, reports = nets.audio_vae.sample_rate, [], []
    for path in config.reference_audio:
        wave = media.read_audio(path, rate, numerics=config.numerics)
        wave = voices.crop(wave, rate, config.reference_seconds, config.reference_crop)
        codecs.reference_mel(nets.audio_vae, wave)
        waves.append(wave)
        reports.append((path.name, voices.measure(wave, rate)))
    return tuple(waves), tuple(reports)


def _ending(config: SampleConfig, nets: Networks) -> continuation.Ending | None:
    """The end of the clip that this one goes on from."""
    if config.continue_from is None:
        return None
    return continuation.read(
        config.continue_from,
        overlap=config.overlap,
        fps=config.fps,
        cfg=nets.audio_vae,
        numerics=config.numerics,
    )


def _hashes(config: SampleConfig) -> dict[str, Any]:
    """Of the media files given, by role."""
    out: dict[str, Any] = {}
    if config.reference_audio:
        out["reference_audio"] = [
            checkpoints.file_hash(path) for path in config.reference_audio
        ]
    for role in ("first_frame", "continue_from"):
        path = getattr(config, role)
        if path is not None:
            out[role] = checkpoints.file_hash(path)
    return out


def check(config: SampleConfig, found: Opened | None = None) -> tuple[Job, Inputs]:
    """`read`, and whether the output folder can be written to, which is made.

    Raises:
        ValueError: see `read`.
        OSError: if the output folder cannot be written to.
    """
    made = read(config, found)
    _check_folder(config.output_dir)
    return made


def read(config: SampleConfig, found: Opened | None = None) -> tuple[Job, Inputs]:
    """Read and check everything a sample is made from, but for the base's weights.

    Args:
        config: all settings of one sample.
        found: from `opened`, for samples that share their networks and adapters; None:
            opened here.

    Raises:
        ValueError: naming what was got, what was expected, and what to do.
    """
    if not config.prompt.strip():
        raise ValueError(
            'prompt: got none, expected "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..."; '
            "give it by --prompt"
        )
    found = opened(config) if found is None else found
    plan = as_trained.applied(
        plan_of(config),
        found.metas,
        masks=config.masks,
        rounding=config.position_rounding,
    )
    for stage in plan.stages:
        guidance.branches(stage.terms, found.nets.transformer.layers)
    image = None
    if config.first_frame is not None:
        image = media.read_image(config.first_frame)
    ending = _ending(config, found.nets)
    size = size_of(config, image if ending is None else ending.frames[0])
    layout = pipeline.clip(config.frames, *size, config.fps, pre_roll=config.pre_roll)
    waves, references = _waves(config, found.nets)
    said = [f"{n}: {line}" for n, r in references for line in voices.warnings(r)]
    new = config.frames - (0 if ending is None else config.overlap)
    warnings = (*tagged.lint(config.prompt, new / config.fps), *said)
    hashes = _hashes(config)
    text = text_parts(config, found)
    changes = {n: parts.get("transformer", {}) for n, parts in found.parts.items()}
    job = Job(
        config,
        found.nets,
        layout,
        plan,
        found.metas,
        hashes,
        weights=found.weights,
        references=references,
        warnings=warnings,
    )
    return job, Inputs(waves, image, changes, text, ending)

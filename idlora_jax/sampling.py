"""What `sample.py` does: a configuration and files in, a clip and its record out.

    check(config) -> Job            every input read and checked; no weights yet
    generate(job) -> Media          text side, then the other networks, then the plan
    write(job, media) -> paths      <name>.mp4, <name>.wav, <name>.json, or nothing

The text encoder is read first and let go before the transformer is read, so that the
two are never in memory together.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import idlora_jax
from idlora_jax import (
    adapters,
    checkpoints,
    codecs,
    geometry,
    guidance,
    media,
    pipeline,
    plans,
    prompts,
    tagged,
)
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.data import tokenize
from idlora_jax.experiment import plain
from idlora_jax.pipeline import Media, Progress, Request
from idlora_jax.plans import Plan
from idlora_jax.sample_config import REFINING, SampleConfig
from idlora_jax.types import Adapter, Layout, Prompt, Tree
from idlora_jax.weights import io, networks
from idlora_jax.weights.check import verify_watched
from idlora_jax.weights.networks import Networks

TEXT_SIDE = ("text_encoder", "text_connector")
MEDIA_SIDE = ("transformer", "video_vae", "audio_vae", "vocoder")


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
        warnings: what is likely to make a bad clip.
    """

    config: SampleConfig
    nets: Networks
    layout: Layout
    plan: Plan
    adapters: Mapping[str, AdapterMeta]
    hashes: Mapping[str, str]
    warnings: tuple[str, ...] = ()


class Inputs(NamedTuple):
    """What the files of a job hold.

    Attributes:
        wave: float32 [2 N] at the audio VAE's rate, or None.
        image: uint8 [H W 3], or None.
        adapters: of the transformer, by name.
        text: of the text connector, scaled; few files have such a part.
    """

    wave: Any
    image: Any
    adapters: dict[str, Adapter]
    text: tuple[Adapter, ...] = ()


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
    strengths = config.lora_strength or (1.0,) * len(config.lora)
    used = dict(zip(adapter_names(config.lora), strengths, strict=True))
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


def distilled_name(config: SampleConfig) -> str:
    """The name of the distilled LoRA among the adapters."""
    return f"distilled: {config.distilled_lora}"


def _files(config: SampleConfig) -> dict[str, Path]:
    """All adapter files, by name."""
    out = dict(zip(adapter_names(config.lora), config.lora, strict=True))
    if config.distilled_lora is not None:
        out[distilled_name(config)] = config.distilled_lora
    return out


def adapter_names(paths: Sequence[Path]) -> list[str]:
    """A name for each adapter file; the same file may be used twice."""
    return [f"{n}: {path}" for n, path in enumerate(paths)]


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


def _adapters(
    config: SampleConfig, nets: Networks
) -> tuple[dict[str, dict[str, Adapter]], dict[str, AdapterMeta]]:
    """The adapters and what they say of themselves, checked against the base."""
    found: dict[str, dict[str, Adapter]] = {}
    metas: dict[str, AdapterMeta] = {}
    base, parts = io.open_base(config.base), ("transformer", "text_connector")
    files = _files(config)
    shapes = {part: io.shapes(base, part) for part in parts if files}
    for name, path in files.items():
        found[name], meta = checkpoints.load_adapters(
            path, shapes, verify=config.verify
        )
        if meta.generation not in ("", nets.generation):
            raise ValueError(
                f"lora: {path} was trained on generation {meta.generation}, but the "
                f"base {config.base} is of generation {nets.generation}; use the base "
                "it was trained on"
            )
        metas[name] = meta
    return found, metas


def size_of(config: SampleConfig, image: Any) -> tuple[int, int]:
    """Height and width of the first stage: as set, or as the first frame wants."""
    if config.height is not None and config.width is not None:
        return config.height, config.width
    return (512, 512) if image is None else geometry.size_like(*image.shape[:2])


def check(config: SampleConfig) -> tuple[Job, Inputs]:
    """Read and check everything a sample is made from, but for the base's weights.

    Raises:
        ValueError: naming what was got, what was expected, and what to do.
        OSError: if the output folder cannot be written to.
    """
    if not config.prompt.strip():
        raise ValueError(
            'prompt: got none, expected "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..."; '
            "give it by --prompt"
        )
    image = None
    if config.first_frame is not None:
        image = media.read_image(config.first_frame)
    layout = pipeline.clip(config.frames, *size_of(config, image), config.fps)
    warnings = tagged.lint(config.prompt, config.frames / config.fps)
    plan = plan_of(config)
    nets = _networks(config)
    for stage in plan.stages:
        guidance.branches(stage.terms, nets.transformer.layers)
    hashes, wave = {}, None
    if config.reference_audio is not None:
        rate = nets.audio_vae.sample_rate
        wave = media.read_audio(config.reference_audio, rate, numerics=config.numerics)
        codecs.reference_mel(nets.audio_vae, wave)
        hashes["reference_audio"] = checkpoints.file_hash(config.reference_audio)
    if config.first_frame is not None:
        hashes["first_frame"] = checkpoints.file_hash(config.first_frame)
    found, metas = _adapters(config, nets)
    strengths = config.lora_strength or (1.0,) * len(config.lora)
    # The prompts are made once, for all stages: without the distilled LoRA, whose
    # strength changes between them, as in the reference.
    text = tuple(
        adapters.scale(found[name]["text_connector"], strength)
        for name, strength in zip(adapter_names(config.lora), strengths, strict=True)
        if "text_connector" in found[name]
    )
    changes = {name: parts.get("transformer", {}) for name, parts in found.items()}
    _check_folder(config.output_dir)
    job = Job(config, nets, layout, plan, metas, hashes, warnings)
    return job, Inputs(wave, image, changes, text)


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
    return networks.load(config.base, (), **paths)[0]


def _texts(config: SampleConfig, changes: Sequence[Adapter]) -> tuple[Prompt, ...]:
    """The positive and the negative prompt; the text encoder is let go after it."""
    nets, params = networks.load(
        config.base,
        TEXT_SIDE,
        text_encoder_path=config.text_encoder,
        dtype=jnp.dtype(config.dtype),
    )
    if changes:
        merged = adapters.merge(params["text_connector"], *changes)
        params = {**params, "text_connector": merged}
    tokenizer = tokenize.load(config.text_encoder)
    texts = [config.prompt, config.negative_prompt]
    found = prompts.features(nets, params, tokenizer, texts)
    both = prompts.prompts(nets, params, *found, numerics=config.numerics)
    both = jax.block_until_ready(both)
    return tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], both) for i in range(2))


def _request(job: Job, inputs: Inputs, params: Mapping[str, Tree]) -> Request:
    nets, fit = job.nets, job.config.fit
    reference = frame = None
    if inputs.wave is not None:
        args = (nets.audio_vae, params["audio_vae"], inputs.wave)
        reference = codecs.encode_reference(*args)
    if inputs.image is not None:
        args = (nets.video_vae, params["video_vae"], inputs.image)
        frame = tuple(
            codecs.encode_first_frame(*args, layout.video, fit=fit)
            for layout in pipeline.layouts(job.plan, job.layout)
            if layout.video is not None
        )
    return Request((), reference, frame)


def generate(
    job: Job, inputs: Inputs, progress: Progress | None = None
) -> tuple[Media, dict[str, float]]:
    """Load the weights, sample and decode.

    Args:
        job: from `check`.
        inputs: from `check`.
        progress: see `pipeline.sample`.

    Returns:
        The sample, and how many seconds each part took.

    Raises:
        ValueError: if weights are missing or do not fit.
    """
    config, clock = job.config, [time.perf_counter()]
    texts = _texts(config, inputs.text)
    clock.append(time.perf_counter())
    options = {"dtype": jnp.dtype(config.dtype), "fp8": config.fp8}
    names = MEDIA_SIDE
    if job.nets.upsampler is not None:
        names, options["upsampler_path"] = (*names, "upsampler"), config.upsampler
    _, params = networks.load(config.base, names, **options)
    request = _request(job, inputs, params)._replace(prompts=texts)
    clock.append(time.perf_counter())
    result = pipeline.run(
        job.plan,
        job.nets,
        params,
        inputs.adapters,
        request,
        jax.random.key(config.seed),
        layout=job.layout,
        numerics=config.numerics,
        dtype=config.dtype,
        progress=progress,
    )
    result = jax.block_until_ready(result)
    clock.append(time.perf_counter())
    spent = np.diff(clock).round(3).tolist()
    return result, dict(zip(("text", "load", "sample"), spent, strict=True))


def record(job: Job, result: Media, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Everything that made the sample, as JSON: settings, hashes, sizes, versions."""
    config, rate = job.config, job.nets.vocoder.sample_rate
    used = [dict(stage.adapters) for stage in job.plan.stages]
    frames, samples = result.video.shape[1], result.wave.shape[-1]
    return {
        "synthetic": True,
        "library": {"idlora_jax": idlora_jax.__version__, "jax": jax.__version__},
        "settings": plain(config),
        "model": {"hash": job.nets.base_hash, "generation": job.nets.generation},
        "adapters": [
            {"strength": [stage.get(name, 0.0) for stage in used], **plain(meta)}
            for name, meta in job.adapters.items()
        ],
        "inputs": dict(job.hashes),
        "video": {
            "frames": frames,
            "fps": config.fps,
            "seconds": frames / config.fps,
            "size": [*result.video.shape[2:4]],
        },
        "audio": {"rate": rate, "samples": samples, "seconds": samples / rate},
        "seconds": dict(seconds),
        "warnings": [*job.warnings],
    }


def _tags(entry: Mapping[str, Any]) -> dict[str, str]:
    """What the mp4 itself says about its origin."""
    kept = {k: entry[k] for k in ("synthetic", "library", "model")}
    kept["adapters"] = [adapter["content_hash"] for adapter in entry["adapters"]]
    return {
        "title": "Synthetic clip",
        "comment": json.dumps(kept),
        "copyright": "made by a model; the licence of the model's weights applies",
    }


def write(job: Job, result: Media, seconds: Mapping[str, float]) -> list[Path]:
    """Write `<name>.mp4`, `<name>.wav` and `<name>.json` of the first sample.

    All three are complete before the first appears under its name.

    Raises:
        OSError: if they cannot be written; nothing is left behind.
    """
    config, rate = job.config, job.nets.vocoder.sample_rate
    frames, wave = np.asarray(result.video[0]), np.asarray(result.wave[0])
    entry = record(job, result, seconds)
    names = [f"{config.name}.{kind}" for kind in ("mp4", "wav", "json")]
    folder = config.output_dir
    with tempfile.TemporaryDirectory(dir=folder, prefix=".sample-") as temporary:
        video, sound, sidecar = (Path(temporary) / name for name in names)
        tags = _tags(entry)
        media.write_video(video, frames, wave, rate, fps=config.fps, metadata=tags)
        media.write_wav(sound, wave, rate)
        sidecar.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
        for path in (video, sound, sidecar):
            os.replace(path, folder / path.name)
    return [folder / name for name in names]

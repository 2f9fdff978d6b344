"""Checked inputs in, samples out: one by one, or several of equal shapes at once.

    texts(configs) -> prompts        the text encoder is read, and let go again
    load(config) -> parameters       of all other networks
    request(job, inputs) -> Request  pictures and recordings, encoded
    run(jobs, requests) -> Media     one batch, each sample with the noise of its seed
    generate(job, inputs) -> Media   all of these for one sample

`jobs.check` makes jobs, `outputs.write` writes samples, `sessions` does it for many.
The text encoder is let go before the transformer is read, so that the two are never in
memory together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from idlora_jax import (
    codecs,
    continuation,
    joining,
    media,
    parallel,
    pipeline,
    prompt_cache,
    tile_choice,
)
from idlora_jax.jobs import Inputs, Job, check, codecs_wait, plan_of
from idlora_jax.outputs import record, write
from idlora_jax.pipeline import Media, Request, Watch
from idlora_jax.prompt_cache import Say
from idlora_jax.sample_config import SampleConfig
from idlora_jax.tile_choice import Cut
from idlora_jax.types import Adapter, Prompt, Tree, each
from idlora_jax.weights import networks
from idlora_jax.weights.networks import Networks

__all__ = [
    "Inputs",
    "Job",
    "check",
    "generate",
    "load",
    "mesh_of",
    "plan_of",
    "record",
    "request",
    "run",
    "single",
    "texts",
    "write",
]

MEDIA_SIDE = ("transformer", "video_vae", "audio_vae", "vocoder")


def texts(
    configs: Sequence[SampleConfig],
    nets: Networks,
    changes: Sequence[Adapter] = (),
    note: Say | None = None,
) -> Mapping[str, Prompt]:
    """All prompts and negative prompts, in host memory; see `prompt_cache.encoded`.

    Args:
        configs: samples of one base and text encoder.
        nets: what the networks are.
        changes: of the text connector, scaled.
        note: takes a line about a cache that could not be used.
    """
    found = [text for c in configs for text in (c.prompt, c.negative_prompt)]
    args = (configs[0], nets, [*dict.fromkeys(found)], changes)
    return prompt_cache.encoded(*args, note=note)


def mesh_of(config: SampleConfig) -> Mesh | None:
    """The devices that a run is divided over; None: it is not."""
    return parallel.make(config.mesh) if config.mesh else None


def load(
    config: SampleConfig, nets: Networks, names: Sequence[str] = MEDIA_SIDE
) -> Mapping[str, Tree]:
    """The parameters of all networks but the text side.

    Args:
        config: which files, dtype and mesh.
        nets: what they are.
        names: which of the base's; the upsampler is read where there is one.

    Raises:
        ValueError: if weights are missing or do not fit.
    """
    options: dict[str, Any] = {
        "dtype": jnp.dtype(config.dtype),
        "weights": config.weights,
        "weights_in": config.weights_in,
        "mesh": mesh_of(config),
    }
    if nets.upsampler is not None:
        names, options["upsampler_path"] = (*names, "upsampler"), config.upsampler
    if not codecs_wait(config, jax.default_backend()):
        return networks.load(config.base, names, **options)[1]
    own = [name for name in names if name == "transformer"]
    waiting = [name for name in names if name != "transformer"]
    params = jax.device_get(networks.load(config.base, waiting, **options)[1])
    return params | networks.load(config.base, own, **options)[1]


def request(
    job: Job,
    inputs: Inputs,
    params: Mapping[str, Tree],
    prompts: Mapping[str, Prompt],
) -> Request:
    """What one sample is made from, encoded.

    Args:
        job: from `check`.
        inputs: from `check`.
        params: from `load`.
        prompts: from `texts`.

    Raises:
        ValueError: if the clip that this one goes on from does not fit it.
    """
    nets, config = job.nets, job.config
    layouts, frame, sound = pipeline.layouts(job.plan, job.layout), None, None
    args = (nets.audio_vae, params["audio_vae"])
    reference = tuple(codecs.encode_reference(*args, wave) for wave in inputs.waves)
    if inputs.image is not None:
        args = (nets.video_vae, params["video_vae"], inputs.image)
        frame = tuple(
            codecs.encode_first_frame(*args, layout.video, fit=config.fit)
            for layout in layouts
            if layout.video is not None
        )
    if inputs.ending is not None:
        args = (nets, params, inputs.ending, layouts)
        frame, sound = continuation.encode(*args, fit=config.fit)
    both = prompts[config.prompt], prompts[config.negative_prompt]
    return Request(both, reference or None, frame, first_audio=sound)


def run(
    jobs: Sequence[Job],
    inputs: Inputs,
    requests: Sequence[Request],
    params: Mapping[str, Tree],
    watch: Watch | None = None,
    tiles: Cut = "usual",
) -> Media:
    """Make samples in one batch; each is what it is alone.

    Args:
        jobs: B of one layout and plan.
        inputs: of one of them; adapters are read.
        requests: of each, of equal shapes.
        params: from `load`.
        watch: see `pipeline.sample`.
        tiles: that the videos are decoded in.
    """
    job, mesh = jobs[0], mesh_of(jobs[0].config)
    result = pipeline.run(
        job.plan,
        job.nets,
        params,
        inputs.adapters,
        jax.tree.map(lambda *rows: jnp.concatenate(rows), *requests),
        jnp.stack([jax.random.key(job.config.seed) for job in jobs]),
        layout=job.layout,
        numerics=job.config.numerics,
        dtype=job.config.dtype,
        mesh=mesh,
        text_kv=job.config.text_kv,
        without=job.config.without,
        tiles=tiles,
        watch=watch,
    )
    return jax.block_until_ready(result)


def single(job: Job, result: Media, sample: int = 0) -> Media:
    """One sample of a batch, on the host; after the clip that it goes on from, if any.

    Args:
        job: the sample's.
        result: from `run`.
        sample: its number.

    Raises:
        ValueError: for latents that are not finite (their pictures look like any
            others), or a clip to join that has another size.
    """
    latents = each(lambda x: np.asarray(x[sample : sample + 1]), result.latents)
    for name, latent in latents._asdict().items():
        if latent is not None and not np.isfinite(latent).all():
            raise ValueError(
                f"sample: got {name} latents that are NaN or infinite, expected finite "
                "ones; sample in float32, or with smaller guidance scales"
            )
    video, wave = (
        None if x is None else np.asarray(x[sample])
        for x in (result.video, result.wave)
    )
    clip = _continued(job, joining.Clip(video, wave))
    video, wave = (None if x is None else x[None] for x in clip)
    return Media(video, wave, latents)


def _continued(job: Job, clip: joining.Clip) -> joining.Clip:
    """What is written of a clip that goes on from another: what is new, or both."""
    config, rate = job.config, job.nets.vocoder.sample_rate
    options: dict[str, Any] = {"overlap": config.overlap, "fps": config.fps}
    path = config.continue_from
    if path is None:
        return clip
    if not config.joined:
        return joining.fresh(clip, rate, **options)
    frames, wave = media.read_video(path, config.fps), media.read_audio(path, rate)
    return joining.joined(joining.Clip(frames, wave), clip, rate, **options)


def generate(
    job: Job, inputs: Inputs, watch: Watch | None = None
) -> tuple[Media, dict[str, float]]:
    """Load the weights, sample and decode one sample.

    Args:
        job: from `check`.
        inputs: from `check`.
        watch: see `pipeline.sample`.

    Returns:
        The sample, and how many seconds each part took.

    Raises:
        ValueError: if weights are missing or do not fit, or latents are not finite.
    """
    clock = [time.perf_counter()]
    found = texts((job.config,), job.nets, inputs.text)
    clock.append(time.perf_counter())
    params = load(job.config, job.nets)
    asked = request(job, inputs, params, found)
    clock.append(time.perf_counter())
    cut = tile_choice.explicit(job.config)
    result = run([job], inputs, [asked], params, watch, cut)
    clock.append(time.perf_counter())
    text_s, load_s, sample_s = np.diff(clock).round(3).tolist()
    spent = {"text": text_s, "load": load_s, "sample": sample_s}
    return single(job, result), spent

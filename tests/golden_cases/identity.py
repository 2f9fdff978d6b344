"""Identity-guided sampling, stage by stage and step by step, against the reference.

The reference puts reference audio before the target, ours stands behind it: recorded
audio tokens are permuted on the way in and out.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from golden_cases.transformer import load
from idlora_jax import denoise, images, pipeline, plans
from idlora_jax.config_upsampler import upsampler_config
from idlora_jax.pipeline import Request
from idlora_jax.types import AV, Layout, Prompt, each
from idlora_jax.weights import rules, tables

NAMES = {
    "pos": "positive",
    "neg": "text",
    "noref": "identity",
    "stg": "stg",
    "bimodal": "bimodal",
}
"""The recorded name of each branch, and that of its term."""
FIT: dict[str, images.Fit] = {"2.0": "stretch", "2.3": "crop"}
"""How each generation's one-stage script brings an image to size."""


class Run(NamedTuple):
    """A stage that was sampled: what went in, what was seen, what came out."""

    denoiser: Any
    clean: AV
    noisy: AV
    done: AV
    seen: denoise.Record
    sigmas: np.ndarray
    count: int


PLANS = {
    "identity_one_stage": plans.one_stage,
    "identity_no_reference": plans.one_stage,
    "identity_two_stage": plans.two_stage,
    "identity_two_stage_hq": plans.two_stage_hq,
}


def plan(golden: Golden) -> plans.Plan:
    p = golden.params
    (layer,) = p["stg_blocks"]
    scales = {
        "video_cfg": p["video_cfg"],
        "audio_cfg": p["audio_cfg"],
        "identity": p["identity_scale"],
        "stg": p["stg_scale"],
        "stg_layer": layer,
        "bimodal": p["av_bimodal_scale"],
    }
    if golden.case == "identity_two_stage_hq":
        # These numbers only switch CFG-star on.
        for name in AV._fields:
            scales[f"{name}_star"] = p[f"{name}_rescale"] > 0
    return PLANS[golden.case](steps=p["steps"], **scales)


def request(golden: Golden) -> Request:
    """Latents channel-last; the audio noise with its reference rows behind."""
    x = {k: jnp.asarray(v) for k, v in golden.inputs.items()}
    prompts = tuple(Prompt(x[f"v_context_{k}"], x[f"a_context_{k}"]) for k in "pn")
    reference, first_frame = x.get("ref_audio_latent"), x.get("image_latent")
    count = 0 if reference is None else reference.shape[2]
    return Request(
        prompts,
        None if reference is None else jnp.moveaxis(reference, 1, -1),
        None if first_frame is None else jnp.moveaxis(first_frame, 1, -1),
        AV(x["noise.video"], jnp.roll(x["noise.audio"], -count, axis=1)),
    )


def recorded(x: AV, count: int) -> AV:
    """Tokens (on axis 1) in the recorded order, `count` reference tokens first."""
    return AV(x.video, np.roll(x.audio, count, axis=1))


def stored(prefix: str, suffix: str, pair: AV) -> dict[str, Any]:
    found = each(lambda name, x: {f"{prefix}{name}{suffix}": x}, AV(*AV._fields), pair)
    return found.video | found.audio


def init(tag: str, run: Run) -> dict[str, Any]:
    def part(f: Any, s: AV = run.clean) -> AV:
        return recorded(each(f, s), run.count)

    out = {f"{tag}.sigmas": run.sigmas}
    out |= stored(f"{tag}.init.", "", part(lambda s: s.x, run.noisy))
    out |= stored(f"{tag}.", ".clean_latent", part(lambda s: s.clean))
    mask = part(lambda s: s.denoise[..., None].astype(jnp.float32))
    out |= stored(f"{tag}.", ".denoise_mask", mask)
    pos = AV(run.clean.video.pos, np.roll(run.clean.audio.pos, run.count, axis=2))
    return out | stored(f"{tag}.", ".positions", pos)


def calls(tag: str, run: Run) -> dict[str, Any]:
    out = {}
    for n in range(len(run.seen.x.video)):
        for name, value in (("latent", run.seen.x), ("denoised", run.seen.guided)):
            pair = recorded(each(lambda a, n=n: a[n], value), run.count)
            out |= stored(f"{tag}.call{n:02d}.", f".{name}", pair)
    tokens = recorded(each(lambda s: s.x, run.done), run.count)
    return out | stored(f"{tag}.final.", ".tokens", tokens)


@jax.jit
def predictions(denoiser: Any, s: AV, x: AV, sigma: Any) -> tuple[AV, ...]:
    at = each(lambda s, x: s._replace(x=x), s, x)
    return denoise.predictions(denoiser, at, sigma)


def branches(golden: Golden, stage: plans.Stage, run: Run) -> dict[str, Any]:
    """The recorded predictions of single branches, at the inputs we arrive at."""
    # A recorded step is a solver's step, which may take several model calls.
    per_step = 2 if stage.solver == "res2s" else 1
    steps = {int(m[1]) for k in golden.outputs if (m := re.match(r"step(\d+)\.", k))}
    terms = ("positive", *(term.name for term in stage.terms))
    out = {}
    for n in sorted(steps):
        x = each(lambda a, n=n: a[per_step * n], run.seen.x)
        sigma = jnp.float32(run.sigmas[n])
        found = predictions(run.denoiser, run.noisy, x, sigma)
        x0 = dict(zip(terms, found, strict=True))
        for name, term in NAMES.items():
            if term not in x0:
                continue
            pair = recorded(x0[term], run.count)
            if name == "noref":
                pair = AV(pair.video, pair.audio[:, run.count :])
            out |= stored(f"step{n}.{name}.", "", pair)
    return out


def draws(golden: Golden, tag: str, count: int) -> AV | None:
    """Recorded noise of a solver that draws, in the order of its calls."""
    found = golden.sub(f"sde_noise.{tag}")
    if not found:
        return None
    steps = 1 + max(int(name.split(".")[0].removeprefix("step")) for name in found)

    def pieces(name: str) -> jax.Array:
        keys = [(f"step{n}.sub.{name}", f"step{n}.full.{name}") for n in range(steps)]
        return jnp.stack([jnp.asarray(found[key]) for pair in keys for key in pair])

    video, audio = (pieces(name) for name in AV._fields)
    return AV(video, jnp.roll(audio, -count, axis=2))


def sampled(
    stage: plans.Stage,
    cfg: Any,
    base: Any,
    asked: Request,
    layout: Layout,
    numerics: str,
    *,
    before: AV | None = None,
    draws: AV | None = None,
) -> Run:
    """One stage as `pipeline.sample` does it, every model call recorded."""
    if asked.reference is None:
        stage = plans.without_reference(stage)
    sigmas = stage.sigmas.table(layout, numerics)
    if before is None:
        clean = pipeline.start(asked, layout, numerics=numerics)
    else:
        clean = pipeline.refine(asked, before, layout, numerics=numerics)
    noisy = pipeline.add_noise(clean, asked.noise, sigmas[0])
    args = (stage, cfg, {"params": base}, clean, asked.prompts, layout)
    denoiser = pipeline.denoiser(*args, numerics=numerics)
    solver, weights = plans.SOLVERS[stage.solver](), stage.weights(sigmas)
    done, seen = denoise.sample(
        denoiser, solver, sigmas, noisy, draws, weights=weights, record=True
    )
    count = 0 if asked.reference is None else asked.reference.shape[1]
    return Run(denoiser, clean, noisy, done, seen, sigmas, count)


def theirs(latents: AV) -> AV:
    return each(lambda x: jnp.moveaxis(x, -1, 1), latents)


def encoder_inputs(golden: Golden, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """What the video VAE encodes as first frame, for each stage."""
    if "image" not in golden.inputs:
        return {}
    image = np.moveaxis(golden.inputs["image"], 0, -1)
    one = golden.case == "identity_one_stage"
    fit: images.Fit = FIT[golden.generation] if one else "crop"
    found = [images.fit_image(image, *size, fit) for size in sizes]
    named = enumerate(np.moveaxis(pixels, -1, 0)[None, :, None] for pixels in found)
    return {f"encoder_input{n}": x for n, x in named}


@case("identity_one_stage", "identity_no_reference")
def one_stage(golden: Golden, numerics: str) -> dict[str, Any]:
    p = golden.params
    layout = pipeline.clip(p["num_frames"], p["height"], p["width"], p["fps"])
    (stage,) = plan(golden).stages
    asked = request(golden)
    run = sampled(stage, *load(golden), asked, layout, numerics)
    if asked.reference is None:
        stage = plans.without_reference(stage)
    out = init("stage1", run) | calls("stage1", run) | branches(golden, stage, run)
    out |= stored("final_", "", theirs(pipeline.finish(run.done, layout)))
    return out | encoder_inputs(golden, [(p["height"], p["width"])])


def upsampler(golden: Golden) -> tuple[Any, dict[str, Any]]:
    """The upsampler, and the statistics of the video VAE, as `enlarge` takes them."""
    cfg = upsampler_config(golden.params["upsampler"])
    params = rules.import_(golden.sub("upsampler_weights"), tables.UPSAMPLER)
    stats = {name: golden.inputs[f"vae_{name}"] for name in ("mean", "std")}
    return cfg, {**params, "video_vae": {"stats": stats}}


@case("identity_two_stage", "identity_two_stage_hq")
def two_stage(golden: Golden, numerics: str) -> dict[str, Any]:
    p = golden.params
    layout = pipeline.clip(p["num_frames"], p["height"], p["width"], p["fps"])
    first, second = plan(golden).stages
    asked = request(golden)
    cfg, base = load(golden)
    count = asked.reference.shape[1]
    noise = draws(golden, "stage1", count)
    run = sampled(first, cfg, base, asked, layout, numerics, draws=noise)
    out = init("stage1", run) | calls("stage1", run) | branches(golden, first, run)
    latents = pipeline.finish(run.done, layout)
    out |= stored("stage1_", "", theirs(latents))

    before = pipeline.enlarge(*upsampler(golden), latents)
    out["upsampled_video"] = theirs(before).video
    changed = golden.weights | golden.sub("stage2_weights")
    cfg, base = load(golden._replace(weights=changed))
    frame = golden.inputs.get("image_latent_stage2")
    again = Request(
        asked.prompts,
        first_frame=None if frame is None else jnp.moveaxis(jnp.asarray(frame), 1, -1),
        noise=AV(
            *(jnp.asarray(golden.inputs[f"noise.stage2.{n}"]) for n in AV._fields)
        ),
    )
    grown = pipeline.larger(layout)
    options = {"before": before, "draws": draws(golden, "stage2", 0)}
    run = sampled(second, cfg, base, again, grown, numerics, **options)
    out |= init("stage2", run) | calls("stage2", run)
    done = pipeline.finish(run.done, grown)
    np.testing.assert_array_equal(done.audio, latents.audio)
    out |= stored("final_", "", theirs(done))
    sizes = [(g.video.height, g.video.width) for g in (layout, grown)]
    return out | encoder_inputs(golden, sizes)

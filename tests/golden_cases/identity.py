"""Identity-guided sampling in one stage, step by step, against the recorded reference.

The reference puts reference audio before the target, ours stands behind it: recorded
audio tokens are permuted on the way in and out.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from golden_cases.transformer import load
from idlora_jax import denoise, images, pipeline, plans
from idlora_jax.pipeline import Request
from idlora_jax.types import AV, Layout, Prompt, each

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


def plan(golden: Golden) -> plans.Plan:
    p = golden.params
    (layer,) = p["stg_blocks"]
    return plans.one_stage(
        steps=p["steps"],
        video_cfg=p["video_cfg"],
        audio_cfg=p["audio_cfg"],
        identity=p["identity_scale"],
        stg=p["stg_scale"],
        stg_layer=layer,
        bimodal=p["av_bimodal_scale"],
    )


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


def init(clean: AV, noisy: AV, sigmas: np.ndarray, count: int) -> dict[str, Any]:
    def part(f: Any, s: AV = clean) -> AV:
        return recorded(each(f, s), count)

    out = {"stage1.sigmas": sigmas}
    out |= stored("stage1.init.", "", part(lambda s: s.x, noisy))
    out |= stored("stage1.", ".clean_latent", part(lambda s: s.clean))
    mask = part(lambda s: s.denoise[..., None].astype(jnp.float32))
    out |= stored("stage1.", ".denoise_mask", mask)
    pos = AV(clean.video.pos, np.roll(clean.audio.pos, count, axis=2))
    return out | stored("stage1.", ".positions", pos)


def calls(seen: denoise.Record, count: int) -> dict[str, Any]:
    out = {}
    for n in range(len(seen.x.video)):
        for name, value in (("latent", seen.x), ("denoised", seen.x0)):
            pair = recorded(each(lambda a, n=n: a[n], value), count)
            out |= stored(f"stage1.call{n:02d}.", f".{name}", pair)
    return out


@jax.jit
def predictions(denoiser: Any, s: AV, x: AV, sigma: Any) -> tuple[AV, ...]:
    at = each(lambda s, x: s._replace(x=x), s, x)
    return denoise.predictions(denoiser, at, sigma)


def branches(
    golden: Golden, stage: plans.Stage, run: Any, layout: Layout
) -> dict[str, Any]:
    """The recorded predictions of single branches, at the inputs we arrive at."""
    denoiser, s, seen, sigmas, count = run
    steps = {int(m[1]) for k in golden.outputs if (m := re.match(r"step(\d+)\.", k))}
    terms = ("positive", *(term.name for term in stage.terms))
    out = {}
    for n in sorted(steps):
        x = each(lambda a, n=n: a[n], seen.x)
        found = predictions(denoiser, s, x, jnp.float32(sigmas[n]))
        x0 = dict(zip(terms, found, strict=True))
        for name, term in NAMES.items():
            pair = recorded(x0[term], count)
            if name == "noref":
                pair = AV(pair.video, pair.audio[:, count:])
            out |= stored(f"step{n}.{name}.", "", pair)
    return out


@case("identity_one_stage", "identity_no_reference")
def one_stage(golden: Golden, numerics: str) -> dict[str, Any]:
    p = golden.params
    layout = pipeline.clip(p["num_frames"], p["height"], p["width"], p["fps"])
    cfg, base = load(golden)
    (stage,) = plan(golden).stages
    asked = request(golden)
    count = 0 if asked.reference is None else asked.reference.shape[1]
    if asked.reference is None:
        stage = plans.without_reference(stage)
    sigmas = stage.sigmas.table(layout, numerics)
    clean = pipeline.start(asked, layout, numerics=numerics)
    noisy = pipeline.add_noise(clean, asked.noise, sigmas[0])
    args = (stage, cfg, {"params": base}, clean, asked.prompts, layout)
    denoiser = pipeline.denoiser(*args, numerics=numerics)
    solver, weights = plans.SOLVERS[stage.solver](), stage.weights(len(sigmas) - 1)
    done, seen = denoise.sample(
        denoiser, solver, sigmas, noisy, weights=weights, record=True
    )
    out = init(clean, noisy, sigmas, count) | calls(seen, count)
    run = (denoiser, noisy, seen, sigmas, count)
    out |= branches(golden, stage, run, layout)
    tokens = recorded(each(lambda s: s.x, done), count)
    out |= stored("stage1.final.", ".tokens", tokens)
    latents = each(lambda x: jnp.moveaxis(x, -1, 1), pipeline.finish(done, layout))
    out |= {f"final_{name}": x for name, x in latents._asdict().items()}
    if "image" in golden.inputs:
        image = np.moveaxis(golden.inputs["image"], 0, -1)
        fit = FIT[golden.generation]
        pixels = images.fit_image(image, p["height"], p["width"], fit)
        out["encoder_input0"] = np.moveaxis(pixels, -1, 0)[None, :, None]
    return out

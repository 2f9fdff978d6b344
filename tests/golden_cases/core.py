"""Grids, schedules, guidance, solver steps and whole loops on a toy denoiser."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from idlora_jax import denoise, geometry, guidance, losses, schedules, solvers
from idlora_jax.types import AV, AudioGrid, VideoGrid, each, stream


@case("positions")
def positions(golden: Golden, numerics: str) -> dict[str, Any]:
    p = golden.params
    latents = [geometry.audio_latents(s) for s in p["durations"]]
    out: dict[str, Any] = {"audio_latent_frames": np.array(latents)}
    shapes = []
    for i, (batch, *size) in enumerate(p["video"]):
        grid = geometry.video_grid(*size)
        shapes.append([batch, geometry.VIDEO_CHANNELS, *geometry.latent_shape(grid)])
        found = _grid_outputs(grid, numerics)
        for name, value in found.items():
            out[f"video{i}.{name}"] = np.broadcast_to(value, (batch, *value.shape[-3:]))
    out["video_latent_shape"] = np.array(shapes)
    for frames in p["audio_frames"]:
        grid = AudioGrid(frames)
        out[f"audio{frames}"] = geometry.positions(grid, numerics=numerics)
    for frames in p["ref_frames"]:
        name = f"ref{frames}"
        out[name] = geometry.reference_positions(frames, numerics=numerics)
        if numerics == "reference":
            out[f"{name}.bf16_pipeline"] = geometry.reference_positions(
                frames, numerics=numerics, rounding="infer_bf16"
            )
    return out


def _grid_outputs(grid: VideoGrid, numerics: str) -> dict[str, np.ndarray]:
    out = {
        "latent_coords": geometry.latent_bounds(grid),
        "pixel_coords": geometry.pixel_bounds(grid),
        "positions": geometry.positions(grid, numerics=numerics),
    }
    if numerics == "reference":
        for name, rounding in (("bf16", "infer_bf16"), ("train_bf16", "train_bf16")):
            out[f"positions_{name}"] = geometry.positions(
                grid, numerics=numerics, rounding=rounding
            )
    return out


@case("schedulers")
def schedulers(golden: Golden, numerics: str) -> dict[str, Any]:
    p = golden.params
    out: dict[str, Any] = {
        "distilled": schedules.distilled(),
        "stage2_distilled": schedules.stage2_distilled(),
    }
    for steps in p["steps"]:
        name = f"ltx2.steps{steps}"
        out[name] = schedules.ltx2(steps, numerics=numerics)
        for f, h, w in p["tokens"]:
            out[f"{name}.tok{f}x{h}x{w}"] = schedules.ltx2(
                steps, tokens=f * h * w, numerics=numerics
            )
    for i, (steps, linear) in enumerate(p["lq"]):
        out[f"lq.{i}"] = schedules.linear_quadratic(steps, linear)
    for steps in p["beta"]:
        out[f"beta.{steps}"] = schedules.beta(steps)
    lr = schedules.linear_decay(2e-4, 10)
    out["linear_lr"] = np.array([lr(step) for step in range(11)])
    for i, tokens in enumerate(p["seq"]):
        draws = (golden.inputs[f"sampler.{k}"][i] for k in losses.SigmaDraws._fields)
        out[f"sampler.seq{tokens}"] = losses.shifted_logit_normal(
            losses.SigmaDraws(*map(jnp.asarray, draws)), tokens, golden.generation
        )
    return out


def _weighted(term: guidance.Term, scale: float, *x0: Any) -> Any:
    """The weighted direction of one term on a single tensor."""
    (delta,), _ = guidance.directions((term,), tuple(AV(x, None) for x in x0))
    weight = guidance.weights((term,), {term.name: (scale, scale)}, 1)[0, 0, 0]
    return weight * delta.video


@case("guiders_steps")
def guiders_steps(golden: Golden, numerics: str) -> dict[str, Any]:
    p, x = golden.params, {k: jnp.asarray(v) for k, v in golden.inputs.items()}
    text, star = guidance.text_cfg(), guidance.text_cfg(guidance.star)
    out = {
        "cfg": _weighted(text, p["cfg"], x["cond"], x["uncond"]),
        "cfg_star": _weighted(star, p["cfg"], x["cond"], x["uncond"]),
        "stg": _weighted(guidance.stg([0]), p["stg"], x["cond"], x["ptb"]),
    }
    for i, (scale, eta, threshold) in enumerate(p["apg"]):
        apg = guidance.text_cfg(guidance.Apg(eta, threshold or None))
        out[f"apg{i}"] = _weighted(apg, scale, x["cond4"][:1], x["uncond4"][:1])
    out |= _momentum(golden, x)
    out |= _steps(x)
    if golden.generation == "2.3":
        out |= _multimodal(p, x) | _res2s_parts(x)
    return out


def _momentum(golden: Golden, x: dict[str, Any]) -> dict[str, Any]:
    scale, eta, threshold = golden.params["apg"][0]
    apg = guidance.Apg(eta, threshold or None)
    term = guidance.Term("t", project=apg, momentum=golden.params["momentum"])
    memory = guidance.memory((term,), AV(x["cond4"][:1], None))
    out = {}
    for i in range(2):
        x0 = tuple(AV(x[k][i : i + 1], None) for k in ("cond4", "uncond4"))
        (delta,), memory = guidance.directions((term,), x0, memory)
        out[f"legacy_apg.{i}"] = scale * delta.video
    return out


def _multimodal(p: dict[str, Any], x: dict[str, Any]) -> dict[str, Any]:
    terms = (guidance.text_cfg(), guidance.stg([0]), guidance.bimodal())
    scales = {"text": p["cfg"], "stg": p["stg"], "bimodal": p["mod"]}
    pairs = {name: (scale, scale) for name, scale in scales.items()}
    weights = jnp.asarray(guidance.weights(terms, pairs, 1)[0])
    x0 = tuple(AV(x[k], None) for k in ("cond", "uncond", "ptb", "mod"))
    return {
        f"multimodal.rescale{i}": guidance.combine(
            x0, weights, rescale=jnp.array([share, share]), over="batch"
        ).video
        for i, share in enumerate(p["rescale"])
    }


def _steps(x: dict[str, Any]) -> dict[str, Any]:
    solver = solvers.euler()
    ratio = solver.table(np.asarray(x["sigmas"])).rows.ratio
    pair = AV(x["sample"], None), AV(x["denoised"], None)
    out = {
        f"euler{i}": solver.step(*pair, (), solvers.EulerRow(r), None)[0].video
        for i, r in enumerate(ratio)
    }
    mask = x["denoise_mask"][..., 0] > 0
    t = mask.shape[1]
    fixed = stream(x["clean"], x["clean"], mask, jnp.zeros((len(mask), 1, t, 2)))
    return out | {"post": denoise.pin(x["denoised"], fixed)}


def _res2s_parts(x: dict[str, Any]) -> dict[str, Any]:
    s = np.asarray(x["sigmas"], np.float64)
    inner = s[1:-1]
    coefficients = solvers.res2s_coefficients(np.log(s[:-2] / inner))
    swap = solvers.noise_coefficients(s[:-1], s[1:])
    out = {
        "res2s_coeff": np.stack(coefficients, 1),
        "sde_coeff": np.stack(solvers.sde_coefficients(inner), 1),
    }
    for i in range(len(s) - 1):
        row = solvers.NoiseCoefficients(*(np.float32(c[i]) for c in swap))
        out[f"res2s_step{i}"] = solvers.swap_noise(
            x["denoised"], x["sample"], x["noise"], row
        )
    return out


def _toy(golden: Golden) -> denoise.Denoise:
    toys = AV(*(_arrays(golden.sub(f"toy.{m}")) for m in AV._fields))

    def toy(streams: AV, sigma: Any, weights: Any, memory: Any) -> tuple[AV, Any]:
        def one(s: Any, t: dict[str, Any]) -> Any:
            return jnp.tanh(s.x @ t["M"]) * (1 - 0.5 * sigma) + 0.1 * t["b"]

        return each(one, streams, toys), memory

    return toy


def _arrays(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    return {k: jnp.asarray(v) for k, v in tensors.items()}


def _toy_stream(tensors: dict[str, np.ndarray]) -> Any:
    x, clean = jnp.asarray(tensors["latent"]), jnp.asarray(tensors["clean"])
    mask = jnp.asarray(tensors["denoise_mask"])[..., 0] > 0
    return stream(x, clean, mask, jnp.zeros((len(x), 1, x.shape[1], 2)))


@case("denoise_loops")
def denoise_loops(golden: Golden, numerics: str) -> dict[str, Any]:
    streams = AV(*(_toy_stream(golden.sub(m)) for m in AV._fields))
    sigmas, toy = golden.inputs["sigmas"], _toy(golden)
    runs = {
        "euler": solvers.euler(),
        "ge_euler": solvers.gradient_estimation(golden.params["ge_gamma"]),
        "res2s": solvers.res2s(),
        "res2s_nobong": solvers.res2s(bong=False),
    }
    noise = each(jnp.asarray, AV(*(_recorded(golden, m) for m in AV._fields)))
    out = {}
    for name, solver in runs.items():
        done = denoise.sample(toy, solver, sigmas, streams, noise)
        out |= {f"{name}.{m}": s.x for m, s in done._asdict().items()}
    return out


def _recorded(golden: Golden, modality: str) -> np.ndarray:
    """The recorded draws in the order of the calls."""
    steps = len(golden.inputs["sigmas"]) - 1
    names = (f"step{i}.{call}.{modality}" for i in range(steps) for call in CALLS)
    return np.stack([golden.inputs[f"sde_noise.{name}"] for name in names])


CALLS = ("sub", "full")

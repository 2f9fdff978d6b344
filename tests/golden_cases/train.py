"""Training steps of ID-LoRA: inputs, losses, gradients, parameters after AdamW.

Files put reference tokens first, ours stand last; masks are recorded as arrays and are
facts of the `Branch` here, so they are written out again from what the step was given.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
from goldens import Golden

from golden_cases import case
from golden_cases.transformer import load
from idlora_jax import experiment, optimizers, strategies, training
from idlora_jax.model import transformer
from idlora_jax.types import AV, Branch, Prompt
from idlora_jax.weights import lora

FLOOR = np.finfo(np.float32).min


def spec_of(golden: Golden) -> experiment.Strategy:
    flags = golden.params["strategy"]
    return experiment.Strategy(
        first_frame_p=flags["first_frame_conditioning_p"],
        video_sees_ref=not flags["mask_cross_attention_to_reference"],
        ref_sees_text=not flags["mask_reference_from_text_attention"],
        negative_positions=flags["use_negative_ref_positions"],
        sigma=golden.generation,
    )


def batch_of(golden: Golden, step: int) -> strategies.Batch:
    x = golden.sub(f"step{step}")
    ours = {n: jnp.moveaxis(jnp.asarray(v), 1, -1) for n, v in x.items() if v.ndim > 3}
    prompt = Prompt(
        jnp.asarray(x["video_prompt_embeds"]),
        jnp.asarray(x["audio_prompt_embeds"]),
        jnp.asarray(golden.inputs["prompt_attention_mask"] > 0),
    )
    return strategies.Batch(
        ours["latents"], ours["audio_latents"], ours["ref_audio_latents"], prompt
    )


def draws_of(golden: Golden, step: int) -> strategies.Draws:
    x, p = golden.sub(f"step{step}"), golden.params
    sigma = jnp.asarray(x["sigmas"])
    given = p["first_frame_draws"][step] < p["strategy"]["first_frame_conditioning_p"]
    noise = AV(jnp.asarray(x["video_noise"]), jnp.asarray(x["audio_noise"]))
    return strategies.Draws(jnp.full(len(sigma), given), AV(sigma, sigma), noise)


def remembering() -> optax.GradientTransformation:
    """Pass gradients on and keep them as state: what reached the optimizer."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, old, params=None: (grads, grads),
    )


class Run(NamedTuple):
    """The compiled functions of one file: both numerics modes share their trace."""

    cfg: Any
    base: Any
    adapter: Any
    task: training.Task
    tx: Any
    step: Any
    predict: Any


@functools.lru_cache(maxsize=8)
def run_of(name: str) -> Run:
    golden = goldens.load(goldens.FOLDER / f"{name}.safetensors")
    p = golden.params
    cfg, base = load(golden)
    # Recorded with torch's fused attention.
    cfg = dataclasses.replace(cfg, blind_gradient="fused")
    settings = experiment.Optimizer(
        learning_rate=p["lr"],
        schedule="constant",
        betas=tuple(p["betas"]),
        eps=p["eps"],
        weight_decay=p["weight_decay"],
        clip=p["max_grad_norm"],
    )
    task = training.Task(
        transformer.bind(cfg, remat="none"),
        functools.partial(transformer.prepare, cfg),
        spec_of(golden),
        fps=p["fps"],
        scale=p["alpha"] / p["rank"],
    )
    tx = optax.chain(remembering(), optimizers.make_optimizer(settings, 10))
    step = training.make_train_step(task, tx, jax.random.key(0))
    predict = jax.jit(functools.partial(training.predict, task))
    adapter = lora.import_(golden.sub("lora"), base)
    base, adapter = jax.tree.map(jnp.asarray, (base, adapter))
    return Run(cfg, base, adapter, task, tx, step, predict)


def reference_first(x: Any, targets: int, axis: int = 1) -> np.ndarray:
    """Our order (targets, reference) to the recorded one."""
    return np.roll(np.asarray(x), np.shape(x)[axis] - targets, axis)


def recorded_inputs(
    golden: Golden, inputs: strategies.TrainInputs, branch: Branch
) -> dict[str, Any]:
    n = strategies.targets(inputs)
    out: dict[str, Any] = {}
    for name in AV._fields:
        s, sigma, count = (
            getattr(av, name) for av in (inputs.streams, inputs.sigma, n)
        )
        out[f"{name}.latent"] = reference_first(s.x, count)
        out[f"{name}.positions"] = reference_first(s.pos, count, 2)
        out[f"{name}.timesteps"] = reference_first(s.denoise * sigma[:, None], count)
        mask = np.zeros(s.denoise.shape, bool)
        mask[:, :count] = getattr(inputs.mask, name)
        out[f"{name}_loss_mask"] = reference_first(mask, count)
        out[f"{name}_targets"] = getattr(inputs.velocity, name)
        out[f"{name}.context_mask"] = np.asarray(inputs.prompt.mask, np.int64)
    audio, count = inputs.streams.audio, n.audio
    tokens = inputs.streams.video.x.shape[1]
    is_ref = np.asarray(audio.is_ref)
    if not branch.video_sees_ref:
        hidden = np.where(is_ref, FLOOR, 0)[:, None].repeat(tokens, 1)
        out["video.a2v_cross_attention_mask"] = reference_first(hidden, count, 2)
    if not branch.ref_sees_text:
        padding = np.where(inputs.prompt.mask, 0, FLOOR)[:, None]
        hidden = np.where(is_ref[:, :, None], FLOOR, padding)
        old = golden.generation == "2.0"
        name = "audio.context_mask" if old else "audio.audio_context_attn_mask"
        out[name] = reference_first(hidden, count)
    return out


@case("train_step_masked", "train_step_plain")
def train_step(golden: Golden, numerics: str) -> dict[str, Any]:
    run, out = run_of(golden.name), {}
    spec, fps = run.task.spec, run.task.fps
    state = training.init(jax.tree.map(jnp.copy, run.adapter), run.base, run.tx)
    for i in range(len(golden.params["first_frame_draws"])):
        batch, draws = batch_of(golden, i), draws_of(golden, i)
        inputs = strategies.prepare(draws, batch, spec, fps=fps, numerics=numerics)
        tables = transformer.prepare(run.cfg, {}, inputs.streams, (), numerics=numerics)
        if i == 0:
            seen = recorded_inputs(golden, inputs, strategies.branch(spec))
            out |= {f"step0.inputs.{name}": value for name, value in seen.items()}
            pred = run.predict(run.base, state.adapter, inputs, tables)
            count = strategies.targets(inputs).audio
            out["step0.pred_video"] = pred.video
            out["step0.pred_audio"] = reference_first(pred.audio, count)
        state, metrics = run.step(state, run.base, batch, draws, tables)
        for name in ("loss", "video_loss", "audio_loss", "grad_norm"):
            out[f"step{i}.{name}"] = metrics[name]
        if i == 0:
            for name, tree in (("grad", state.opt_state[0]), ("after1", state.adapter)):
                tensors = lora.export(tree).items()
                out |= {f"{name}.{key}": value for key, value in tensors}
    return out | {f"after.{k}": v for k, v in lora.export(state.adapter).items()}

"""Training steps of ID-LoRA: inputs, losses, gradients, parameters after AdamW.

Files put reference tokens first, ours stand last; masks are recorded as arrays and are
facts of the `Branch` here, so they are written out again from what the step was given.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from golden_cases.transformer import load
from idlora_jax import experiment, strategies, training
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


class Setup:
    """The compiled functions of one file: both numerics modes share their trace."""

    def __init__(self, golden: Golden) -> None:
        p = golden.params
        self.cfg, base = load(golden)
        self.base = jax.tree.map(jnp.asarray, base)
        spec = spec_of(golden)
        settings = experiment.Optimizer(
            learning_rate=p["lr"],
            schedule="constant",
            betas=tuple(p["betas"]),
            eps=p["eps"],
            weight_decay=p["weight_decay"],
            clip=p["max_grad_norm"],
        )
        self.task = training.Task(
            transformer.bind(self.cfg, remat="none"),
            functools.partial(transformer.prepare, self.cfg),
            spec,
            fps=p["fps"],
            scale=p["alpha"] / p["rank"],
        )
        self.tx = training.make_optimizer(settings, 10)
        self.step = training.make_train_step(self.task, self.tx, jax.random.key(0))
        # Named `step0.pred_*`, and gradients, which the step keeps for itself.
        self.predict = jax.jit(functools.partial(training.predict, self.task))
        self.grad = jax.jit(jax.grad(self._loss))
        self.adapter = jax.tree.map(
            jnp.asarray, lora.import_(golden.sub("lora"), base)
        )

    def _loss(self, adapter: Any, inputs: Any, tables: Any) -> Any:
        return training.loss(self.task, self.base, adapter, inputs, tables)[0]


@functools.lru_cache(maxsize=1)
def _setup(name: str) -> list[Setup]:
    return []


def reference_first(x: Any, targets: int, axis: int = 1) -> np.ndarray:
    """Our order (targets, reference) to the recorded one."""
    return np.roll(np.asarray(x), np.shape(x)[axis] - targets, axis)


def recorded_inputs(
    golden: Golden, inputs: strategies.TrainInputs, branch: Branch
) -> dict[str, Any]:
    n = strategies.targets(inputs)
    out: dict[str, Any] = {}
    for name in AV._fields:
        s, sigma, count = (getattr(av, name) for av in (inputs.streams, inputs.sigma, n))
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
    kept = _setup(golden.name)
    if not kept:
        kept.append(Setup(golden))
    (run,) = kept
    spec, out = run.task.spec, {}
    state = training.init(jax.tree.map(jnp.copy, run.adapter), run.base, run.tx)
    for i in range(len(golden.params["first_frame_draws"])):
        batch, draws = batch_of(golden, i), draws_of(golden, i)
        inputs = strategies.prepare(
            draws, batch, spec, fps=run.task.fps, numerics=numerics
        )
        tables = transformer.prepare(run.cfg, {}, inputs.streams, (), numerics=numerics)
        if i == 0:
            seen = recorded_inputs(golden, inputs, strategies.branch(spec))
            out |= {f"step0.inputs.{name}": value for name, value in seen.items()}
            pred = run.predict(run.base, state.adapter, inputs, tables)
            count = strategies.targets(inputs).audio
            out["step0.pred_video"] = pred.video
            out["step0.pred_audio"] = reference_first(pred.audio, count)
            grads = lora.export(run.grad(state.adapter, inputs, tables))
            out |= {f"grad.{key}": value for key, value in grads.items()}
        state, metrics = run.step(state, run.base, batch, draws, tables)
        for name in ("loss", "video_loss", "audio_loss", "grad_norm"):
            out[f"step{i}.{name}"] = metrics[name]
        if i == 0:
            after = lora.export(state.adapter)
            out |= {f"after1.{key}": value for key, value in after.items()}
    return out | {f"after.{k}": v for k, v in lora.export(state.adapter).items()}

"""LoRA training by the PyTorch reference, with PEFT as its trainer uses it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.backends.jax_training import gradient_outputs
from benchmarks.backends.reference import NAME, modality, tensor
from benchmarks.cases import TrainCase
from benchmarks.configs import SIGMA
from benchmarks.works import NotRun, Outputs, Work
from idlora_jax.types import AV

_ATTENTIONS = "audio_attn1 audio_attn2 audio_to_video_attn video_to_audio_attn".split()
_PARTS = ("to_q", "to_k", "to_v", "to_out.0")
MODULES = (
    *(f"{attention}.{part}" for attention in _ATTENTIONS for part in _PARTS),
    "audio_ff.net.0.proj",
    "audio_ff.net.2",
)
"""The 18 modules of a layer that ID-LoRA trains."""


def with_lora(made: Any, rank: int, tensors: Mapping[str, np.ndarray]) -> Any:
    """The network with PEFT's adapter as the reference's trainer makes it.

    Raises:
        NotRun: if peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise NotRun(f"peft is not installed ({error})") from error
    how = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(MODULES), lora_dropout=0.0
    )
    wrapped: Any = peft.get_peft_model(made, how)
    named = {
        name.replace("base_model.model.", "diffusion_model.", 1).replace(
            ".default.", "."
        ): p
        for name, p in wrapped.named_parameters()
        if p.requires_grad
    }
    assert sorted(named) == sorted(tensors), "an adapter of other modules"
    for name, parameter in named.items():
        parameter.data.copy_(tensor(tensors[name]))
    return wrapped, named


def train(
    case: TrainCase,
    made: Any,
    streams: AV,
    velocity: AV,
    tensors: Mapping[str, np.ndarray],
    *,
    checkpoint: bool = True,
) -> Work:
    """One step of LoRA training: forward, backward, clipping, AdamW.

    Args:
        case: the batch.
        made: from `model`; PEFT changes it.
        streams: the noisy streams of that batch, as ours are.
        velocity: what they should give.
        tensors: the adapter by its keys in a file.
        checkpoint: whether blocks are run again in the backward pass.

    Source: ltx_trainer: trainer.py, training_strategies/audio_ref_only_ic.py.
    """
    import torch

    wrapped, named = with_lora(made, case.size.rank, tensors)
    wrapped.get_base_model().set_gradient_checkpointing(checkpoint)
    wrapped.train()
    n, counts = case.size.reference, {"video": 0, "audio": case.size.reference}
    prompt = case.batch.prompt
    video, audio = (
        dataclasses.replace(m, timesteps=m.timesteps[..., 0])
        for m in (modality(k, streams, prompt, counts[k], SIGMA) for k in AV._fields)
    )
    video, audio = _masked(video, audio, n)
    wanted = [tensor(v) for v in velocity]
    counted = tensor(streams.video.denoise)[..., None].float()
    optimizer = torch.optim.AdamW(named.values(), lr=2e-4, weight_decay=0.01)

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        v, a = wrapped(video=video, audio=audio, perturbations=None)
        loss = (v - wanted[0]).pow(2).mul(counted).div(counted.mean()).mean()
        loss = loss + (a[:, n:] - wanted[1]).pow(2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        return loss.detach()

    def outputs(loss: Any) -> Outputs:
        moments = {k: optimizer.state[p]["exp_avg"].numpy() for k, p in named.items()}
        return gradient_outputs(loss.numpy(), moments)

    return Work("checkpoint" if checkpoint else "no checkpoint", NAME, run, outputs)


def _masked(video: Any, audio: Any, n: int) -> tuple[Any, Any]:
    """Video sees no reference tokens, and these see no text."""
    import torch

    floor = torch.finfo(torch.float32).min
    batch, tokens = audio.latent.shape[:2]
    hidden = torch.zeros(batch, video.latent.shape[1], tokens)
    hidden[:, :, :n] = floor
    valid = torch.ones(audio.context.shape[:2], dtype=torch.int64)
    video = dataclasses.replace(
        video, a2v_cross_attention_mask=hidden, context_mask=valid
    )
    blind = torch.zeros(batch, tokens, audio.context.shape[1])
    blind[:, :n] = floor
    newer = "sigma" in type(audio).__dataclass_fields__
    masks = {"context_mask": blind}
    if newer:
        masks = {"context_mask": valid, "audio_context_attn_mask": blind}
    return video, dataclasses.replace(audio, **masks)

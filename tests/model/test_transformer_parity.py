"""The same transformer in diffusers, an independent witness, small and random."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import config
from idlora_jax.model import transformer
from idlora_jax.types import AV, Branch, Prompt, Skip, stream
from idlora_jax.weights import rules, tables

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of torch and diffusers, on import
]

# diffusers' parameter name -> the checkpoint's; the longer names go first.
NAMES = {
    "audio_proj_in.": "audio_patchify_proj.",
    "proj_in.": "patchify_proj.",
    "av_cross_attn_video_scale_shift.": "av_ca_video_scale_shift_adaln_single.",
    "av_cross_attn_audio_scale_shift.": "av_ca_audio_scale_shift_adaln_single.",
    "av_cross_attn_video_a2v_gate.": "av_ca_a2v_gate_adaln_single.",
    "av_cross_attn_audio_v2a_gate.": "av_ca_v2a_gate_adaln_single.",
    "audio_prompt_adaln.": "audio_prompt_adaln_single.",
    "prompt_adaln.": "prompt_adaln_single.",
    "audio_time_embed.": "audio_adaln_single.",
    "time_embed.": "adaln_single.",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
CASES = [
    # generation, rope, (heads, head width) video, audio, layers, seed
    ("2.0", "split", (4, 16), (4, 8), 2, 0),
    ("2.0", "interleaved", (2, 24), (2, 12), 3, 1),
    ("2.3", "split", (4, 16), (4, 8), 2, 2),
    ("2.3", "interleaved", (8, 6), (8, 4), 1, 3),
]


def original_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        if theirs in name:
            name = name.replace(theirs, ours)
            if not name.startswith("transformer_blocks"):
                break
    return f"model.diffusion_model.{name}"


def make(generation, kind, video, audio, layers, seed):
    """(diffusers model, our config, our base) with equal random weights."""
    import torch
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(seed)
    newer = generation == "2.3"
    (vh, vk), (ah, ak) = video, audio
    caption = 20
    theirs = LTX2VideoTransformer3DModel(
        in_channels=12,
        out_channels=12,
        audio_in_channels=10,
        audio_out_channels=10,
        num_attention_heads=vh,
        attention_head_dim=vk,
        cross_attention_dim=vh * vk,
        audio_num_attention_heads=ah,
        audio_attention_head_dim=ak,
        audio_cross_attention_dim=ah * ak,
        num_layers=layers,
        caption_channels=caption,
        rope_type=kind,
        gated_attn=newer,
        audio_gated_attn=newer,
        cross_attn_mod=newer,
        audio_cross_attn_mod=newer,
        use_prompt_embeddings=not newer,
        perturbed_attn=newer,
    ).eval()
    section = {
        "num_layers": layers,
        "num_attention_heads": vh,
        "attention_head_dim": vk,
        "cross_attention_dim": vh * vk,
        "audio_num_attention_heads": ah,
        "audio_attention_head_dim": ak,
        "audio_cross_attention_dim": ah * ak,
        "in_channels": 12,
        "out_channels": 12,
        "audio_in_channels": 10,
        "audio_out_channels": 10,
        "caption_channels": caption,
        "caption_proj_before_connector": newer,
        "apply_gated_attention": newer,
        "cross_attention_adaln": newer,
        "rope_type": kind,
        "frequencies_precision": "float64",
        "av_ca_timestep_scale_multiplier": 1000,
    }
    cfg = config.transformer_config({"transformer": section}, generation)
    named = {original_name(k): v.numpy() for k, v in theirs.state_dict().items()}
    base = rules.import_(named, tables.TRANSFORMER)["transformer"]
    return theirs, cfg, jax.tree.map(jnp.asarray, base)


def inputs(cfg, seed):
    """numpy inputs: first video tokens and last audio tokens are fixed (timestep 0)."""
    rng = np.random.default_rng(seed)
    batch, tv, ta, s = 2, 12, 9, 7
    start = rng.uniform(0, 400, (batch, 3, tv, 1)).astype(np.float32)
    start[:, 0] /= 100
    times = rng.uniform(-4, 4, (batch, 1, ta, 1)).astype(np.float32)
    text = cfg.caption_channels if cfg.caption_projection else None
    widths = [text or cfg.video.width, text or cfg.audio.width]
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    denoise = [np.arange(n)[None] + np.zeros((batch, 1)) for n in (tv, ta)]
    return {
        "x": [draw(batch, tv, 12), draw(batch, ta, 10)],
        "pos": [
            np.concatenate([start, start + np.float32(0.5)], -1),
            np.concatenate([times, times + np.float32(0.04)], -1),
        ],
        "text": [draw(batch, s, w) for w in widths],
        "denoise": [denoise[0] >= 4, denoise[1] < 6],
        "sigma": np.float32([0.85, 0.3]),
    }


def run_theirs(model, cfg, i, **options):
    import torch

    to = torch.from_numpy
    newer = cfg.cross_sigma == "other"
    sigma = to(i["sigma"] * np.float32(1000))
    timesteps = [to(d.astype(np.float32)) * sigma[:, None] for d in i["denoise"]]
    with torch.no_grad():
        out = model(
            hidden_states=to(i["x"][0]),
            audio_hidden_states=to(i["x"][1]),
            encoder_hidden_states=to(i["text"][0]),
            audio_encoder_hidden_states=to(i["text"][1]),
            timestep=timesteps[0],
            audio_timestep=timesteps[1],
            sigma=sigma,
            video_coords=to(i["pos"][0]),
            audio_coords=to(i["pos"][1]),
            use_cross_timestep=newer,
            return_dict=False,
            **options,
        )
    return [o.numpy() for o in out]


@functools.cache
def ours(cfg, branches):
    def run(base, streams, sigma, text):
        variables = {"params": base}
        prepared = transformer.prepare(cfg, variables, streams, (text,))
        return transformer.apply(cfg, variables, prepared, streams, sigma, branches)

    return jax.jit(run)


def run_ours(base, cfg, i, branches):
    streams = AV(
        *(
            stream(*map(jnp.asarray, (x, x, d, p)))
            for x, d, p in zip(i["x"], i["denoise"], i["pos"], strict=True)
        )
    )
    sigma = AV(*[jnp.asarray(i["sigma"])] * 2)
    text = Prompt(*map(jnp.asarray, i["text"]))
    return ours(cfg, branches)(base, streams, sigma, text)


def relative(got, want) -> float:
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[5]}")
def test_velocities_agree_with_diffusers(case):
    model, cfg, base = make(*case)
    i = inputs(cfg, case[-1])
    isolated = (Skip(a2v=True, v2a=True),) * cfg.layers
    branches = [Branch(), Branch(skip=isolated)]
    wanted = [run_theirs(model, cfg, i)]
    wanted.append(run_theirs(model, cfg, i, isolate_modalities=True))
    if cfg.skipped_self_attention == "values":
        last = cfg.layers - 1
        stg = (Skip(),) * last + (Skip(video_self=True, audio_self=True),)
        branches.append(Branch(skip=stg))
        options = {"spatio_temporal_guidance_blocks": [last]}
        wanted.append(run_theirs(model, cfg, i, **options))
    got = run_ours(base, cfg, i, tuple(branches))
    for branch, theirs in zip(got, wanted, strict=True):
        for mine, want in zip(branch, theirs, strict=True):
            assert relative(mine, want) < 1e-4

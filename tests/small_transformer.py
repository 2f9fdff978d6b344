"""Transformers of two layers with random weights, and streams that fit them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from codec_sections import TINY_VIDEO, TINY_VOCODER, audio_section

from idlora_jax import (
    config_codecs,
    config_video_vae,
    config_vocoder,
    geometry,
    streams,
)
from idlora_jax.config import TransformerConfig, transformer_config
from idlora_jax.config_text import text_connector_config
from idlora_jax.model import transformer
from idlora_jax.types import AV, AudioGrid, Prompt, Tree
from idlora_jax.weights.networks import Networks

LAYERS = 2
COMMON: dict[str, Any] = {
    "num_layers": LAYERS,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "caption_channels": 20,
    "rope_type": "split",
    "frequencies_precision": "float64",
    "av_ca_timestep_scale_multiplier": 1000,
}
NEWER: dict[str, Any] = {
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
}
WIDE: dict[str, Any] = {
    "num_layers": 24,
    "attention_head_dim": 64,
    "cross_attention_dim": 128,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 128,
}
"""Weights that are most of what a program holds."""
SECTIONS = {"2.0": COMMON, "2.3": COMMON | NEWER}
GRID = geometry.video_grid(9, 64, 32, 25.0)
SOUND = AudioGrid(5)
REFERENCE = 3
TARGETS = AV(geometry.tokens(GRID), SOUND.frames)
S = 4


def draw(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(
        np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)
    )


def random_like(shapes: Tree, seed: int = 0) -> Tree:
    """Random everywhere (`init` leaves biases zero, and is slow to compile)."""
    normal = np.random.default_rng(seed).normal
    return jax.tree.map(
        lambda s: jnp.asarray(normal(0, 0.3, s.shape).astype(np.float32)), shapes
    )


@functools.cache
def config(generation: str) -> TransformerConfig:
    return transformer_config({"transformer": SECTIONS[generation]})


@functools.cache
def base(generation: str) -> Tree:
    cfg = config(generation)
    shapes = jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))
    return random_like(shapes)


def prompt(generation: str, seed: int = 0, batch: int = 1) -> Prompt:
    """Features as the connectors of each generation give them."""
    widths = (20, 20) if generation == "2.0" else (24, 16)
    return Prompt(*(draw(seed + i, batch, S, w) for i, w in enumerate(widths)))


def pair(seed: int = 0, batch: int = 1, reference: int = REFERENCE) -> AV:
    """Video with its first frame given; audio with reference tokens behind."""
    video = streams.target(draw(seed, batch, TARGETS.video, 128), GRID)
    video = streams.fix_first_frame(video, draw(seed + 1, batch, 2, 128))
    audio = streams.target(draw(seed + 2, batch, TARGETS.audio, 128), SOUND)
    if reference:
        ref = draw(seed + 3, batch, REFERENCE, 128)[:, :reference]
        pos = geometry.reference_positions(reference)
        audio = streams.add_reference(audio, ref, pos)
    return AV(video, audio)


def levels(sigma: float = 0.6, batch: int = 1) -> AV:
    return AV(jnp.full(batch, sigma), jnp.full(batch, sigma))


def close(got: AV, want: AV, rtol: float = 1e-5) -> None:
    """Equal relative to the largest value of each modality."""
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            atol = rtol * float(np.abs(b).max())
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def networks(generation: str) -> Networks:
    """The transformer beside tiny codecs, which do not fit it."""
    sound = audio_section(ch=32, mel_bins=64)
    codecs = {"vae": TINY_VIDEO, "audio_vae": sound, "vocoder": TINY_VOCODER}
    return Networks(
        transformer=config(generation),
        text_connector=text_connector_config({"transformer": SECTIONS["2.0"]}),
        video_vae=config_video_vae.video_vae_config(codecs),
        audio_vae=config_codecs.audio_vae_config(codecs),
        vocoder=config_vocoder.vocoder_config(codecs),
        text_encoder=None,
        generation="2.0" if generation == "2.0" else "2.3",
        base_hash="",
    )

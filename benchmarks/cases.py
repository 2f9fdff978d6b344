"""What is computed: the streams, prompts and noise level that every backend gets.

Numbers come from `numpy.random.default_rng(0)`. The reference voice stands behind the
audio that is made, as everywhere in the library; backends that want it in front move
it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.configs import FPS, SIGMA, Size
from idlora_jax import geometry, references, streams
from idlora_jax.config import BlindGradient, Generation, TransformerConfig
from idlora_jax.strategies import Batch, Draws
from idlora_jax.types import AV, AudioGrid, Prompt, VideoGrid


class Case(NamedTuple):
    """One sample at one noise level.

    Attributes:
        size: what of.
        cfg: the transformer.
        streams: `AV` of `Stream`: the first latent frame and the reference are given.
        prompts: positive and negative.
        sigma: the noise level.
    """

    size: Size
    cfg: TransformerConfig
    streams: AV
    prompts: tuple[Prompt, ...]
    sigma: float = SIGMA

    @property
    def targets(self) -> AV:
        """Numbers of target tokens."""
        return AV(self.size.video, self.size.audio)


class TrainCase(NamedTuple):
    """One training batch of one clip, and what is drawn for it."""

    size: Size
    cfg: TransformerConfig
    batch: Batch
    draws: Draws


def video_grid(size: Size) -> VideoGrid:
    """The clip in pixels."""
    frames, height, width = size.grid
    pixels = geometry.PIXELS_PER_LATENT
    return geometry.video_grid(8 * frames - 7, height * pixels, width * pixels, FPS)


def _prompt(rng: np.random.Generator, size: Size, cfg: TransformerConfig) -> Prompt:
    """Features as the transformer takes them: shared by both modalities in 2.0."""

    def text(width: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal((1, size.text, width)), jnp.float32)

    if cfg.caption_projection:
        both = text(cfg.caption_channels)
        return Prompt(both, both)
    return Prompt(text(cfg.video.text_width), text(cfg.audio.text_width))


def make(size: Size, generation: Generation, dtype: str = "float32") -> Case:
    """The case of a size.

    Args:
        size: from `configs`.
        generation: of the transformer.
        dtype: of prompts; tokens are float32, as the sampler's state is.
    """
    rng, cfg = np.random.default_rng(0), size.transformer(generation)

    def numbers(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    tokens = size.video // size.grid[0]
    video = streams.target(numbers(1, size.video, 128), video_grid(size))
    video = streams.fix_first_frame(video, numbers(1, tokens, 128))
    audio = streams.target(numbers(1, size.audio, 128), AudioGrid(size.audio))
    if size.reference:
        pos = references.audio_positions(size.reference)
        audio = streams.add_reference(audio, numbers(1, size.reference, 128), pos)
    made = [_prompt(rng, size, cfg) for _ in range(2)]
    prompts = tuple(
        p._replace(video=p.video.astype(dtype), audio=p.audio.astype(dtype))
        for p in made
    )
    return Case(size, cfg, AV(video, audio), prompts)


def training(
    size: Size,
    generation: Generation,
    batch: int = 1,
    blind_gradient: BlindGradient = "softmax",
) -> TrainCase:
    """A training batch of the same sizes; the first frame is given.

    Args:
        size: from `configs`.
        generation: of the transformer.
        batch: number of clips.
        blind_gradient: of the transformer; torch's is "fused".
    """
    rng, cfg = np.random.default_rng(0), size.transformer(generation)
    cfg = dataclasses.replace(cfg, blind_gradient=blind_gradient)

    def numbers(*shape: int) -> jnp.ndarray:
        return jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32)

    cells = geometry.AUDIO_BINS, geometry.AUDIO_CHANNELS
    prompt = _prompt(rng, size, cfg)
    many = lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:]))
    clips = Batch(
        numbers(*size.grid, 128),
        numbers(size.audio, *cells),
        numbers(size.reference, *cells),
        Prompt(many(prompt.video), many(prompt.audio)),
    )
    level = jnp.full(batch, SIGMA, jnp.float32)
    noise = AV(numbers(size.video, 128), numbers(size.audio, 128))
    given = jnp.ones(batch, bool)
    return TrainCase(size, cfg, clips, Draws(given, AV(level, level), noise))

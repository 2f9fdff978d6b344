"""The networks around the latents: video in and out, whole and in tiles; the sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, codecs, programs
from benchmarks.backends.jax import NAME
from benchmarks.rows import Row
from benchmarks.session import Session
from benchmarks.works import Work
from idlora_jax.model import audio_vae, sound_chunks, video_tiles, video_vae, vocoder
from idlora_jax.model.tiling import Tiles


def work(variant: str, f: Callable[..., Any], *args: Any) -> Work:
    """A compiled function of parameters and one array."""
    program = programs.build(f, args)
    run = lambda: jax.block_until_ready(program.call(*args))
    outputs = lambda out: {"out": np.asarray(out)}
    return Work(variant, NAME, run, outputs, program.facts)


def tiles_for(height: int, frames: int) -> Tiles:
    """Two tiles along each axis of a clip, or one where it is small."""
    side = max(128, -(-height // 64) * 32 + 32)
    long = max(24, frames // 2 // 8 * 8 + 8)
    return Tiles(size=side, overlap=64, frames=long, frames_overlap=8)


def works(session: Session) -> Iterator[Work]:
    """What is timed."""
    options = session.options
    size, generation = options.config, options.generation
    grid, rng = cases.video_grid(options.size), np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    cfg = codecs.configuration("video_vae", size, generation)
    params = codecs.random_params("video_vae", cfg)
    frames = jnp.tanh(draw(1, grid.frames, grid.height, grid.width, 3))
    latent = draw(1, *options.size.grid, 128)
    tiles = tiles_for(grid.height, grid.frames)
    encode, decode = video_vae.encode, video_vae.decode
    yield work("video encode", lambda p, x: encode(cfg, p, x), params, frames)
    tiled = lambda p, x: video_tiles.encode(cfg, p, x, tiles)
    yield work("video encode, tiles", tiled, params, frames)
    yield work("video decode", lambda p, x: decode(cfg, p, x), params, latent)
    tiled = lambda p, x: video_tiles.decode(cfg, p, x, tiles)
    yield work("video decode, tiles", tiled, params, latent)
    cfg_a = codecs.configuration("audio_vae", size, generation)
    cfg_v = codecs.configuration("vocoder", size, generation)
    own = codecs.random_params("audio_vae", cfg_a)
    sound = draw(1, options.size.audio, 16, 8)
    mel = lambda p, x: audio_vae.decode(cfg_a, p, x)
    yield work("audio decode", mel, own, sound)
    spectrum = jax.jit(mel)(own, sound)
    voice = codecs.random_params("vocoder", cfg_v)
    wave = lambda p, x: vocoder.synthesize(cfg_v, p, x, None)
    yield work("vocoder", wave, voice, spectrum)
    many = -(-4 * sound_chunks.reach(cfg_v) // spectrum.shape[1])
    long = jnp.tile(spectrum, (1, max(4, many), 1, 1))
    yield work("vocoder, long", wave, voice, long)
    pieces = lambda p, x: vocoder.synthesize(cfg_v, p, x, long.shape[1] // 4)
    yield work("vocoder, long, in chunks", pieces, voice, long)


def run(session: Session) -> list[Row]:
    """Rows of each network; ratios mean nothing between different ones."""
    rows: list[Row] = []
    for one in works(session):
        rows += session.alone([one])
    return rows

"""The video VAE in tiles: clips larger or longer than memory allows at once.

In space the tiles of one slab of frames are run one after the other and added up with
their weights (see `tiling`). Along time the slabs come one after the other: when slab n
is done, the frames before the start of slab n + 1 are finished and handed out, and only
the frames that both share are kept. Memory holds one slab, however long the clip is.

Source: `ltx_core/model/video_vae/video_vae.py: tiled_decode, tiled_encode`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from idlora_jax import programs
from idlora_jax.config_video_vae import VideoVAEConfig
from idlora_jax.model import tiling, video_vae
from idlora_jax.model.tiling import Axis, Plan, Span, Tile, Tiles, weights
from idlora_jax.model.video_vae import Draws
from idlora_jax.types import Tree

Run = Callable[[Array, Any, Any], Array]
"""(tile, its first row, its first column) -> what the network makes of it."""


class _Place(NamedTuple):
    """Where tiles of one size read and write, and what they count for."""

    start: Int32[np.ndarray, "n 2"]
    at: Int32[np.ndarray, "n 2"]
    down: Float32[np.ndarray, "n H"]
    across: Float32[np.ndarray, "n W"]


def _places(rows: Axis, columns: Axis) -> dict[Span, _Place]:
    """By size of tile: `_Place`."""
    down, across = weights(rows), weights(columns)
    found: dict[Span, list[Span]] = {}
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        found.setdefault((rows[i].size, columns[j].size), []).append((i, j))
    return {
        size: _Place(
            np.array([(rows[i].start, columns[j].start) for i, j in of], np.int32),
            np.array([(rows[i].at, columns[j].at) for i, j in of], np.int32),
            np.stack([down[i] for i, _ in of]),
            np.stack([across[j] for _, j in of]),
        )
        for size, of in found.items()
    }


def _add_tiles(
    run: Run,
    x: Float[Array, "B F H W I"],
    size: Span,
    places: _Place,
    out: Float32[Array, "B N h w O"],
) -> Float32[Array, "B N h w O"]:
    """Add the tiles of one size to `out`, one after the other."""
    read = (*x.shape[:2], *size, x.shape[-1])

    def add(
        out: Float32[Array, "B N h w O"], place: _Place
    ) -> tuple[Float32[Array, "B N h w O"], None]:
        (row, column), (top, left) = place.start, place.at
        tile = jax.lax.dynamic_slice(x, (0, 0, row, column, 0), read)
        got = run(tile, row, column).astype(jnp.float32)
        got = got * place.down[None, None, :, None, None]
        got = got * place.across[None, None, None, :, None]
        got = got + jax.lax.dynamic_slice(out, (0, 0, top, left, 0), got.shape)
        return jax.lax.dynamic_update_slice(out, got, (0, 0, top, left, 0)), None

    return jax.lax.scan(add, out, places)[0]


def over_space(
    run: Run,
    x: Float[Array, "B F H W I"],
    rows: Axis,
    columns: Axis,
    *,
    frames: int,
    channels: int,
) -> Float32[Array, "B N h w O"]:
    """Run tile after tile of all frames at once, and blend. To be compiled.

    The network is traced once per size of tile.

    Args:
        run: the network.
        x: what it reads.
        rows: the tiles along the rows,
        columns: and along the columns.
        frames: how many it makes of those of x.
        channels: how many it makes.
    """
    if len(rows) == len(columns) == 1:
        return run(x, 0, 0).astype(jnp.float32)
    whole = (len(x), frames, rows[-1].end, columns[-1].end, channels)
    out = jnp.zeros(whole, jnp.float32)
    for size, places in _places(rows, columns).items():
        out = _add_tiles(run, x, size, places, out)
    return out


@partial(jax.jit, static_argnames=("count", "finish"))
def _join(
    slab: Float32[Array, "B N H W C"],
    carry: Float32[Array, "B K H W C"] | None,
    weight: Float32[Array, " N"],
    *,
    count: int,
    finish: Callable[[Array], Array] | None,
) -> tuple[Array, Float32[Array, "B M H W C"]]:
    """The first `count` frames, finished, and the others so far."""
    slab = slab * weight[None, :, None, None, None]
    if carry is not None:
        slab = slab.at[:, : carry.shape[1]].add(carry)
    done = slab[:, :count]
    return finish(done) if finish else done, slab[:, count:]


def over_time(
    slab: Callable[[Tile], Float32[Array, "B N H W C"]],
    plan: Plan,
    finish: Callable[[Array], Array] | None = None,
) -> Iterator[Array]:
    """Hand out finished frames tile by tile; the next tile is run when asked for.

    Args:
        slab: runs a tile in time, over all of space.
        plan: the tiles; chunk n has `plan.chunks[n]` frames.
        finish: applied to finished frames; a function of a module, since it is a key of
            compiled functions.
    """
    carry = None
    steps = zip(plan.time, plan.chunks, weights(plan.time), strict=True)
    for tile, count, weight in steps:
        done, carry = _join(
            slab(tile), carry, jnp.asarray(weight), count=count, finish=finish
        )
        yield done


def _frames(x: Float[Array, "B F H W I"], tile: Tile) -> Float[Array, "B N H W I"]:
    return jax.lax.dynamic_slice_in_dim(x, tile.start, tile.size, axis=1)


@partial(programs.jit, name="decode video slab", static_argnums=(0, 1, 2))
def _decode_slab(
    cfg: VideoVAEConfig,
    rows: Axis,
    columns: Axis,
    params: Tree,
    latent: Float[Array, "B f h w C"],
    draws: Draws,
    timestep: Float[Array, " B"] | None,
) -> Float32[Array, "B F H W O"]:
    def run(tile: Array, row: Array | int, column: Array | int) -> Array:
        noise, (height, width) = draws.latent, tile.shape[2:4]
        if noise is not None:
            noise = jax.lax.dynamic_slice(noise, (0, 0, row, column, 0), tile.shape)
        pairs = zip(draws.maps, cfg.noise_factors, strict=True)
        maps = (
            jax.lax.dynamic_slice(m, (row * n, column * n), (height * n, width * n))
            for m, n in pairs
        )
        own = Draws(noise, tuple(maps))
        return video_vae.decode(cfg, params, tile, draws=own, timestep=timestep)

    frames = (latent.shape[1] - 1) * cfg.decoder_factors[0] + 1
    like = {"frames": frames, "channels": cfg.out_channels}
    return over_space(run, latent, rows, columns, **like)


@partial(programs.jit, name="encode video slab", static_argnums=(0, 1, 2))
def _encode_slab(
    cfg: VideoVAEConfig,
    rows: Axis,
    columns: Axis,
    params: Tree,
    video: Float[Array, "B F H W I"],
) -> Float32[Array, "B f h w C"]:
    def run(tile: Array, row: Array | int, column: Array | int) -> Array:
        return video_vae.encode(cfg, params, tile)

    frames = (video.shape[1] - 1) // cfg.time_factor + 1
    like = {"frames": frames, "channels": cfg.latent_channels}
    return over_space(run, video, rows, columns, **like)


def decode_plan(cfg: VideoVAEConfig, shape: tuple[int, ...], tiles: Tiles) -> Plan:
    """The tiles that decoding a latent of this shape [B f h w C] takes.

    Raises:
        ValueError: naming the nearest valid size or overlap.
    """
    frames, height, width = shape[1:4]
    return tiling.decode_plan(tiles, (frames, height, width), cfg.decoder_factors)


def decode_chunks(
    cfg: VideoVAEConfig,
    params: Tree,
    latent: Float[Array, "B f h w C"],
    tiles: Tiles,
    *,
    draws: Draws | None = None,
    timestep: Float[Array, " B"] | None = None,
    finish: Callable[[Array], Array] | None = None,
) -> Iterator[Array]:
    """Decode tile by tile, and hand out frames as soon as they are finished.

    Memory does not grow with the length of the clip if each chunk is used and let go.
    Noise is drawn for the whole clip, so that tiles agree where they overlap.

    Args:
        cfg: static.
        params: needs `decoder` and `stats`.
        latent: as `video_vae.encode` gives them.
        tiles: how to cut.
        draws: as for `video_vae.decode`.
        timestep: as for `video_vae.decode`.
        finish: applied to finished frames on the device, such as `video_vae.to_uint8`;
            a function of a module, since it is a key of compiled functions.

    Returns:
        An iterator of [B n H W O], consecutive frames, n from `decode_plan(..).chunks`
        (in the layout of the reference the first n may be 0); float32, since tiles are
        blended in it, or what `finish` makes of that.

    Raises:
        ValueError: as `video_vae.decode`, and for tiles that cannot be, with the
            nearest valid size or overlap; at once, not at the first chunk.

    Source: `ltx_core/model/video_vae/video_vae.py: VideoDecoder.tiled_decode`.
    """
    video_vae.check_latent(cfg, latent.shape, draws)
    plan = decode_plan(cfg, latent.shape, tiles)
    noise, maps = draws or Draws(None, ())

    def slab(tile: Tile) -> Float32[Array, "B F H W O"]:
        own = Draws(None if noise is None else _frames(noise, tile), maps)
        place = (cfg, plan.rows, plan.columns)
        return _decode_slab(*place, params, _frames(latent, tile), own, timestep)

    return over_time(slab, plan, finish)


def decode(
    cfg: VideoVAEConfig,
    params: Tree,
    latent: Float[Array, "B f h w C"],
    tiles: Tiles,
    *,
    draws: Draws | None = None,
    timestep: Float[Array, " B"] | None = None,
) -> Float[Array, "B F H W O"]:
    """`video_vae.decode` in tiles: all of `decode_chunks`, in the dtype of `latent`."""
    more = {"draws": draws, "timestep": timestep}
    chunks = decode_chunks(cfg, params, latent, tiles, **more)
    return jnp.concatenate([c.astype(latent.dtype) for c in chunks], axis=1)


def encode(
    cfg: VideoVAEConfig, params: Tree, video: Float[Array, "B F H W I"], tiles: Tiles
) -> Float[Array, "B f h w C"]:
    """`video_vae.encode` in tiles, of which neighbours share at least two latent cells.

    Args:
        cfg: static.
        params: needs `encoder` and `stats`.
        video: as for `video_vae.encode`.
        tiles: how to cut.

    Raises:
        ValueError: as `video_vae.encode`, and for tiles that cannot be, with the
            nearest valid size or overlap.

    Source: `ltx_core/model/video_vae/video_vae.py: VideoEncoder.tiled_encode` (2.3).
    """
    video_vae.check_pixels(cfg, video.shape)
    frames, height, width = video.shape[1:4]
    time, space = cfg.time_factor, cfg.space_factor
    size = ((frames - 1) // time + 1, height // space, width // space)
    plan = tiling.encode_plan(tiles, size, (time, space))

    def slab(tile: Tile) -> Float32[Array, "B f h w C"]:
        own = _frames(video, tile)
        return _encode_slab(cfg, plan.rows, plan.columns, params, own)

    chunks = over_time(slab, plan)
    return jnp.concatenate([c.astype(video.dtype) for c in chunks], axis=1)

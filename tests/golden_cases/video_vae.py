"""The video VAE, whole and in tiles. Files hold pictures as [B C F H W]."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from idlora_jax.config_video_vae import VideoVAEConfig, video_vae_config
from idlora_jax.model import video_tiles, video_vae
from idlora_jax.model.tiling import Tiles
from idlora_jax.types import Tree
from idlora_jax.weights import rules, tables


def _network(golden: Golden) -> tuple[VideoVAEConfig, Tree]:
    params = rules.import_(golden.weights, tables.BASE)["video_vae"]
    return video_vae_config(golden.config, golden.generation), params


def _ours(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def _theirs(x: jax.Array) -> np.ndarray:
    return np.asarray(jnp.moveaxis(x, -1, 1))


def _tiles(space: list[int] | None, time: list[int] | None) -> Tiles:
    size, overlap = space or (None, 0)
    frames, shared = time or (None, 0)
    return Tiles(size, overlap, frames, shared, layout="reference")


@case("video_vae_encoder")
def encoder(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg, params = _network(golden)
    encode = jax.jit(partial(video_vae.encode, cfg))
    video = _ours(golden.inputs["video"])
    out = {}
    for name in golden.outputs:
        if name == "latent.crop":
            clip = video_vae.crop_frames(cfg, video[:, : golden.params["crop"]])
            out[name] = _theirs(encode(params, clip))
        elif name.startswith("latent."):
            frames = int(name.rpartition(".")[2])
            out[name] = _theirs(encode(params, video[:, :frames]))
    return out


@case("video_vae_tiled_encode")
def tiled_encoder(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg, params = _network(golden)
    video, given = _ours(golden.inputs["video"]), golden.params
    tiles = _tiles([given["tile"], given["overlap"]], given.get("temporal"))
    plain = jax.jit(partial(video_vae.encode, cfg))(params, video)
    tiled = video_tiles.encode(cfg, params, video, tiles)
    return {"plain": _theirs(plain), "tiled": _theirs(tiled)}


def _in_tiles(
    golden: Golden, cfg: VideoVAEConfig, params: Tree
) -> dict[str, np.ndarray]:
    latent = _ours(golden.inputs["latent_tiled"])
    tiles = _tiles(golden.params.get("spatial"), golden.params.get("temporal"))
    chunks = list(video_tiles.decode_chunks(cfg, params, latent, tiles))
    video = _theirs(jnp.concatenate(chunks, axis=1))
    counts = np.array([chunk.shape[1] for chunk in chunks])
    return {"tiled": video[..., ::2, ::2], "tiled.chunk_frames": counts}


@case("video_vae_decoder", "video_vae_decoder_v23blocks")
def decoder(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg, params = _network(golden)
    decode = jax.jit(partial(video_vae.decode, cfg))
    latent = _ours(golden.inputs["latent"])
    video = decode(params, latent)
    out = {"video": _theirs(video)}
    if "uint8" in golden.outputs:
        out["uint8"] = np.asarray(video_vae.to_uint8(video)[0])
    if "one_frame" in golden.outputs:
        out["one_frame"] = _theirs(decode(params, latent[:, :1]))
    if "tiled" in golden.outputs:
        out |= _in_tiles(golden, cfg, params)
    return out


@case("video_vae_decoder_timestep")
def noisy_decoder(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg, params = _network(golden)
    noise = [jnp.asarray(n) for _, n in sorted(golden.sub("noise").items(), key=_index)]
    latent = None
    if cfg.timestep_conditioning:
        latent = jnp.moveaxis(noise.pop(0), 1, -1)
    draws = video_vae.Draws(latent, tuple(noise))
    timestep = golden.inputs.get("timestep")
    decode = jax.jit(partial(video_vae.decode, cfg))
    video = decode(
        params,
        _ours(golden.inputs["latent"]),
        draws=draws,
        timestep=None if timestep is None else jnp.asarray(timestep),
    )
    return {"video": _theirs(video)}


def _index(item: tuple[str, np.ndarray]) -> int:
    return int(item[0])

"""Embedded config <-> config.json of diffusers: the video VAE.

diffusers describes the video VAE by groups, original files by a list of blocks:

    encoder  group n: `layers_per_block[n]` residual blocks, then a resampling by
             `downsample_type[n]` to `block_out_channels[n]`; last residual blocks
    decoder  first residual blocks, then group n: a resampling by `upsample_type[n]`,
             which divides the width by a factor, and residual blocks

Lists of the decoder are stored from the pixels to the latent, but for `upsample_type`,
which diffusers keeps in order of execution. A group without residual blocks has 0.

Source: diffusers, models/autoencoders/autoencoder_kl_ltx2.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from idlora_jax.config import Generation, Json
from idlora_jax.config_video_vae import (
    STATISTICS,
    Block,
    Resample,
    Residual,
    VideoVAEConfig,
    video_vae_config,
)
from idlora_jax.weights.diffusers_config import Section, demand

_KINDS = {
    (1, 2, 2): ("spatial", "compress_space"),
    (2, 1, 1): ("temporal", "compress_time"),
    (2, 2, 2): ("spatiotemporal", "compress_all"),
}
_BLOCKS = {theirs: ours for theirs, ours in _KINDS.values()}
_VIDEO_FIXED = {"patch_size_t": 1, "resnet_norm_eps": 1e-6, "scaling_factor": 1.0}
_VIDEO_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 128,
    "block_out_channels": [256, 512, 1024, 2048],
    "decoder_block_out_channels": [256, 512, 1024],
    "layers_per_block": [4, 6, 6, 2, 2],
    "decoder_layers_per_block": [5, 5, 5, 5],
    "spatio_temporal_scaling": True,
    "decoder_spatio_temporal_scaling": True,
    "decoder_inject_noise": False,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "upsample_type": ["spatiotemporal"] * 3,
    "upsample_residual": True,
    "upsample_factor": [2, 2, 2],
    "timestep_conditioning": False,
    "patch_size": 4,
    "encoder_causal": True,
    "decoder_causal": True,
    "encoder_spatial_padding_mode": "zeros",
    "decoder_spatial_padding_mode": "reflect",
}
_KEPT = ("mean", "std")
"""The statistics that diffusers keeps."""


def _groups(blocks: Sequence[Block]) -> tuple[list[int], list[bool], list[Resample]]:
    """Residual layers and noise around the resamplings, and the resamplings."""
    layers, noise, between = [0], [False], []
    for block in blocks:
        if isinstance(block, Residual):
            layers[-1], noise[-1] = block.layers, block.inject_noise
        elif isinstance(block, Resample) and block.stride in _KINDS:
            between.append(block)
            layers.append(0)
            noise.append(False)
    return layers, noise, between


def _theirs(blocks: Sequence[Resample]) -> list[str]:
    return [_KINDS[block.stride][0] for block in blocks]


def _fields(cfg: VideoVAEConfig) -> Section:
    """Everything that differs from one video VAE to another, as diffusers says it."""
    layers, _, downs = _groups(cfg.encoder)
    up_layers, noise, ups = _groups(cfg.decoder)
    return {
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "latent_channels": cfg.latent_channels,
        "block_out_channels": [block.width_out for block in downs],
        "decoder_block_out_channels": [block.width_in for block in ups[::-1]],
        "layers_per_block": layers,
        "decoder_layers_per_block": up_layers[::-1],
        "decoder_inject_noise": noise[::-1],
        "downsample_type": _theirs(downs),
        "upsample_type": _theirs(ups),
        "upsample_residual": [block.shortcut for block in ups[::-1]],
        "upsample_factor": [block.width_in // block.width_out for block in ups[::-1]],
        "timestep_conditioning": cfg.timestep_conditioning,
        "patch_size": cfg.patch,
        "decoder_causal": cfg.causal_decoder,
        "encoder_spatial_padding_mode": cfg.encoder_padding,
        "decoder_spatial_padding_mode": cfg.decoder_padding,
    }


def _is_described(config: Json, cfg: VideoVAEConfig, generation: Generation) -> bool:
    """Whether reading the fields gives the VAE that they were made of."""
    try:
        sections = video_vae_to_original(config, generation)
    except ValueError:
        return False
    back = video_vae_config(sections, generation)
    return dataclasses.replace(back, statistics=cfg.statistics) == cfg


def video_vae_to_diffusers(cfg: VideoVAEConfig, generation: Generation) -> Section:
    """The config.json of `AutoencoderKLLTX2Video`.

    Raises:
        ValueError: if diffusers cannot describe this VAE.
    """
    fields = _fields(cfg)
    downs, ups = len(fields["downsample_type"]), len(fields["upsample_type"])
    config = {
        **fields,
        "down_block_types": ["LTX2VideoDownBlock3D"] * downs,
        "spatio_temporal_scaling": [True] * downs,
        "decoder_spatio_temporal_scaling": [True] * ups,
        "encoder_causal": True,
        "spatial_compression_ratio": cfg.space_factor,
        "temporal_compression_ratio": cfg.time_factor,
        **_VIDEO_FIXED,
    }
    if not _is_described(config, cfg, generation):
        raise ValueError(
            "vae config: diffusers' AutoencoderKLLTX2Video cannot describe these "
            "blocks; export the original form instead"
        )
    return config


def _each(config: Section, key: str, count: int) -> list[Any]:
    """A field with one entry per group, which may be given once for all.

    Raises:
        ValueError: if there are more or fewer.
    """
    value = config[key]
    values = list(value) if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise ValueError(
            f"vae/config.json: {key} has {len(values)} entries, expected {count}"
        )
    return values


def _residual(layers: int, **more: Any) -> list[list[Any]]:
    return [["res_x", {"num_layers": layers, **more}]] if layers else []


def _block(kind: str) -> str:
    if kind in _BLOCKS:
        return _BLOCKS[kind]
    raise ValueError(
        f"vae/config.json: resampling {kind!r} is not supported, expected one of "
        f"{sorted(_BLOCKS)}"
    )


def _encoder_blocks(c: Section) -> list[list[Any]]:
    widths = list(c["block_out_channels"])
    count = len(widths)
    layers = _each(c, "layers_per_block", count + 1)
    kinds = _each(c, "downsample_type", count)
    blocks = _residual(layers[0])
    width = c["latent_channels"]
    for wider, kind, after in zip(widths, kinds, layers[1:], strict=True):
        multiplier, rest = divmod(wider, width)
        if rest:
            raise ValueError(
                f"vae/config.json: block_out_channels {widths} are not multiples of "
                "one another"
            )
        blocks.append([f"{_block(kind)}_res", {"multiplier": multiplier}])
        blocks += _residual(after)
        width = wider
    return blocks


def _decoder_blocks(c: Section) -> list[list[Any]]:
    """From the pixels to the latent, as in an original file."""
    count = len(c["decoder_block_out_channels"])
    layers = _each(c, "decoder_layers_per_block", count + 1)
    noise = _each(c, "decoder_inject_noise", count + 1)
    kinds = _each(c, "upsample_type", count)[::-1]
    shortcuts = _each(c, "upsample_residual", count)
    factors = _each(c, "upsample_factor", count)
    blocks = _residual(layers[0], inject_noise=noise[0])
    for n, (kind, factor) in enumerate(zip(kinds, factors, strict=True)):
        more = {"residual": True} if shortcuts[n] else {}
        blocks.append([_block(kind), {**more, "multiplier": factor}])
        blocks += _residual(layers[n + 1], inject_noise=noise[n + 1])
    return blocks


def _padding(c: Section, generation: Generation) -> Section:
    encoder, decoder = (f"{s}_spatial_padding_mode" for s in ("encoder", "decoder"))
    if generation == "2.3":
        return {"spatial_padding_mode": c[encoder]}
    return {encoder: c[encoder], decoder: c[decoder]}


def _plain(c: Section) -> Section:
    """Lists for tuples, and for what is given once for all groups."""
    counts = {
        "upsample_residual": len(c["decoder_block_out_channels"]),
        "decoder_inject_noise": len(c["decoder_layers_per_block"]),
    }
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in c.items()}
    return listed | {key: _each(c, key, count) for key, count in counts.items()}


def _require_same(c: Section, section: Section, generation: Generation) -> None:
    """An original file says some fields together; compare with what it would say."""
    said = _fields(video_vae_config({"vae": section}, generation))
    wrong = {key: c[key] for key, value in said.items() if c[key] != value}
    if wrong:
        expected = {key: said[key] for key in wrong}
        raise ValueError(
            f"vae/config.json: got {wrong}, expected {expected} in generation "
            f"{generation} beside its other fields"
        )


def video_vae_to_original(config: Json, generation: Generation) -> dict[str, Section]:
    """Sections of an original file from the video VAE's config.json.

    Args:
        config: the JSON object.
        generation: which files' way of telling widths and padding is used.

    Raises:
        ValueError: if it describes another kind of network.
    """
    c = _plain({**_VIDEO_DEFAULTS, **config})
    scaling = ("spatio_temporal_scaling", "decoder_spatio_temporal_scaling")
    for key in scaling:
        c[key] = c[key] if isinstance(c[key], bool) else all(c[key])
    true = dict.fromkeys((*scaling, "encoder_causal"), True)
    demand("vae", c, {**_VIDEO_FIXED, **true})
    section: Section = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "latent_channels": c["latent_channels"],
        "encoder_blocks": _encoder_blocks(c),
        "decoder_blocks": _decoder_blocks(c),
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": c["patch_size"],
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": c["decoder_causal"],
        "timestep_conditioning": c["timestep_conditioning"],
        "normalize_latent_channels": False,
        "decoder_base_channels": c["decoder_block_out_channels"][-1] // 8,
        **_padding(c, generation),
    }
    if STATISTICS[generation] != _KEPT:
        section["statistics"] = list(_KEPT)
    _require_same(c, section, generation)
    return {"vae": section}

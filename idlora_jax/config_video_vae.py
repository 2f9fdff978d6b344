"""What the video VAE of a checkpoint is.

The reader turns the section `vae` of the embedded JSON into frozen dataclasses in which
every width is resolved, so that the network holds no arithmetic on channel multipliers.
A key that asks for something the network does not do is an error here, not a wrong
picture later. Widths that do not fit each other are an error where they meet: a config
may describe half a network, for which alone there are weights.

Source: `ltx_core/model/video_vae/model_configurator.py`, `video_vae.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

from idlora_jax.config import Generation, Json
from idlora_jax.config_codecs import require, section_of

SpatialPadding = Literal["zeros", "reflect", "replicate", "circular"]
Norm = Literal["pixel_norm", "group_norm"]
Stride = tuple[int, int, int]
GROUPS = 32
"""Groups of a group norm."""


@dataclass(frozen=True)
class Residual:
    """A stage of `layers` residual blocks, `width` channels in and out."""

    width: int
    layers: int
    inject_noise: bool = False

    @property
    def maps(self) -> int:
        """Maps of noise it injects: one after each convolution."""
        return 2 * self.layers if self.inject_noise else 0


@dataclass(frozen=True)
class Transition:
    """One residual block from `width_in` to `width_out` channels."""

    width_in: int
    width_out: int
    inject_noise: bool = False

    @property
    def maps(self) -> int:
        """Maps of noise it injects: one after each convolution."""
        return 2 if self.inject_noise else 0


@dataclass(frozen=True)
class Resample:
    """A change of resolution by `stride` (time, height, width), by rearranging.

    `shortcut`: the input, rearranged to the new shape, is added to the output.
    """

    stride: Stride
    width_in: int
    width_out: int
    shortcut: bool
    maps: ClassVar[int] = 0


@dataclass(frozen=True)
class Strided:
    """A reduction by `stride` (time, height, width), by a strided convolution."""

    stride: Stride
    width_in: int
    width_out: int
    maps: ClassVar[int] = 0


Block = Residual | Transition | Resample | Strided


def _factors(blocks: Iterable[Block]) -> Stride:
    strides = [b.stride for b in blocks if isinstance(b, Resample | Strided)]
    time, height, width = (math.prod(s[axis] for s in strides) for axis in range(3))
    return time, height, width


@dataclass(frozen=True)
class VideoVAEConfig:
    """The video VAE of either generation.

    `encoder` and `decoder` are in order of execution; the decoder starts with
    `decoder_width` channels. `log_var_channels` is what the encoder emits beyond the
    means (unused). `statistics` names the buffers of the file; only `mean` and `std`
    are used.
    """

    latent_channels: int
    in_channels: int
    out_channels: int
    patch: int
    log_var_channels: int
    encoder: tuple[Block, ...]
    decoder: tuple[Block, ...]
    decoder_width: int
    encoder_padding: SpatialPadding
    decoder_padding: SpatialPadding
    causal_decoder: bool
    timestep_conditioning: bool
    statistics: tuple[str, ...]
    norm: Norm = "pixel_norm"

    @property
    def time_factor(self) -> int:
        """Frames per latent frame (the first latent frame holds one)."""
        return _factors(self.encoder)[0]

    @property
    def space_factor(self) -> int:
        """Pixels per latent cell along each side."""
        return self.patch * _factors(self.encoder)[1]

    @property
    def decoder_factors(self) -> tuple[int, int]:
        """(frames, pixels) that the decoder makes of a latent cell along an axis."""
        time, side, _ = _factors(self.decoder)
        return time, self.patch * side

    @property
    def noise_factors(self) -> tuple[int, ...]:
        """Per map of noise that the decoder injects: its cells per latent cell."""
        out: list[int] = []
        for n, block in enumerate(self.decoder):
            out += block.maps * [_factors(self.decoder[:n])[1]]
        return tuple(out)


_STRIDES: dict[str, Stride] = {
    "compress_time": (2, 1, 1),
    "compress_space": (1, 2, 2),
    "compress_all": (2, 2, 2),
}
_REARRANGED = {f"{name}_res": stride for name, stride in _STRIDES.items()}
_STRIDED = _STRIDES | {"compress_all_x_y": _STRIDES["compress_all"]}
_LOG_VAR = {"uniform": lambda c: 1, "constant": lambda c: 1, "per_channel": lambda c: c}
STATISTICS: dict[Generation, tuple[str, ...]] = {
    "2.0": (
        "mean",
        "std",
        "mean_of_stds",
        "mean_of_stds_over_std_of_means",
        "channel",
    ),
    "2.3": ("mean", "std"),
}
"""Names of the statistics buffers in a generation's file; the first two are used.

Files made of a folder that lacks the others name theirs under `statistics`."""


def _choice(key: str, value: str, known: Iterable[str]) -> str:
    if value not in (known := tuple(known)):
        raise ValueError(
            f"vae config: {key} {value!r} is not supported, expected one of "
            f"{sorted(known)}"
        )
    return value


def _named(blocks: Iterable[Any]) -> list[tuple[str, Json]]:
    """`[name, layers]` and `[name, {..}]` in the one form `(name, {..})`."""
    pairs = ((name, given) for name, given in blocks)
    return [(n, {"num_layers": g} if isinstance(g, int) else g) for n, g in pairs]


def _encoder_block(name: str, given: Json, width: int) -> Block:
    wider = width * given.get("multiplier", 2)
    if name == "res_x":
        return Residual(width, given["num_layers"])
    if name == "res_x_y":
        return Transition(width, wider)
    if name in _REARRANGED:
        return Resample(_REARRANGED[name], width, wider, shortcut=True)
    return Strided(_STRIDED[name], width, wider if name.endswith("_x_y") else width)


def _width_out(block: Block) -> int:
    return block.width if isinstance(block, Residual) else block.width_out


def _encoder_blocks(vae: Json, width: int) -> tuple[Block, ...]:
    known = ("res_x", "res_x_y", *_REARRANGED, *_STRIDED)
    out: list[Block] = []
    for name, given in _named(vae.get("encoder_blocks", ())):
        _choice("encoder block", name, known)
        out.append(_encoder_block(name, given, width))
        width = _width_out(out[-1])
    return tuple(out)


def _multiplier(name: str, given: Json, generation: Generation) -> int:
    """By how much a decoder block divides the width.

    Upsampling in time or space alone has no multiplier in 2.0, which ignores one.
    """
    alone = ("compress_time", "compress_space")
    if name == "res_x" or (generation == "2.0" and name in alone):
        return 1
    return given.get("multiplier", 2 if name == "res_x_y" else 1)


def _decoder_block(name: str, given: Json, width: int, multiplier: int) -> Block:
    noise = given.get("inject_noise", False)
    if name == "res_x":
        return Residual(width, given["num_layers"], noise)
    narrower = width // multiplier
    if name == "res_x_y":
        return Transition(width, narrower, noise)
    shortcut = name == "compress_all" and given.get("residual", False)
    return Resample(_STRIDES[name], width, narrower, shortcut)


def _decoder_width(
    vae: Json, blocks: Sequence[tuple[str, Json]], generation: Generation
) -> int:
    """Width of the first decoder stage: from the multipliers (2.0), or 8x a base."""
    if generation == "2.3":
        return 8 * vae.get("decoder_base_channels", 128)
    multipliers = (_multiplier(name, given, generation) for name, given in blocks)
    return vae.get("latent_channels", 128) * math.prod(multipliers)


def _decoder_blocks(vae: Json, generation: Generation) -> tuple[int, tuple[Block, ...]]:
    """The first width and the blocks, which files list from the pixels inward."""
    blocks = _named(vae.get("decoder_blocks", ()))[::-1]
    for name, _ in blocks:
        _choice("decoder block", name, ("res_x", "res_x_y", *_STRIDES))
    width = first = _decoder_width(vae, blocks, generation)
    out: list[Block] = []
    for name, given in blocks:
        multiplier = _multiplier(name, given, generation)
        out.append(_decoder_block(name, given, width, multiplier))
        width = _width_out(out[-1])
    return first, tuple(out)


def _paddings(
    vae: Json, generation: Generation
) -> tuple[SpatialPadding, SpatialPadding]:
    """What the encoder and the decoder put around a frame: one key each, or (2.3) one.

    Either generation ignores the keys of the other.
    """
    old = generation == "2.0"
    keys = [f"{side}_spatial_padding_mode" for side in ("encoder", "decoder")]
    found = [
        _choice(
            "spatial padding",
            vae.get(key if old else "spatial_padding_mode", default),
            get_args(SpatialPadding),
        )
        for key, default in zip(keys, ("zeros", "reflect"), strict=True)
    ]
    return cast(SpatialPadding, found[0]), cast(SpatialPadding, found[1])


def video_vae_config(
    config: Json, generation: Generation | None = None
) -> VideoVAEConfig:
    """Read the `vae` section of an embedded config.

    Args:
        config: the whole embedded JSON.
        generation: overrides what the section's keys suggest (only 2.3 files have
            `spatial_padding_mode`). It decides the decoder's first width, which blocks
            take a multiplier, the keys of the padding, and how many statistics buffers
            there are.

    Raises:
        ValueError: if the section describes another kind of network.

    Source: `ltx_core/model/video_vae/model_configurator.py`.
    """
    vae = section_of(config, "vae")
    found: Generation = "2.3" if "spatial_padding_mode" in vae else "2.0"
    generation = generation or found
    required = {"dims": 3, "use_quant_conv": False, "normalize_latent_channels": False}
    require("vae", vae, required)
    norm = _choice("norm_layer", vae.get("norm_layer", "pixel_norm"), get_args(Norm))
    log_var = _choice("latent_log_var", vae.get("latent_log_var", "uniform"), _LOG_VAR)
    channels = vae.get("latent_channels", 128)
    decoder_width, decoder = _decoder_blocks(vae, generation)
    encoder_padding, decoder_padding = _paddings(vae, generation)
    return VideoVAEConfig(
        latent_channels=channels,
        in_channels=vae.get("in_channels", 3),
        out_channels=vae.get("out_channels", 3),
        patch=vae.get("patch_size", 4),
        log_var_channels=_LOG_VAR[log_var](channels),
        encoder=_encoder_blocks(vae, channels),
        decoder=decoder,
        decoder_width=decoder_width,
        encoder_padding=encoder_padding,
        decoder_padding=decoder_padding,
        causal_decoder=vae.get("causal_decoder", False),
        timestep_conditioning=vae.get("timestep_conditioning", True),
        statistics=tuple(vae.get("statistics", STATISTICS[generation])),
        norm=cast(Norm, norm),
    )

"""What a latent upsampler is: scales, width and depth, from its file's own config.

An upsampler file embeds one flat JSON object. `upsampler_config` turns it into a frozen
dataclass in which the change of size is a rational number per axis, so that the network
knows neither key names nor modes; `embedded_config` goes back. A value that the network
cannot follow is an error here, not a wrong picture later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from idlora_jax.config import Json

CLASS = "LatentUpsampler"
DIFFUSERS_CLASS = "LTX2LatentUpsamplerModel"
GROUPS = 32
"""Groups of every group norm; widths are multiples of it."""

SCALES: dict[float, tuple[int, int]] = {
    0.75: (3, 4),
    1.5: (3, 2),
    2.0: (2, 1),
    4.0: (4, 1),
}
"""Scales of the rational form: how often cells are split, and every which is kept."""

_WIDEST, _DEEPEST = 1 << 16, 1 << 10
_RENAMED = {
    "use_rational_resampler": "rational_resampler",
    "rational_spatial_scale": "spatial_scale",
}
_DIFFUSERS_DEFAULTS = {"mid_channels": 1024, "rational_resampler": True}


@dataclass(frozen=True)
class UpsamplerConfig:
    """A latent upsampler of either generation.

    Attributes:
        channels: of the latents, in and out.
        width: channels inside.
        blocks: residual blocks before the change of size, and as many after it.
        dims: 3: convolutions and norms see all frames; 2: every frame alone.
        space: height and width are split `space[0]` times and, after a blur, every
            `space[1]`-th cell is kept; (1, 1) leaves them as they are.
        time: 2: F frames become 2F - 1; 1: as they are.
        rational: the file's form with a blur, see `space`; it may be unused.
    """

    channels: int
    width: int
    blocks: int
    dims: int
    space: tuple[int, int]
    time: int
    rational: bool

    def size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The latent size that this one becomes: frames, height, width."""
        up, down = self.space
        tall, wide = (-(-side * up // down) for side in (height, width))
        return self.time * (frames - 1) + 1, tall, wide


def _bad(key: str, got: Any, expected: str) -> ValueError:
    return ValueError(
        f"upsampler config: {key} = {got!r} is not supported, expected {expected}"
    )


def _whole(config: Json, key: str, default: int, low: int, high: int) -> int:
    value = config.get(key, default)
    if type(value) is int and low <= value <= high:
        return value
    raise _bad(key, value, f"a whole number from {low} to {high}")


def _flag(config: Json, key: str, default: bool) -> bool:
    value = config.get(key, default)
    if isinstance(value, bool):
        return value
    raise _bad(key, value, "true or false")


def _space(config: Json, rational: bool) -> tuple[int, int]:
    if not rational:
        # The plain form doubles, whatever `spatial_scale` says.
        return 2, 1
    scale = config.get("spatial_scale", 2.0)
    if isinstance(scale, int | float) and scale in SCALES:
        return SCALES[float(scale)]
    raise _bad("spatial_scale", scale, f"one of {[*SCALES]}")


def _plain_names(config: Json) -> Json:
    """The config under the names of an original file, with its class's defaults."""
    if config.get("_class_name") != DIFFUSERS_CLASS:
        return config
    renamed = {_RENAMED.get(key, key): value for key, value in config.items()}
    return _DIFFUSERS_DEFAULTS | renamed | {"_class_name": CLASS}


def upsampler_config(config: Json) -> UpsamplerConfig:
    """Read the flat embedded config of an upsampler file, or a diffusers config.json.

    Absent keys have the defaults of the class that reads the file elsewhere: width 512
    and the plain form (1024 and the rational form for diffusers').

    Raises:
        ValueError: naming the key, if it describes another kind of network.

    Source: `ltx_core/model/upsampler/model_configurator.py`, `model.py`.
    """
    config = _plain_names(config)
    name = config.get("_class_name", CLASS)
    if name != CLASS:
        raise _bad("_class_name", name, f"{CLASS!r}")
    dims = _whole(config, "dims", 3, 2, 3)
    spatial = _flag(config, "spatial_upsample", True)
    temporal = _flag(config, "temporal_upsample", False)
    width = _whole(config, "mid_channels", 512, GROUPS, _WIDEST)
    if width % GROUPS:
        raise _bad("mid_channels", width, f"a multiple of {GROUPS}")
    if not (spatial or temporal):
        raise _bad("spatial_upsample", False, "true, or temporal_upsample = true")
    if temporal and dims == 2:
        raise _bad("temporal_upsample", True, "false, or dims = 3")
    rational = _flag(config, "rational_resampler", False) and spatial and not temporal
    return UpsamplerConfig(
        channels=_whole(config, "in_channels", 128, 1, _WIDEST),
        width=width,
        blocks=_whole(config, "num_blocks_per_stage", 4, 0, _DEEPEST),
        dims=dims,
        space=_space(config, rational) if spatial else (1, 1),
        time=2 if temporal else 1,
        rational=rational,
    )


def embedded_config(cfg: UpsamplerConfig) -> Json:
    """The flat config that an original file embeds; `upsampler_config` reads it."""
    up, down = cfg.space
    return {
        "_class_name": CLASS,
        "in_channels": cfg.channels,
        "mid_channels": cfg.width,
        "num_blocks_per_stage": cfg.blocks,
        "dims": cfg.dims,
        "spatial_upsample": cfg.space != (1, 1),
        "temporal_upsample": cfg.time == 2,
        "spatial_scale": up / down,
        "rational_resampler": cfg.rational,
    }

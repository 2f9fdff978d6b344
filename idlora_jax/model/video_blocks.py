"""What the video VAE is made of: residual blocks and changes of resolution.

    ResBlock    x + conv(silu(norm(conv(silu(norm(x)))))), perhaps to another width
    Stage       residual blocks one after the other
    Down, Up    a convolution, then cells become channels, or channels become cells
    Strided     a convolution that keeps every second cell

Down and Up rearrange instead of striding: blocks of p x q x r cells become channels,
block fastest, and back. The input rearranged alike is added, as the mean of channel
groups or repeated, so that its channel count fits.

A decoder may be conditioned on a timestep: each stage embeds it, and every norm in the
stage is followed by h (1 + scale) + shift, the four rows of a learned table plus the
embedding. It may also inject noise: after each convolution of a block a map [H W], the
same for all frames, is added with a learned factor per channel.

Source: `ltx_core/model/video_vae/resnet.py`, `sampling.py`, `convolution.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from idlora_jax.config_video_vae import (
    GROUPS,
    Block,
    Norm,
    Resample,
    Residual,
    SpatialPadding,
    Stride,
    Strided,
    Transition,
)
from idlora_jax.model.conv import Conv, Mode, Pad
from idlora_jax.model.layers import Dense, rms_norm

EPS = 1e-8
GROUP_EPS = 1e-6
SIZE = (3, 3, 3)
_MODES: dict[SpatialPadding, Mode] = {
    "zeros": "zeros",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}
Maps = Sequence[Float[Array, "_ _"]]


@dataclass(frozen=True)
class Style:
    """What all blocks of an encoder or a decoder share."""

    causal: bool
    spatial: SpatialPadding
    norm: Norm = "pixel_norm"

    @property
    def pads(self) -> tuple[Pad, Pad, Pad]:
        """Around a 3x3x3 convolution: time repeats its ends, or only the first."""
        time = Pad(2, 0, "edge") if self.causal else Pad(1, 1, "edge")
        side = Pad(1, 1, _MODES[self.spatial])
        return time, side, side


def space_to_depth(
    x: Float[Array, "B F H W C"], stride: Stride
) -> Float[Array, "B f h w D"]:
    """Blocks of `stride` cells -> channels, [B F/p H/q W/r C*p*q*r], block fastest."""
    p, q, r = stride
    pattern = "b (f p) (h q) (w r) c -> b f h w (c p q r)"
    return rearrange(x, pattern, p=p, q=q, r=r)


def depth_to_space(
    x: Float[Array, "B f h w D"], stride: Stride
) -> Float[Array, "B F H W C"]:
    """The inverse of `space_to_depth`."""
    p, q, r = stride
    pattern = "b f h w (c p q r) -> b (f p) (h q) (w r) c"
    return rearrange(x, pattern, p=p, q=q, r=r)


def normed(
    x: Float[Array, "B F H W D"], norm: Norm, name: str
) -> Float[Array, "B F H W D"]:
    """Normalise inside a compact module; a group norm has parameters."""
    if norm == "pixel_norm":
        return rms_norm(x, EPS)
    return _group_norm(x, GROUPS, name)


def _group_norm(
    x: Float[Array, "B F H W D"], groups: int, name: str
) -> Float[Array, "B F H W D"]:
    # The fast variance, E x^2 - (E x)^2, loses what is left after a large mean.
    options = {"epsilon": GROUP_EPS, "use_fast_variance": False, "dtype": x.dtype}
    return nn.GroupNorm(groups, name=name, **options)(x)


class TimeEmbedding(nn.Module):
    """Sinusoids of a timestep -> `width` numbers: Dense, SiLU, Dense."""

    width: int

    @nn.compact
    def __call__(self, sinusoids: Float[Array, "B E"]) -> Float[Array, "B D"]:
        """Embed."""
        h = Dense(self.width, name="up")(sinusoids)
        return Dense(self.width, name="down")(jax.nn.silu(h))


def modulation(
    table: Float[Array, "k D"], embedded: Float[Array, "B kD"]
) -> list[Float[Array, "B 1 1 1 D"]]:
    """The rows of table + embedding: shift and scale, per norm."""
    batch, rows = len(embedded), len(table)
    both = table.astype(embedded.dtype)[None] + embedded.reshape(batch, rows, -1)
    return [row[:, None, None, None] for row in jnp.unstack(both, axis=1)]


class ResBlock(nn.Module):
    """Two normed convolutions beside the input; it may change the width."""

    width: int
    style: Style

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F H W I"],
        embedded: Float[Array, "B E"] | None = None,
        maps: Maps = (),
    ) -> Float[Array, "B F H W O"]:
        """Map [B F H W I] to `width` channels.

        Args:
            x: activations.
            embedded: the timestep, 4 I numbers.
            maps: two maps of noise, or none.
        """
        h, rows = x, []
        if embedded is not None:
            table = self.param("table", nn.initializers.zeros, (4, x.shape[-1]))
            rows = modulation(table, embedded)
        for n in (1, 2):
            h = normed(h, self.style.norm, f"norm{n}")
            if rows:
                shift, scale = rows[2 * n - 2 : 2 * n]
                h = h * (1 + scale) + shift
            h = Conv(self.width, SIZE, self.style.pads, name=f"conv{n}")(jax.nn.silu(h))
            if maps:
                h = h + self._scaled(maps[n - 1], f"noise_scale{n}").astype(h.dtype)
        if x.shape[-1] != self.width:
            if maps:
                raise ValueError(
                    "video VAE: a block that makes "
                    f"{self.width} channels of {x.shape[-1]} cannot inject noise"
                )
            x = _group_norm(x, 1, "norm3")
            x = Conv(self.width, (1, 1, 1), (Pad(),) * 3, name="shortcut")(x)
        return x + h

    def _scaled(
        self, noise: Float[Array, "H W"], name: str
    ) -> Float[Array, "1 1 H W D"]:
        scale = self.param(name, nn.initializers.zeros, (1, 1, self.width))
        return noise[None, None, :, :, None] * scale[None, None]


class Stage(nn.Module):
    """Residual blocks one after the other, with one embedding of the timestep."""

    block: Residual
    style: Style

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B F H W D"],
        sinusoids: Float[Array, "B E"] | None = None,
        maps: Maps = (),
    ) -> Float[Array, "B F H W D"]:
        """Map [B F H W D] to the same shape; `maps` has two per noisy block."""
        embedded = None
        if sinusoids is not None:
            embedded = TimeEmbedding(4 * self.block.width, name="time")(sinusoids)
        for n in range(self.block.layers):
            own = maps[2 * n : 2 * n + 2]
            x = ResBlock(self.block.width, self.style, name=f"res_{n}")(
                x, embedded, own
            )
        return x


class StridedConv(nn.Module):
    """A 3x3x3 convolution that keeps one of `stride` cells."""

    block: Strided
    style: Style

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        """Reduce [B F H W I] by the block's stride; F = 2k+1 becomes k+1."""
        width, stride = self.block.width_out, self.block.stride
        return Conv(width, SIZE, self.style.pads, stride, name="strided")(x)


def _check(block: Resample, whole: int, part: int) -> None:
    """Raise unless `part` channels are there, and divide `whole`."""
    if part < 1 or whole % part:
        raise ValueError(
            f"video VAE: a change of resolution by {block.stride} cannot make "
            f"{block.width_out} channels of {block.width_in}; check its multiplier"
        )


class Down(nn.Module):
    """Convolution, then `space_to_depth`, plus the grouped means of the input."""

    block: Resample
    style: Style

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        """Reduce [B F H W I] by the block's stride; an odd F is extended in front."""
        stride, width = self.block.stride, self.block.width_out
        cells = math.prod(stride)
        _check(self.block, width, cells)
        _check(self.block, cells * x.shape[-1], width)
        if stride[0] == 2:
            x = jnp.concatenate([x[:, :1], x], axis=1)
        y = Conv(width // cells, SIZE, self.style.pads, name="conv")(x)
        y = space_to_depth(y, stride)
        skip = space_to_depth(x, stride)
        return y + skip.reshape(*y.shape, -1).mean(-1)


class Up(nn.Module):
    """Convolution, then `depth_to_space`, plus the repeated input where asked."""

    block: Resample
    style: Style

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W I"]) -> Float[Array, "B f h w O"]:
        """Enlarge [B F H W I] by the block's stride; F becomes 2F - 1."""
        stride, width = self.block.stride, self.block.width_out
        cells = math.prod(stride)
        _check(self.block, x.shape[-1], width)
        y = Conv(width * cells, SIZE, self.style.pads, name="conv")(x)
        y = depth_to_space(y, stride)
        if self.block.shortcut:
            _check(self.block, x.shape[-1], cells)
            _check(self.block, width, x.shape[-1] // cells)
            skip = depth_to_space(x, stride)
            y = y + jnp.tile(skip, width // skip.shape[-1])
        return y[:, 1:] if stride[0] == 2 else y


def run_block(
    block: Block,
    x: Float[Array, "B F H W I"],
    *,
    style: Style,
    name: str,
    resample: type[Down] | type[Up],
    sinusoids: Float[Array, "B E"] | None = None,
    maps: Maps = (),
) -> Float[Array, "B f h w O"]:
    """Run one block of a config inside a compact module.

    Args:
        block: which.
        x: activations.
        style: of the network.
        name: of the module.
        resample: what a change of resolution is here.
        sinusoids: of the timestep; only stages use them.
        maps: the noise that this block injects.
    """
    if isinstance(block, Residual):
        return Stage(block, style, name=name)(x, sinusoids, maps)
    if isinstance(block, Transition):
        return ResBlock(block.width_out, style, name=name)(x, None, maps)
    if isinstance(block, Strided):
        return StridedConv(block, style, name=name)(x)
    return resample(block, style, name=name)(x)

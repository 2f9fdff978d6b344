"""The latent upsampler: video latents [B F H W C] at a higher resolution, or rate.

    conv -> norm -> SiLU -> residual blocks -> change of size -> blocks -> conv

It works on latents as the VAE makes them, not on the normalised ones that a transformer
sees: `upsample` takes normalised latents there and back, `apply` is the bare network.

A change of size is a convolution to more channels, which become blocks of p x q x r
cells, block fastest. In space alone every frame is enlarged by itself; the rational
form may then blur with the binomial kernel 1 4 6 4 1 and keep every second or fourth
cell. In time the first frame is dropped afterwards, since the first latent frame stands
for a single picture: F frames become 2F - 1.

In a network of two dimensions frames are independent pictures, norms included.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from idlora_jax.config_upsampler import GROUPS, UpsamplerConfig
from idlora_jax.model import conv
from idlora_jax.model.conv import Conv, Pad
from idlora_jax.types import Tree

EPS = 1e-5
BINOMIAL = np.array([1, 4, 6, 4, 1], np.float32) / 16
REACH = len(BINOMIAL) // 2


def shuffle(
    x: Float[Array, "B *X D"], factors: tuple[int, ...]
) -> Float[Array, "B *Y C"]:
    """Channels -> cells: [B *X C*p*q] with factors p, q -> [B p*X q*X C]."""
    batch, *sides, channels = x.shape
    n = len(factors)
    split = (batch, *sides, channels // math.prod(factors), *factors)
    pairs = [axis for s in range(n) for axis in (1 + s, n + 2 + s)]
    cells = x.reshape(split).transpose(0, *pairs, n + 1)
    larger = (side * f for side, f in zip(sides, factors, strict=True))
    return cells.reshape(batch, *larger, split[n + 1])


def blur(
    x: Float[Array, "N H W D"], kernel: Float[Array, "K K 1 1"], stride: int
) -> Float[Array, "N h w D"]:
    """Blur every channel alike (zeros beyond the border), keep every `stride`-th cell.

    h = ceil(H / stride), w = ceil(W / stride).
    """
    width = x.shape[-1]
    every = jnp.broadcast_to(kernel.astype(x.dtype), (*kernel.shape[:3], width))
    return jax.lax.conv_general_dilated(
        x,
        every,
        (stride, stride),
        [(REACH, REACH)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=width,
    )


def _conv(features: int, dims: int, name: str) -> Conv:
    return Conv(features, (3,) * dims, (Pad(1, 1),) * dims, name=name)


def _norm(x: Float[Array, "B *X D"], name: str) -> Float[Array, "B *X D"]:
    # The fast variance, E x^2 - (E x)^2, loses what is left after a large mean.
    return nn.GroupNorm(
        GROUPS, epsilon=EPS, use_fast_variance=False, dtype=x.dtype, name=name
    )(x)


class ResBlock(nn.Module):
    """silu(x + norm(conv(silu(norm(conv(x)))))), the width kept."""

    @nn.compact
    def __call__(self, x: Float[Array, "B *X D"]) -> Float[Array, "B *X D"]:
        """Map [B *X D] to the same shape."""
        width, dims = x.shape[-1], x.ndim - 2
        h = jax.nn.silu(_norm(_conv(width, dims, "conv1")(x), "norm1"))
        return jax.nn.silu(x + _norm(_conv(width, dims, "conv2")(h), "norm2"))


class Blur(nn.Module):
    """`blur` with the kernel of the file, which holds one even where it is unused."""

    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W D"]) -> Float[Array, "N h w D"]:
        """Keep every `stride`-th cell."""
        shape = (len(BINOMIAL), len(BINOMIAL), 1, 1)
        kernel = self.param("kernel", nn.initializers.zeros, shape)
        return x if self.stride == 1 else blur(x, kernel, self.stride)


class Rational(nn.Module):
    """Every cell becomes up x up cells, of which every `down`-th is kept."""

    up: int
    down: int

    @nn.compact
    def __call__(self, x: Float[Array, "N H W D"]) -> Float[Array, "N h w D"]:
        """Change height and width by up / down, rounded up."""
        h = _conv(self.up**2 * x.shape[-1], 2, "conv")(x)
        return Blur(self.down, name="blur")(shuffle(h, (self.up, self.up)))


def _in_space(
    cfg: UpsamplerConfig, x: Float[Array, "N H W D"]
) -> Float[Array, "N h w D"]:
    up, down = cfg.space
    if cfg.rational:
        return Rational(up, down, name="rational")(x)
    return shuffle(_conv(up**2 * cfg.width, 2, "shuffle")(x), (up, up))


def _in_time(
    cfg: UpsamplerConfig, x: Float[Array, "B F H W D"]
) -> Float[Array, "B f h w D"]:
    factors = (cfg.time, cfg.space[0], cfg.space[0])
    h = _conv(math.prod(factors) * cfg.width, 3, "shuffle")(x)
    return shuffle(h, factors)[:, 1:]


def _fold(x: Float[Array, "B F H W D"]) -> Float[Array, "N H W D"]:
    """Frames as pictures of a batch."""
    return x.reshape(-1, *x.shape[2:])


def _unfold(x: Float[Array, "N H W D"], batch: int) -> Float[Array, "B F H W D"]:
    return x.reshape(batch, -1, *x.shape[1:])


class Upsampler(nn.Module):
    """Latents [B F H W C], not normalised -> larger ones."""

    cfg: UpsamplerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W C"]) -> Float[Array, "B f h w C"]:
        """Change the size to `cfg.size(F, H, W)`."""
        cfg, batch = self.cfg, x.shape[0]
        h = _fold(x) if cfg.dims == 2 else x
        h = jax.nn.silu(_norm(_conv(cfg.width, cfg.dims, "conv_in")(h), "norm_in"))
        for n in range(cfg.blocks):
            h = ResBlock(name=f"before_{n}")(h)
        if cfg.time > 1:
            h = _in_time(cfg, h)
        elif cfg.dims == 2:
            h = _in_space(cfg, h)
        else:
            h = _unfold(_in_space(cfg, _fold(h)), batch)
        for n in range(cfg.blocks):
            h = ResBlock(name=f"after_{n}")(h)
        h = _conv(cfg.channels, cfg.dims, "conv_out")(h)
        return _unfold(h, batch) if cfg.dims == 2 else h


def init(cfg: UpsamplerConfig, key: PRNGKeyArray) -> Tree:
    """Random float32 parameters: norms do nothing at first, a blur is binomial."""

    def known(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [str(p.key) for p in path]
        if "blur" in names:
            return jnp.asarray(np.outer(BINOMIAL, BINOMIAL)[..., None, None])
        return jnp.ones_like(leaf) if names[-1] == "scale" else leaf

    tree = conv.init(Upsampler(cfg), key, (1, 1, 1, 1, cfg.channels))
    return jax.tree_util.tree_map_with_path(known, tree)


def apply(
    cfg: UpsamplerConfig, params: Tree, latent: Float[Array, "B F H W C"]
) -> Float[Array, "B f h w C"]:
    """Upsample latents that are not normalised.

    Args:
        cfg: static.
        params: as `init` gives them.
        latent: as the video VAE's encoder makes it, before normalising.

    Returns:
        Latents of size `cfg.size(F, H, W)`, in the dtype of `latent`.

    Raises:
        ValueError: if the latent has another number of channels, or no cells.

    Source: `ltx_core/model/upsampler/model.py: LatentUpsampler`.
    """
    if latent.shape[-1] != cfg.channels or 0 in latent.shape:
        raise ValueError(
            f"upsampler.apply: latent must be [B F H W {cfg.channels}] with "
            f"F, H, W >= 1, got shape {latent.shape}"
        )
    return conv.run(Upsampler(cfg), params, latent)


def upsample(
    cfg: UpsamplerConfig,
    params: Tree,
    latent: Float[Array, "B F H W C"],
    mean: Float[Array, " C"],
    std: Float[Array, " C"],
) -> Float[Array, "B f h w C"]:
    """Upsample normalised latents, such as a transformer makes and takes.

    Args:
        cfg: static.
        params: as `init` gives them.
        latent: normalised per channel.
        mean: of the latents per channel, as the video VAE's file has it.
        std: their standard deviation per channel.

    Returns:
        Normalised latents of size `cfg.size(F, H, W)`, in the dtype of `latent`.

    Raises:
        ValueError: if the latent has another number of channels, or no cells.

    Source: `ltx_core/model/upsampler/model.py: upsample_video`.
    """
    mean, std = (s.astype(latent.dtype)[None, None, None, None] for s in (mean, std))
    return (apply(cfg, params, latent * std + mean) - mean) / std

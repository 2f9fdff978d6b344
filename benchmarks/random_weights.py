"""Random transformers: weights where nobody else makes them.

base(cfg, dtype, int8=..., weights_in=...) -> params, kernels of variance 1 / fan-in
shapes(cfg, dtype)                         -> their shapes: enough to compile
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from idlora_jax import hosted
from idlora_jax.config import TransformerConfig
from idlora_jax.model import transformer
from idlora_jax.quantized import Int8
from idlora_jax.types import Tree
from idlora_jax.weights import rules

INT8_SIZE = 30
"""Standard deviation of kernels in int8: four of them are below 127."""


def _by_rows(draw: Any, key: Any, rows: int) -> Any:
    """One row after the other along the first axis, so that little is held."""
    return jax.lax.map(draw, jax.random.split(key, rows))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _plain(key: Any, shape: tuple[int, ...], size: float, dtype: Any) -> Any:
    draw = lambda k: (size * jax.random.normal(k, shape[1:])).astype(dtype)
    return _by_rows(draw, key, shape[0])


@functools.partial(jax.jit, static_argnums=(1,))
def _integers(key: Any, shape: tuple[int, ...]) -> Any:
    draw = lambda k: jnp.rint(INT8_SIZE * jax.random.normal(k, shape[1:]))
    cut = lambda k: jnp.clip(draw(k), -127, 127).astype(jnp.int8)
    return _by_rows(cut, key, shape[0])


def _int8(key: Any, shape: tuple[int, ...], size: float, dtype: Any) -> Int8:
    scales = jnp.full((shape[0], 1, shape[2]), size / INT8_SIZE, jnp.float32)
    return Int8(_integers(key, shape), scales, jnp.zeros(0, dtype))


def hash_of(text: str) -> int:
    """A number that is the same in every run (Python's own hash of text is not)."""
    return sum((n + 1) * ord(c) for n, c in enumerate(text)) % 2**31


def shapes(cfg: TransformerConfig, dtype: Any = jnp.float32) -> Tree:
    """Of plain weights: nothing is allocated."""
    found = jax.eval_shape(lambda key: transformer.init(cfg, key), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), found)


def _moved(path: str, leaf: Any) -> Any:
    """A kernel on the host; the scales of one in int8 stay."""
    where = hosted.placement(None)
    if isinstance(leaf, Int8):
        place = where(f"{path}/values", leaf.shape)
        return leaf._replace(values=jax.device_put(leaf.values, place))
    return jax.device_put(leaf, where(path, leaf.shape))


def base(
    cfg: TransformerConfig,
    dtype: Any = jnp.float32,
    *,
    int8: bool = False,
    weights_in: hosted.Where = "device",
) -> Tree:
    """The parameters of a transformer.

    Args:
        cfg: of it.
        dtype: of the weights, or what those in int8 widen to.
        int8: whether the blocks' kernels are; then none of them is ever in `dtype`.
        weights_in: where these are; they pass the device one at a time.
    """

    def one(path: str, leaf: Any) -> Any:
        kind = path.rpartition("/")[2]
        if kind in ("bias", "scale"):
            return jnp.full(leaf.shape, float(kind == "scale"), leaf.dtype)
        own = leaf.shape if path.startswith("blocks/") else (1, *leaf.shape)
        size = 0.1 if kind.endswith("table") else float(own[1]) ** -0.5
        key = jax.random.key(hash_of(path))
        if not hosted.chosen(path, leaf.shape):
            return _plain(key, own, size, leaf.dtype).reshape(leaf.shape)
        made = (_int8 if int8 else _plain)(key, own, size, leaf.dtype)
        return _moved(path, made) if weights_in == "host" else made

    flat = rules.flatten(shapes(cfg, dtype))
    return rules.nest({path: one(path, leaf) for path, leaf in flat.items()})

"""8-bit checkpoints made of plain ones: per tensor, in some layers only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from idlora_jax import quantized
from idlora_jax.quantized import Quantized
from idlora_jax.types import Tree
from idlora_jax.weights import fp8, rules, tensorfile

E4M3 = ml_dtypes.float8_e4m3fn
LARGEST = 448.0
LAYER = re.compile(r"transformer_blocks\.(\d+)\.")
BLOCKS = "model.diffusion_model.transformer_blocks."
Tensors = dict[str, np.ndarray]


def narrowed(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A tensor in 8 bits and its scale."""
    wide = weight.astype(np.float32)
    scale = np.float32(np.abs(wide).max() / LARGEST)
    return (wide / scale).astype(E4M3), np.asarray(scale)


def in_layers(*numbers: int) -> Callable[[str], bool]:
    """Whether a key is a Linear's weight in one of these blocks."""

    def chosen(key: str) -> bool:
        found = LAYER.search(key)
        linear = key.endswith(".weight") and "_norm." not in key
        return bool(found) and linear and int(found.group(1)) in numbers

    return chosen


def scaled(tensors: Tensors, chosen: Callable[[str], bool]) -> Tensors:
    """Chosen weights in 8 bits, with both scales beside them."""
    out = dict(tensors)
    for n, key in enumerate(filter(chosen, tensors)):
        out[key], out[f"{key}_scale"] = narrowed(tensors[key])
        stem = key.removesuffix("weight")
        out[f"{stem}input_scale"] = np.asarray(np.float32(n + 1))
    return out


def cast(tensors: Tensors, chosen: Callable[[str], bool]) -> Tensors:
    """Chosen tensors in 8 bits without scales."""
    return {k: v.astype(E4M3) if chosen(k) else v for k, v in tensors.items()}


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors of a file, and its metadata."""
    found = tensorfile.tensors_of(path)
    metadata = dict(tensorfile.header(path).metadata)
    metadata.pop(tensorfile.HASH, None)
    return {name: found.tensor(name) for name in found.specs}, metadata


def write(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Path:
    """A file that says which layers are scaled, if any is."""
    stems = [k.removesuffix(".weight_scale") for k in tensors if k.endswith("t_scale")]
    stems = [stem for stem in stems if not stem.endswith("input_scale")]
    if stems:
        layers = {stem: {"format": "float8_e4m3fn"} for stem in stems}
        metadata = metadata | {"_quantization_metadata": json.dumps({"layers": layers})}
    tensorfile.write(
        path, [tensorfile.entry(*pair) for pair in tensors.items()], metadata
    )
    return path


def in_memory(base: Tree, layers: Collection[int]) -> Tree:
    """A transformer whose blocks' kernels are in 8 bits in some layers."""
    like = jnp.zeros(0, E4M3)

    def one(path: str, array: np.ndarray) -> Quantized | np.ndarray:
        if not (path.startswith("blocks/") and path.endswith("/kernel")):
            return array
        flags = np.isin(np.arange(len(array)), [*layers])
        values, scales = zip(*map(narrowed, np.asarray(array)[flags]), strict=True)
        parts = (
            np.asarray(array)[~flags],
            np.stack(values).view(np.uint8),
            np.stack(scales),
        )
        wide, narrow, scale = map(jnp.asarray, parts)
        row = jnp.asarray(quantized.rows(flags))
        return Quantized(wide, narrow, like, scale, None, row)

    return rules.nest({p: one(p, a) for p, a in rules.flatten(base).items()})


def dequantized(tensors: Tensors) -> Tensors:
    """Plain float32 tensors of a file in 8 bits, the simple way."""
    out: Tensors = {}
    for key, value in tensors.items():
        if key.endswith((".weight_scale", ".input_scale")):
            continue
        if value.dtype in fp8.FLOAT8:
            value = value.astype(np.float32) * tensors.get(f"{key}_scale", 1)
        out[key] = value
    return out

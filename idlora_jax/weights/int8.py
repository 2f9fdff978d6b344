"""Kernels of the blocks in int8: made while they are read or converted, and in files.

    scales[l, 0, o] = max over i of |kernel[l, i, o]| / 127
    values[l, i, o] = round(kernel[l, i, o] / scales[l, 0, o])

Symmetric, one scale per layer and output channel, which can follow the matrix product
(see `quantized.product`). All that is not a kernel of a block stays as it is: AdaLN,
projections in and out, norms, biases, tables. Under our paths a kernel is two parts:

    PATH_int8          int8 [L I O]
    PATH_scales        float32 [L 1 O]

Source: LLM.int8(), arXiv 2208.07339, section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from idlora_jax.files import problem
from idlora_jax.weights import leaves
from idlora_jax.weights.leaves import Leaf, Narrow
from idlora_jax.weights.tensorfile import Spec

INT8 = np.dtype(np.int8)
LARGEST = 127
VALUES, SCALES = "_int8", "_scales"
"""Ends of the parts' paths."""
_FLOAT32 = np.dtype(np.float32)
Piece = Callable[[int], np.ndarray]


def chosen(path: str, leaf: Leaf) -> bool:
    """Whether a parameter of the transformer is one that is kept in int8."""
    kernel = path.startswith("blocks/") and path.endswith("/kernel")
    return kernel and len(leaf.spec.shape) == 3


def is_int8(leaf: Leaf) -> bool:
    """Whether a parameter's pieces are in int8."""
    return leaf.narrow is not None and leaf.narrow.dtype == INT8


def rounded(path: str, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [I O] as int8 [I O] and its scales, float32 [1 O].

    In strips of output channels, so that no widened copy of it is ever whole. A channel
    of zeros has the scale 0.

    Args:
        path: for the error.
        kernel: of any float dtype and order in memory.

    Raises:
        ValueError: if it is not finite.
    """
    values = np.empty(kernel.shape, INT8)
    scales = np.empty((1, kernel.shape[1]), _FLOAT32)
    for start in range(0, kernel.shape[1], leaves.STRIP):
        strip = slice(start, start + leaves.STRIP)
        wide = kernel[:, strip].astype(_FLOAT32)
        scale = np.abs(wide).max(axis=0, keepdims=True) / np.float32(LARGEST)
        if not np.isfinite(scale).all():
            got, do = "values that are not finite", "download it again"
            raise problem("weights", path, got, "finite ones", do)
        wide /= np.where(scale > 0, scale, 1)
        values[:, strip], scales[:, strip] = np.rint(wide, out=wide), scale
    return values, scales


def widened(values: np.ndarray, scales: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The kernel [I O] that int8 [I O] and scales [1 O] stand for."""
    return (values.astype(_FLOAT32) * scales).astype(dtype)


def packed(spec: Spec, piece: Piece, scales: Piece) -> Leaf:
    """The leaf of a kernel in int8.

    Args:
        spec: the kernel's shape [L I O], and what it widens to.
        piece: from a layer's number to int8 [I O].
        scales: likewise to float32 [1 O].
    """
    layers, _, wide = spec.shape
    numbers = Leaf(Spec((layers, 1, wide), _FLOAT32), layers, scales)
    narrow = Narrow(INT8, tuple(range(layers)), True, {SCALES: numbers})
    return Leaf(spec, layers, piece, narrow)


def quantised(path: str, leaf: Leaf) -> Leaf:
    """A plain kernel [L I O] whose pieces are made int8 one by one, as they are read.

    A layer's scales are kept from when its values were read, so that whoever reads
    first all values, then all scales, reads and rounds each piece once.

    Args:
        path: for the error, which whoever reads a piece that is not finite gets.
        leaf: without pieces in 8 bits.
    """
    assert leaf.narrow is None, "widen it first"
    known: dict[int, np.ndarray] = {}

    def piece(index: int) -> np.ndarray:
        values, known[index] = rounded(f"{path}, layer {index}", leaf.piece(index))
        return values

    def scales(index: int) -> np.ndarray:
        if index not in known:
            piece(index)
        return known[index]

    return packed(leaf.spec, piece, scales)

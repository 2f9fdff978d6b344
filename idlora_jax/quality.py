"""What keeping weights in 8 bits costs: errors of kernels, and of a whole sample.

    kernels(plain, narrow) -> {"video/self_attn/q": 0.008, ...}
    steps(seen, other) -> one `AV` of relative errors for each step

An error is relative: the root mean square of the difference over that of the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from idlora_jax import quantized
from idlora_jax.types import AV, Tree, each


@runtime_checkable
class Step(Protocol):
    """What is seen after a step, such as `pipeline.Seen`."""

    @property
    def latents(self) -> AV:
        """Arrays of any shape, a modality each, or None."""
        ...


def relative(got: Any, want: Any) -> float:
    """Root mean square of the difference over that of `want`; 0 where both are 0.

    Args:
        got: an array.
        want: another of the same shape.
    """
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape, f"shapes differ: {got.shape} and {want.shape}"
    off = float(np.sqrt(np.mean((got - want) ** 2)))
    size = float(np.sqrt(np.mean(want**2)))
    return off / size if off else 0.0


def _layers(kernel: Any, plain: Any) -> Iterable[tuple[Any, Any]]:
    """The layers of a stack, widened one at a time, and those of the plain one."""
    for n in range(plain.shape[0]):
        made = quantized.layer(kernel, jnp.asarray(n))
        wide = quantized.whole(made) if quantized.is_quantized(made) else made
        yield wide, plain[n]


def kernels(plain: Tree, narrow: Tree) -> dict[str, float]:
    """The error of each kind of kernel of the blocks, the mean over its layers.

    Args:
        plain: a transformer's parameters as they were.
        narrow: the same with kernels in 8 bits.

    Returns:
        Errors by the path of the module in a block; kernels that are plain in both are
        left out.
    """
    find = jax.tree_util.tree_leaves_with_path
    kept = find(narrow["blocks"], is_leaf=quantized.is_quantized)
    out = {}
    for (keys, kernel), (_, array) in zip(kept, find(plain["blocks"]), strict=True):
        if not quantized.is_quantized(kernel):
            continue
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        errors = [relative(*pair) for pair in _layers(kernel, array)]
        out[path.removesuffix("/kernel")] = sum(errors) / len(errors)
    return out


def steps(seen: Sequence[Step], other: Sequence[Step]) -> list[AV]:
    """How far the latents of one sample are from those of another, step by step.

    Args:
        seen: with the weights to be judged, for instance of a `trajectories.Recorder`.
        other: from the same noise with the weights that count as right.
    """
    pairs = zip(seen, other, strict=True)
    return [each(relative, a.latents, b.latents) for a, b in pairs]

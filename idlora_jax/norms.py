"""Norms of gradients and adapters, by group of modules; for logs.

A group is where a module stands: `blocks/audio/self_attn/q` is of "audio_self_attn",
"video_cross_attn" reads audio into video and "audio_cross_attn" video into audio.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idlora_jax.types import Tree

Norms = dict[str, Float[Array, ""]]


def group(names: tuple[str, ...]) -> str:
    """The group of a parameter, given the names of its path."""
    inner = names[1:3] if names[0] == "blocks" else names[:1]
    return "_".join(inner)


def _joined(squares: list[tuple[str, Array]], name: str) -> Norms:
    """sqrt of the sum of each group's squares."""
    totals: dict[str, Any] = {}
    for group, square in squares:
        totals[group] = totals.get(group, 0.0) + square
    return {f"{name}/{group}": jnp.sqrt(total) for group, total in totals.items()}


def _square(x: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def of_tree(tree: Tree, name: str) -> Norms:
    """The Frobenius norm of each group's leaves, as "name/group".

    Args:
        tree: gradients or parameters.
        name: of what they are.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = [(tuple(str(key.key) for key in path), x) for path, x in leaves]
    return _joined([(group(path), _square(x)) for path, x in named], name)


def _change(pair: Mapping[str, Array]) -> Float[Array, ""]:
    """|a b|^2 = sum (a^T a) (b b^T), without the product of full size."""
    a, b = (pair[name].astype(jnp.float32) for name in "ab")
    inner = jnp.einsum("...ir,...is->...rs", a, a)
    outer = jnp.einsum("...ro,...so->...rs", b, b)
    # Its rounding may fall below zero.
    return jnp.maximum(jnp.sum(inner * outer), 0.0)


def _pairs(tree: Tree, at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if "a" in tree and "b" in tree:
        return [(at, tree)]
    return [pair for name, node in tree.items() for pair in _pairs(node, (*at, name))]


def of_change(adapter: Tree, name: str) -> Norms:
    """The Frobenius norm of what a scaled adapter adds to each group's kernels.

    Args:
        adapter: nested dict with {a: [.. I R], b: [.. R O]} in place of kernels.
        name: as in `of_tree`.
    """
    return _joined([(group(at), _change(pair)) for at, pair in _pairs(adapter)], name)

"""How many floating-point operations a traced function does, without running it.

    count(jax.make_jaxpr(f)(*shapes)) -> FLOPs of its matrix products and convolutions

A product of [M K] and [K N] counts 2 M K N. What a scan does counts once a round, which
XLA's own cost analysis of a compiled loop does not; of a branch the dearer side counts.
Elementwise work is left out: in these networks it is bound by memory, not arithmetic.
So is what nobody reads, which compilers drop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core

FORWARD, BACKWARD = 2, 5
"""Products of the scores' size in a fused attention kernel, either direction."""


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * eqn.outvars[0].aval.size * math.prod(left[n] for n in contracted)


def _convolution(eqn: Any) -> float:
    """Every output is a sum over a kernel's window; zeros put between are no work."""
    kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
    features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    spread = math.prod(eqn.params["lhs_dilation"])
    return 2.0 * out.size * kernel.size / features / spread


def _attention(eqn: Any) -> float:
    """A fused kernel, [B T N K] queries and [B S N K] keys."""
    q, k = (v.aval.shape for v in eqn.invars[:2])
    products = BACKWARD if "bwd" in eqn.primitive.name else FORWARD
    return 2.0 * products * math.prod(q) * k[1]


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an operation calls."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _of(eqn: Any) -> float:
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot(eqn)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if "dot_product_attention" in name:
        return _attention(eqn)
    inside = [_walk(jaxpr) for jaxpr in _inner(eqn)]
    if name == "scan":
        return eqn.params["length"] * sum(inside, 0.0)
    if name == "cond":
        return max(inside)
    if name == "while" and sum(inside):
        raise ValueError(
            "flops: a while loop does matrix products an unknown number of times; "
            "write it as a scan"
        )
    return sum(inside, 0.0)


def _walk(jaxpr: Any) -> float:
    """From the last operation back, without those whose results nobody reads."""
    total = 0.0
    read = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not read.isdisjoint(eqn.outvars):
            read.update(v for v in eqn.invars if not isinstance(v, core.Literal))
            total += _of(eqn)
    return total


def count(traced: core.ClosedJaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a function.

    Args:
        traced: from `jax.make_jaxpr`.

    Raises:
        ValueError: if a loop of unknown length does any.
    """
    return _walk(traced.jaxpr)

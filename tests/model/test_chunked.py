"""Attention in chunks: the same as at once, with fewer scores in memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import flops
from idlora_jax.model.chunked import LEAST, chunked, plain

B, T, S, N, K = 2, 300, 140, 6, 8
ROW = 4 * B * S
BUDGETS = {"heads": 2 * T * ROW, "a head": T * ROW, "queries": LEAST * ROW}


def qkv(seed: int = 0) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, T, N, K), (B, S, N, K), (B, S, N, K))
    pairs = zip(keys, shapes, strict=True)
    return tuple(jax.random.normal(key, shape) for key, shape in pairs)


OPTIONS: dict[str, Any] = {
    "nothing": {},
    "bias": {"bias": jax.random.normal(jax.random.key(5), (B, 1, T, S))},
    "length": {"length": jnp.array([S - 30, S])},
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("option", OPTIONS)
def test_chunks_give_what_all_scores_at_once_give(budget: str, option: str):
    given = OPTIONS[option]
    got = chunked(*qkv(), **given, budget=BUDGETS[budget])
    np.testing.assert_allclose(got, plain(*qkv(), **given), atol=2e-6)


@pytest.mark.parametrize("option", ["bias", "length"])
def test_gradients_through_chunks_are_those_of_all_scores_at_once(option: str):
    weight = jax.random.normal(jax.random.key(9), (B, T, N, K))
    parts = functools.partial(chunked, budget=BUDGETS["queries"])

    def gradients(f: Any) -> Any:
        loss = lambda args: jnp.sum(f(*args, **OPTIONS[option]) * weight)
        return jax.jit(jax.grad(loss))(qkv())

    for got, want in zip(gradients(parts), gradients(plain), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def largest(f: Any) -> int:
    """Values of the largest array that an operation of f or its gradient makes."""
    loss = lambda args: jnp.sum(f(*args))
    found = []

    def walk(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            found.extend(v.aval.size for v in eqn.outvars)
            for inner in flops._inner(eqn):
                walk(inner)

    walk(jax.make_jaxpr(jax.grad(loss))(qkv()).jaxpr)
    return max(found)


def test_neither_direction_keeps_the_scores():
    scores = B * T * S * N
    assert largest(plain) >= scores
    parts = functools.partial(chunked, budget=BUDGETS["queries"])
    assert largest(parts) < scores / 4


def test_small_attention_is_one_chunk():
    shapes = jax.eval_shape(qkv)
    one, other = (jax.make_jaxpr(f)(*shapes) for f in (plain, chunked))
    assert str(one) == str(other)


def test_chunks_do_no_more_products_forwards():
    parts = functools.partial(chunked, budget=BUDGETS["a head"])
    shapes = jax.eval_shape(qkv)
    one, other = (flops.count(jax.make_jaxpr(f)(*shapes)) for f in (plain, parts))
    assert one == other

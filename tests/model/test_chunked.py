"""Attention in chunks: the same as at once, with fewer scores in memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import flops
from idlora_jax.model.chunked import LEAST, chunked

B, T, S, N, K = 2, 300, 140, 6, 8
ROW = 4 * B * S
BUDGETS = {"heads": 2 * T * ROW, "a head": T * ROW, "queries": LEAST * ROW}


plain = functools.partial(chunked, budget=1 << 60)


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


def library(q: Any, k: Any, v: Any, bias: Any = None, length: Any = None) -> Any:
    """What jax has for it."""
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias, key_value_seq_lengths=length, implementation="xla"
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients_are_those_of_the_library(option: str):
    weight = jax.random.normal(jax.random.key(9), (B, T, N, K))
    bias = OPTIONS[option].get("bias")

    def of(f: Any) -> Any:
        def loss(args: Any, bias: Any) -> Any:
            out = f(*args, bias, OPTIONS[option].get("length"))
            return jnp.sum(out * weight), out

        moves = (0,) if bias is None else (0, 1)
        return jax.jit(jax.grad(loss, moves, has_aux=True))(qkv(), bias)

    got, want = (jax.tree.leaves(of(f)) for f in (plain, library))
    assert len(got) == len(want) == (5 if option == "bias" else 4)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_half_precision_is_as_near_as_the_library():
    narrow = [x.astype(jnp.bfloat16) for x in qkv()]
    exact = library(*(x.astype(jnp.float32) for x in narrow))
    error = lambda f: float(jnp.abs(f(*narrow).astype(jnp.float32) - exact).max())
    assert plain(*narrow).dtype == jnp.bfloat16
    assert error(plain) <= 1.1 * error(library)


def test_double_precision_is_kept():
    q, k, v = (np.asarray(x, np.float64) for x in qkv())
    exps = np.exp(np.einsum("btnk,bsnk->bnts", q, k) / K**0.5)
    total = exps.sum(axis=-1, keepdims=True)
    want = np.einsum("bnts,bsnk->btnk", exps / total, v)
    with jax.enable_x64(True):
        got = plain(*map(jnp.asarray, (q, k, v)))
        slopes = jax.grad(lambda v: jnp.sum(plain(jnp.asarray(q), jnp.asarray(k), v)))
        slope = slopes(jnp.asarray(v))
    assert got.dtype == slope.dtype == jnp.float64
    np.testing.assert_allclose(got, want, atol=1e-13)
    column = (exps / total).sum(axis=2)  # what every value gives, to all queries
    np.testing.assert_allclose(slope[..., 0], np.moveaxis(column, 1, 2), atol=1e-12)


def test_forward_mode_is_the_derivative():
    args, moved = qkv(), qkv(1)
    got, want = (jax.jvp(f, args, moved)[1] for f in (plain, library))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_no_products_are_made_of_what_stays():
    q, k, v = qkv()
    one = flops.count(jax.make_jaxpr(plain)(q, k, v)) // 2

    def products(number: int) -> int:
        loss = lambda *args: jnp.sum(plain(*args) ** 2)
        traced = jax.make_jaxpr(jax.grad(loss, number))(q, k, v)
        return round(flops.count(traced) / one)

    # Two forwards; then one for the weights and one for the queries, or the values'.
    assert [products(n) for n in range(3)] == [4, 4, 3]


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

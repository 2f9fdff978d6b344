"""Rows that see no text, against attention under one huge bias."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.model.attention import Attention, attend, blind

S = 6
FLOOR = float(np.finfo(np.float32).min)


def qkv(seed: int = 0) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((2, 3, 2, 4), (2, S, 2, 4), (2, S, 2, 4))
    return tuple(
        jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)
    )


def gradients(f: Any) -> tuple[jax.Array, ...]:
    weight = jax.random.normal(jax.random.key(9), (2, 3, 2, 4))
    return jax.grad(lambda args: jnp.sum(f(*args) * weight))(qkv())


def masked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attend(q, k, v, bias=jnp.full((2, 3, S), FLOOR))


def test_blind_rows_are_the_mean_of_the_values():
    q, k, v = qkv()
    want = np.broadcast_to(np.asarray(v).mean(1, keepdims=True), q.shape)
    np.testing.assert_allclose(blind(q, k, v), want, atol=1e-6)
    np.testing.assert_allclose(masked(q, k, v), want, atol=1e-6)


def test_blind_rows_have_the_gradient_of_a_softmax_at_equal_scores():
    for got, want in zip(gradients(blind), gradients(masked), strict=True):
        assert np.abs(want).max() > 0.01
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_fused_kernels_gradient_is_as_many_times_that_as_there_are_keys():
    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return blind(q, k, v, "fused")

    for got, want in zip(gradients(fused), gradients(blind), strict=True):
        np.testing.assert_allclose(got, S * want, rtol=1e-5)


@pytest.mark.parity
def test_torch_differentiates_fully_masked_rows_like_the_fused_form():
    torch = pytest.importorskip("torch")
    rows = [torch.tensor(np.asarray(x).swapaxes(1, 2).copy()) for x in qkv()]
    for row in rows:
        row.requires_grad_()
    weight = jax.random.normal(jax.random.key(9), (2, 3, 2, 4))
    bias = torch.full((1, 1, 3, S), FLOOR)
    out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=bias)
    (out * torch.tensor(np.asarray(weight).swapaxes(1, 2).copy())).sum().backward()

    def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return blind(q, k, v, "fused")

    for row, want in zip(rows, gradients(fused), strict=True):
        got = row.grad.numpy().swapaxes(1, 2)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_padded_text_and_blind_rows_go_together():
    """The rows that see keep their bias; the others average over padding too."""
    attention = Attention(heads=2, head_dim=4, out_width=8)
    x, text = (jax.random.normal(jax.random.key(n), (1, S, 8)) for n in range(2))
    variables = attention.init(jax.random.key(2), x)
    seen = attention.apply(variables, text, method="keys_values")
    padding = jnp.where(jnp.arange(S) < 4, 0.0, FLOOR)
    bias = jnp.broadcast_to(padding[None, None], (1, S, S))
    got = attention.apply(variables, x, seen, bias=bias, blind_from=4)
    hidden = bias.at[:, 4:].set(FLOOR)
    want = attention.apply(variables, x, seen, bias=hidden)
    np.testing.assert_allclose(got, want, atol=1e-6)

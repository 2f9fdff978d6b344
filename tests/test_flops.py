"""FLOPs by a walk of the operations, against XLA's count of unrolled programs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from idlora_jax import flops

X = jax.ShapeDtypeStruct((16, 32), jnp.float32)
W = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32)


def counted(f: Any, *shapes: Any) -> float:
    return flops.count(jax.make_jaxpr(f)(*shapes))


def of_xla(f: Any, *shapes: Any) -> float:
    compiled = jax.jit(f).lower(*shapes).compile()
    return compiled.cost_analysis()["flops"]


def scanned(x: Any, w: Any) -> Any:
    return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]


def unrolled(x: Any, w: Any) -> Any:
    for n in range(w.shape[0]):
        x = x @ w[n]
    return x


def test_a_product_counts_a_multiplication_and_an_addition_each():
    assert counted(jnp.matmul, X, W) == 2 * 6 * 16 * 32 * 32
    scores = functools.partial(jnp.einsum, "btnk,bsnk->bnts")
    found = counted(scores, jnp.zeros((2, 5, 3, 4)), jnp.zeros((2, 7, 3, 4)))
    assert found == 2 * (2 * 3 * 5 * 7) * 4


def test_a_scan_counts_every_round_as_an_unrolled_program_does():
    assert counted(scanned, X, W) == counted(unrolled, X, W) == of_xla(unrolled, X, W)
    # XLA itself counts the body of a loop once, which is why there is a walk.
    assert of_xla(scanned, X, W) < 0.5 * counted(scanned, X, W)


@pytest.mark.parametrize("saves", [True, False])
def test_gradients_and_what_is_made_again_for_them_count(saves: bool):
    everything = jax.checkpoint_policies.everything_saveable
    nothing = jax.checkpoint_policies.nothing_saveable
    policy = everything if saves else nothing

    def loss(step: Any, x: Any, w: Any) -> Any:
        body = jax.checkpoint(step, policy=policy, prevent_cse=False)
        return jnp.sum(jax.lax.scan(lambda x, w: (body(x, w), None), x, w)[0])

    step = lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w)
    found = counted(jax.grad(functools.partial(loss, step), 1), X, W)
    product = 2 * 16 * 32 * 32
    # A layer has 2 products forwards, 4 backwards, and the first 2 again.
    assert found == 6 * product * ((2 + 4) if saves else (2 + 4 + 2))


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (4, 1), (1, 2)])
def test_a_convolution_counts_as_xla_counts_it(groups: int, stride: int):
    x = jax.ShapeDtypeStruct((2, 9, 9, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 8 // groups, 12), jnp.float32)

    def f(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "VALID", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    assert counted(f, x, kernel) == pytest.approx(of_xla(f, x, kernel), rel=1e-6)


def test_zeros_between_the_inputs_of_a_convolution_are_no_work():
    x = jax.ShapeDtypeStruct((1, 64, 8), jnp.float32)
    kernel = jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)
    f = lambda x, k: jax.lax.conv_transpose(x, k, (2,), "SAME")
    assert counted(f, x, kernel) == pytest.approx(2 * 64 * 4 * 8 * 8, rel=0.02)


def test_calls_are_looked_into_and_of_a_branch_the_dearer_side_counts():
    square = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    product = 2 * 32**3
    inner = jax.jit(lambda a: jax.checkpoint(lambda b: b @ b)(a))
    assert counted(lambda a: inner(inner(a)), square) == 2 * product
    both = (lambda a: a @ a @ a, lambda a: a @ a)
    flag = jax.ShapeDtypeStruct((), bool)
    assert counted(lambda p, a: jax.lax.cond(p, *both, a), flag, square) == 2 * product


def test_what_nobody_reads_does_not_count():
    def f(x: Any, w: Any) -> Any:
        scanned(x, w)
        return jnp.cos(x)

    assert counted(f, X, W) == 0


def test_a_loop_of_unknown_length_is_refused_where_it_does_work():
    square = jnp.eye(4)
    f = lambda body: jax.lax.while_loop(lambda a: jnp.sum(a) < 9, body, square)
    assert counted(lambda: f(lambda a: a + 1)) == 0
    with pytest.raises(ValueError, match="unknown number of times"):
        counted(lambda: f(lambda a: a @ a))


def test_fused_attention_counts_as_the_plain_one(monkeypatch: pytest.MonkeyPatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    # Only traced: the checks of the device are what keeps it from being so on a CPU.
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    q = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 128, 4, 32), jnp.bfloat16)

    def f(kind: Any, *qkv: Any) -> Any:
        return jax.nn.dot_product_attention(*qkv, implementation=kind)

    plain, other = (functools.partial(f, kind) for kind in ("xla", "cudnn"))
    assert counted(other, q, k, k) == counted(plain, q, k, k)
    loss = lambda g, *qkv: jnp.sum(g(*qkv).astype(jnp.float32))
    grad = lambda g: jax.value_and_grad(functools.partial(loss, g), (0, 1, 2))
    grads = [counted(grad(g), q, k, k) for g in (plain, other)]
    # Forwards 2 products; backwards 4, and the scores once more in the fused kernel.
    assert grads[1] == grads[0] * 7 / 6

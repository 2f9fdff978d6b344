"""The memory that traced functions need, against what can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from idlora_jax import liveness

N = 1 << 16
X = jax.ShapeDtypeStruct((N,), jnp.float32)
SQUARE = jax.ShapeDtypeStruct((256, 256), jnp.float32)
SIZE = 4 * N
"""Bytes of either."""


def needed(f, *shapes):
    return liveness.temporary(jax.make_jaxpr(f)(*shapes))


def test_arguments_cost_nothing_and_results_their_size():
    assert needed(lambda x: x, X) == 0
    assert needed(lambda a, b: a @ b, SQUARE, SQUARE) == SIZE


def test_a_chain_of_products_holds_two_of_them_at_a_time():
    def f(a):
        for _ in range(6):
            a = a @ a
        return a

    assert needed(f, SQUARE) == 2 * SIZE


def test_elementwise_work_happens_in_place():
    assert needed(lambda a: jnp.tanh(jnp.exp(a @ a) + 1) * 2, SQUARE) == SIZE


def test_what_is_read_later_is_not_written_over():
    def f(a):
        y = a @ a
        return jnp.tanh(y) @ y

    assert needed(f, SQUARE) == 3 * SIZE


def test_a_wider_copy_is_made_where_it_is_reduced():
    narrow = jax.ShapeDtypeStruct((N,), jnp.bfloat16)
    assert needed(lambda x: jnp.sum(x.astype(jnp.float32)), narrow) <= 16


def test_an_operand_that_is_made_from_little_counts_where_a_product_reads_it():
    row = jax.ShapeDtypeStruct((256,), jnp.float32)

    def f(a, row):
        return a @ jnp.broadcast_to(row, (256, 256))

    assert needed(f, SQUARE, row) == 2 * SIZE


@pytest.mark.parametrize("rounds", [2, 50])
def test_a_loop_needs_its_carry_and_one_round(rounds):
    def f(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    stack = jax.ShapeDtypeStruct((rounds, 256, 256), jnp.float32)
    # The carry, its successor, and the matrix that is cut out.
    assert needed(f, SQUARE, stack) == 3 * SIZE


def test_a_loop_of_a_loop_keeps_what_does_not_change_from_round_to_round():
    def f(x, w):
        def inner(x, _):
            return x @ (w @ w), None

        return jax.lax.scan(inner, x, None, length=7)[0]

    assert needed(f, SQUARE, SQUARE) == 3 * SIZE


def test_what_a_loop_stacks_is_there_as_a_whole():
    def f(x):
        return jax.lax.scan(lambda c, _: (c, c * 2), x, None, length=5)[1]

    assert 5 * SIZE <= needed(f, X) <= 7 * SIZE


def test_a_branch_needs_what_the_larger_of_both_needs():
    def f(p, a):
        return jax.lax.cond(p, lambda a: jnp.sum((a @ a) @ a), lambda a: a[0, 0], a)

    flag = jax.ShapeDtypeStruct((), bool)
    assert 2 * SIZE <= needed(f, flag, SQUARE) <= 2 * SIZE + 64


def test_calls_are_looked_into():
    inner = jax.jit(lambda a: jax.checkpoint(lambda b: jnp.exp(b @ b))(a))
    assert needed(lambda a: inner(inner(a)), SQUARE) == 2 * SIZE


def test_what_is_given_away_is_written_over():
    def step(old, x):
        product = x @ x
        return old + jnp.tanh(product), product @ x

    traced = jax.make_jaxpr(step)(SQUARE, SQUARE)
    assert liveness.temporary(traced) == 3 * SIZE
    # The sum takes the place of what was given away.
    assert liveness.temporary(traced, donated=1) == 2 * SIZE


def test_what_is_given_away_and_read_later_stays():
    traced = jax.make_jaxpr(lambda old, x: (old + x @ x) @ old)(SQUARE, SQUARE)
    assert liveness.temporary(traced, donated=1) == 2 * SIZE

"""Compiled functions given shapes in place of arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape

from idlora_jax import programs

WEIGHT, X = np.ones((4, 3), np.float32), np.ones((2, 4), np.float32)


def scaled(factor: float, weight, x):
    return {"y": factor * (x @ weight), "n": jnp.int32(len(x))}


def program() -> programs.Program:
    return programs.jit(scaled, "scaled product", static_argnums=0)


def test_arrays_give_what_jit_gives():
    run, want = program(), jax.jit(scaled, static_argnums=0)(2.0, WEIGHT, X)
    with programs.collected() as rows:
        got = run(2.0, WEIGHT, X)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert rows == [] and run._cache_size() == 1


def test_a_shape_among_the_arguments_gives_zeros_of_the_results_shapes():
    with programs.collected() as rows:
        got = program()(2.0, Shape(WEIGHT.shape, WEIGHT.dtype), X)
    want = jax.eval_shape(lambda: scaled(2.0, WEIGHT, X))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want
    )
    assert not np.any(got["y"]) and not got["y"].committed
    (row,) = rows
    assert row.name == "scaled product"
    assert row.arguments == WEIGHT.nbytes + X.nbytes
    assert row.results >= got["y"].nbytes + got["n"].nbytes and row.compile_s > 0


def test_equal_arguments_compile_once_and_others_again():
    run, weight = program(), Shape(WEIGHT.shape, WEIGHT.dtype)
    with programs.collected() as rows:
        run(2.0, weight, X)
        run(2.0, weight, 3 * X)
        assert len(rows) == 1
        run(3.0, weight, X)
        run(2.0, weight, X[:1])
    assert len(rows) == 3


def test_results_are_held_to_devices_where_arguments_are():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weight = Shape(WEIGHT.shape, WEIGHT.dtype, sharding=one)
    assert program()(2.0, weight, X)["y"].committed


def test_the_table_has_a_line_for_each_program_and_one_for_all():
    with programs.collected() as rows:
        program()(2.0, Shape(WEIGHT.shape, WEIGHT.dtype), X)
    lines = programs.table(
        [rows[0]._replace(trace_s=1, compile_s=2, temporary=3e9)] * 2
    )
    assert lines.count("scaled product") == 2
    *_, row, last = lines.splitlines()
    assert row.split()[-5:-1] == ["1.00", "2.00", "8e-08", "3"]
    assert last.split() == ["together", "2.00", "4.00"]

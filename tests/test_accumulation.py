"""A batch in parts: what the parts are, and that a step takes the mean over them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
import toy_training as toy

from idlora_jax import (
    accumulation,
    adapters,
    experiment,
    flops,
    optimizers,
    strategies,
    training,
)
from idlora_jax.experiment import Optimizer
from idlora_jax.model import transformer

KEY = jax.random.key(0)
PLAIN = Optimizer(learning_rate=1e-2, schedule="constant")


def close(a: Any, b: Any, rtol: float = 1e-5) -> None:
    """Equal, relative to the largest value of each array."""

    def one(x: Any, y: Any) -> None:
        most = float(np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(most, 1e-12))

    jax.tree.map(one, a, b)


@pytest.mark.parametrize(("rows", "parts"), [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_which_rows_a_part_has(rows: int, parts: int):
    x = jnp.arange(rows * 2.0).reshape(rows, 2)
    got = accumulation.split({"x": x, "none": None}, parts)["x"]
    for part in range(parts):
        np.testing.assert_array_equal(got[part], x[part::parts])
        for index in range(rows // parts):
            np.testing.assert_array_equal(
                got[part, index], x[accumulation.row(part, index, parts)]
            )


def test_parts_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="batch of 4 clips, expected a multiple of 3"):
        accumulation.split(jnp.zeros((4, 2)), 3)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_mean_is_over_parts_and_their_numbers(parts: int):
    x = jnp.arange(6.0)
    f = lambda n, own: {"sum": own.sum() * (n + 1), "n": jnp.float32(n)}
    got = accumulation.mean(f, parts, accumulation.split(x, parts))
    sums = [float(x[n::parts].sum()) * (n + 1) for n in range(parts)]
    assert float(got["sum"]) == pytest.approx(sum(sums) / parts, rel=1e-6)
    assert float(got["n"]) == pytest.approx((parts - 1) / 2, rel=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_the_step_with_the_whole_batch(parts: int):
    """Where the parts count as many tokens each, which draws decide."""
    batch = toy.batch(0, 4)
    text = jax.tree.map(lambda x: jnp.repeat(x[:1], 4, axis=0), batch.prompt)
    batch = batch._replace(prompt=text)  # the toy adds its mean over the batch
    draws = strategies.draw(KEY, batch, toy.SPEC)
    draws = draws._replace(first_frame=jnp.ones(4, bool))
    tx = optimizers.make_optimizer(PLAIN, 10)
    found = []
    for count in (1, parts):
        task = toy.task(accumulation=count)
        state = training.init(toy.adapter(), toy.base(), tx)
        grads, metrics = training.gradients(task, KEY, state, toy.base(), batch, draws)
        step = training.make_train_step(task, tx, KEY)
        found.append((grads, metrics, step(state, toy.base(), batch, draws)[0].adapter))
    (whole, losses, moved), (grads, means, got) = found
    close(grads, whole)
    close(means, losses)
    # Adam divides by the size of a gradient: what is nearly 0 has no sign to speak of.
    close(got, moved, 1e-3)


def test_each_part_draws_as_a_batch_of_its_own():
    """Part n of step s is what batch s * parts + n would be without accumulation."""
    batch, base, parts = toy.batch(0, 4), toy.base(), 2
    task = toy.task(accumulation=parts, dropout=0.3)
    tx = optimizers.make_optimizer(PLAIN, 10)
    state = training.init(toy.adapter(), base, tx)
    state = state._replace(step=jnp.asarray(5, jnp.int32))
    got = training.gradients(task, KEY, state, base, batch)
    one, every = toy.task(dropout=0.3), []
    for part in range(parts):
        own = jax.tree.map(lambda x, n=part: x[n::parts], batch)
        before = state._replace(step=jnp.asarray(5 * parts + part, jnp.int32))
        every.append(training.gradients(one, KEY, before, base, own))
    close(got, jax.tree.map(lambda *x: sum(x) / parts, *every))
    assert float(every[0][1]["loss"]) != float(every[1][1]["loss"])


def test_equal_parts_make_the_step_of_one_of_them():
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), toy.batch(0))
    draws = strategies.draw(KEY, toy.batch(0), toy.SPEC)
    both = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), draws)
    tx = optimizers.make_optimizer(PLAIN, 10)
    given = training.init(toy.adapter(), toy.base(), tx), toy.base()
    want = training.gradients(toy.task(), KEY, *given, toy.batch(0), draws)
    got = training.gradients(toy.task(accumulation=2), KEY, *given, twice, both)
    close(got, want)


def test_one_part_that_is_not_finite_skips_the_step():
    batch = toy.batch(0, 4)
    assert batch.audio is not None
    bad = batch._replace(audio=batch.audio.at[3, 0, 0, 0].set(jnp.nan))
    tx = optimizers.make_optimizer(PLAIN, 10)
    step = training.make_train_step(toy.task(accumulation=4), tx, KEY)
    state = training.init(toy.adapter(), toy.base(), tx)
    kept = jax.tree.map(np.asarray, state)
    state, metrics = step(state, toy.base(), bad)
    assert metrics["skipped"] == 1 and int(state.step) == 1
    jax.tree.map(
        np.testing.assert_array_equal, kept._replace(step=0), state._replace(step=0)
    )


def of_transformer(parts: int) -> Any:
    """The step of a transformer of two layers as a jaxpr, one clip a part."""
    cfg, base = small.config("2.0"), small.base("2.0")
    task = training.Task(
        transformer.bind(cfg, remat="full"),
        functools.partial(transformer.prepare, cfg),
        experiment.Strategy(coin="sample", sigma="2.0"),
        accumulation=parts,
    )
    tx = optimizers.make_optimizer(PLAIN, 10)
    adapter = adapters.init(KEY, base, 2)
    state = jax.eval_shape(lambda: training.init(adapter, base, tx))
    batch = toy.batch(0, parts)._replace(prompt=small.prompt("2.0", batch=parts))
    step = training.make_train_step(task, tx, KEY)
    return step.trace(state, base, batch).jaxpr  # pyright: ignore


def test_parts_share_one_traced_body_and_cost_what_they_are():
    one, two, four = (of_transformer(n) for n in (1, 2, 4))
    work = [flops.count(step) for step in (one, two, four)]
    assert work[2] - work[1] == 2 * (work[1] - work[0])
    # Norms of the adapter are taken once.
    assert 0.98 * work[0] < work[1] - work[0] < work[0]
    assert len(str(four)) < 1.1 * len(str(one))


def test_the_setting_reaches_the_task():
    from idlora_jax import fitting, presets

    settings = presets.tiny_train()
    settings = dataclasses.replace(settings, optimizer=Optimizer(accumulation=3))
    settings = dataclasses.replace(settings, generation="2.0")
    settings = experiment.of_generation(settings, "2.0")
    task = fitting.task_for(settings, small.config("2.0"), 25.0)
    assert task.accumulation == 3
    assert settings.clips_per_step == 3 * settings.batch_size

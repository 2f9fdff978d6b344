"""What turns gradients into updates: methods, rates, clipping, averages."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from idlora_jax import optimizers
from idlora_jax.experiment import Ema, Optimizer

PLAIN = Optimizer(learning_rate=1e-2, schedule="constant", clip=None)
SETTINGS = {
    "adamw": PLAIN,
    "adamw8bit": dataclasses.replace(PLAIN, name="adamw8bit"),
    "lion": dataclasses.replace(PLAIN, name="lion"),
    "prodigy": dataclasses.replace(PLAIN, name="prodigy", learning_rate=1.0),
    "schedule_free": dataclasses.replace(PLAIN, name="schedule_free", warmup=3),
}
PAIR = {"kernel": {"a": jnp.full((3, 2), 0.5), "b": jnp.full((2, 3), -0.5)}}


def same(a: Any, b: Any, atol: float = 0.0) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def steps(tx: Any, params: Any, gradient: Any, count: int) -> list[tuple[Any, Any]]:
    """Parameters and states after each update."""
    state, out = tx.init(params), []
    update = jax.jit(tx.update)
    for n in range(count):
        updates, state = update(gradient(params, n), state, params)
        params = optax.apply_updates(params, updates)
        out.append((params, state))
    return out


def pull(params: Any, n: int) -> Any:
    """Towards 1, at a pace that differs from step to step."""
    return jax.tree.map(lambda p: (1 + n % 3) * (p - 1), params)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_walks_towards_the_minimum(name: str):
    tx = optimizers.make_optimizer(SETTINGS[name], 100)
    params, state = steps(tx, PAIR, pull, 40)[-1]
    off = lambda tree: float(optax.tree.norm(jax.tree.map(lambda p: p - 1, tree)))
    assert off(optimizers.evaluated(state, params)) < 0.95 * off(PAIR)


def test_the_methods_are_those_of_the_settings():
    names = typing.get_args(typing.get_type_hints(Optimizer)["name"])
    assert set(names) == set(optimizers.METHODS) == set(SETTINGS)


def test_clipping_bounds_what_reaches_the_method():
    settings = dataclasses.replace(PLAIN, clip=1.0, betas=(0.0, 0.0), eps=1.0)
    tx: Any = optimizers.make_optimizer(settings, 10)
    grads = jax.tree.map(jnp.ones_like, PAIR)
    updates, _ = tx.update(grads, tx.init(grads), jax.tree.map(jnp.zeros_like, grads))
    # With eps 1 and no decay an update is rate g / (|g| + 1): g / |all g| after clip.
    g = 1 / np.sqrt(12)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, -1e-2 * g / (g + 1), rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion"])
def test_weight_decay_is_decoupled(name: str):
    settings = dataclasses.replace(SETTINGS[name], weight_decay=0.5)
    tx: Any = optimizers.make_optimizer(settings, 10)
    zero = jax.tree.map(jnp.zeros_like, PAIR)
    updates, _ = tx.update(zero, tx.init(PAIR), PAIR)
    same(updates, jax.tree.map(lambda p: -1e-2 * 0.5 * p, PAIR), atol=1e-8)


@pytest.mark.parametrize("name", ["adamw", "lion", "schedule_free"])
def test_b_may_have_a_rate_of_its_own(name: str):
    """As two optimizers would: b moves by that of the larger rate, a by the other."""
    settings = SETTINGS[name]
    ratio = dataclasses.replace(settings, b_ratio=4.0)
    larger = dataclasses.replace(settings, learning_rate=4e-2)
    fixed = lambda params, n: jax.tree.map(lambda p: jnp.cos(n + p * 0), params)
    got, slow, fast = (
        steps(optimizers.make_optimizer(s, 100), PAIR, fixed, 5)[-1][0]["kernel"]
        for s in (ratio, settings, larger)
    )
    same(got["a"], slow["a"], atol=1e-7)
    same(got["b"], fast["b"], atol=1e-6)
    assert np.abs(np.asarray(got["b"] - slow["b"])).max() > 1e-3


def test_the_average_follows_what_is_trained():
    tx = optimizers.make_optimizer(PLAIN, 100, ema=Ema(0.9, start=2))
    walked = steps(tx, PAIR, pull, 5)
    same(optimizers.averaged(walked[1][1]), walked[1][0])
    want = walked[1][0]
    for params, state in walked[2:]:
        want = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, want, params)
        same(optimizers.averaged(state), want, atol=1e-7)
    # What is trained does not depend on it.
    alone = optimizers.make_optimizer(PLAIN, 100)
    same(walked[-1][0], steps(alone, PAIR, pull, 5)[-1][0], atol=1e-7)
    assert optimizers.averaged(steps(alone, PAIR, pull, 1)[0][1]) is None


def test_schedule_free_is_evaluated_at_the_mean_of_its_steps():
    settings = dataclasses.replace(SETTINGS["schedule_free"], warmup=0)
    walked = steps(optimizers.make_optimizer(settings, 100), PAIR, pull, 6)
    found = [
        optimizers._find(state, optax.contrib.ScheduleFreeState).z
        for _, state in walked
    ]
    mean = jax.tree.map(lambda *z: sum(z) / len(z), *found)
    params, state = walked[-1]
    same(optimizers.evaluated(state, params), mean, atol=1e-6)
    assert float(optax.tree.norm(optax.tree.sub(params, mean))) > 1e-4


def test_other_methods_are_evaluated_where_they_are():
    params, state = steps(optimizers.make_optimizer(PLAIN, 10), PAIR, pull, 1)[0]
    assert optimizers.evaluated(state, params) is params


@pytest.mark.parametrize("name", SETTINGS)
def test_a_state_shares_no_memory_with_what_is_trained(name: str):
    """Both are donated, which one array cannot be twice."""
    params = jax.tree.map(jnp.copy, PAIR)
    tx = optimizers.make_optimizer(SETTINGS[name], 10, ema=Ema(0.5))
    arrays = jax.tree.leaves((params, tx.init(params)))
    places = [a.unsafe_buffer_pointer() for a in arrays if a.size]
    assert len(places) == len(set(places))


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("linear", (1.0, 0.55, 0.1)),
        ("constant", (1.0,) * 3),
        ("cosine", (1, 0.55, 0.1)),
        ("restarts", (1, 0.55, 1)),
        ("polynomial", (1, 0.325, 0.1)),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: Any, want: tuple):
    settings = Optimizer(learning_rate=1.0, schedule=schedule, power=2.0, cycle=10)
    rate = optimizers.learning_rate(settings, 10)
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], want, rtol=1e-6)
    late = optimizers.learning_rate(dataclasses.replace(settings, warmup=4), 14)
    np.testing.assert_allclose([late(4), late(9), late(14)], want, rtol=1e-6)
    np.testing.assert_allclose([late(0), late(3)], [0, 0.75], rtol=1e-6)


def test_restarts_come_four_times_unless_said():
    settings = Optimizer(learning_rate=1.0, schedule="restarts", end_factor=0.0)
    rate = optimizers.learning_rate(settings, 40)
    got = [float(rate(n)) for n in (0, 9, 10, 20, 30, 39)]
    np.testing.assert_allclose(np.array(got) > 0.9, [1, 0, 1, 1, 1, 0])


def test_a_warmup_of_all_steps_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.warmup: got 10 of 10 steps"):
        optimizers.learning_rate(Optimizer(warmup=10), 10)

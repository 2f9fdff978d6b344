"""Training states: bitwise round trips, what stays, and what a failure leaves."""

from __future__ import annotations

import os
import resource
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import states

STATE = {"a": jnp.arange(6.0), "step": jnp.int32(3)}


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def numbers(folder: Any) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


def test_a_training_state_comes_back_bitwise(tmp_path):
    assert states.latest(tmp_path / "state") is None
    with states.opened(tmp_path / "state", keep=2) as out:
        for step in (1, 2, 3):
            out.save(step, STATE, {"n": step})
    assert states.latest(tmp_path / "state") == 3
    assert states.meta_of(tmp_path / "state", 2) == {"n": 2, "data": None}
    same(states.restore(tmp_path / "state", 3, STATE), STATE)
    with pytest.raises(ValueError, match="damaged or of another adapter"):
        states.restore(tmp_path / "state", 3, {"a": jnp.zeros((7, 2))})


@pytest.mark.parametrize("data", [b"\x00\xff", {"epoch": 2, "at": [1, 2]}])
def test_the_position_of_a_reader_comes_back(tmp_path, data):
    with states.opened(tmp_path, keep=1) as out:
        out.save(1, STATE, {}, data=data)
    assert states.meta_of(tmp_path, 1)["data"] == data


def test_a_state_may_be_donated_while_it_is_being_written(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = {"a": jnp.zeros(200_000), "b": [jnp.zeros(3)]}
    with states.opened(tmp_path, keep=9) as out:
        for n in range(5):
            out.save(n, state, {})
            state = step(step(state))
    for n in range(5):
        same(states.restore(tmp_path, n, state), jax.tree.map(
            lambda a, n=n: np.full(a.shape, 2 * n, a.dtype), state
        ))  # fmt: skip


def test_the_newest_and_the_best_stay(tmp_path):
    losses = {1: 0.5, 2: 0.1, 3: None, 4: float("nan"), 5: 0.3, 6: None}
    with states.opened(tmp_path, keep=1, keep_best=1) as out:
        for step, loss in losses.items():
            out.save(step, STATE, {}, loss=loss)
    assert numbers(tmp_path) == [2, 6]
    with states.opened(tmp_path, keep=1, keep_best=1) as out:
        out.save(7, STATE, {}, loss=0.05)
        out.save(8, STATE, {}, loss=0.2)
    assert numbers(tmp_path) == [7, 8]


def test_the_newest_stays_though_others_are_better(tmp_path):
    with states.opened(tmp_path, keep=1, keep_best=2) as out:
        for step in (1, 2, 3, 4):
            out.save(step, STATE, {}, loss=float(step))
    assert numbers(tmp_path) == [1, 2, 4]


def test_a_step_that_is_there_is_left_alone(tmp_path):
    done: list[int] = []
    for value in (1.0, 2.0):
        with states.opened(tmp_path, keep=1) as out:
            out.save(3, {"a": jnp.full(2, value)}, {}, beside=(lambda: done.append(3),))
    same(states.restore(tmp_path, 3, {"a": jnp.zeros(2)}), {"a": np.ones(2)})
    assert done == [3, 3]


def test_what_a_kill_left_half_written_is_ignored_and_removed(tmp_path):
    with states.opened(tmp_path, keep=2) as out:
        out.save(1, STATE, {})
        out.save(2, STATE, {})
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    shutil.rmtree(tmp_path / "1" / "state")  # half-deleted
    assert states.latest(tmp_path) == 2
    with states.opened(tmp_path, keep=2) as out:
        out.save(3, STATE, {})
    assert numbers(tmp_path) == [2, 3]


@pytest.fixture
def small_disk():
    """Files may have 64 kB and no more, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_and_the_states_before_stay(tmp_path, small_disk):
    noise = np.random.default_rng(0).normal(size=100_000)
    large = {"a": jnp.asarray(noise, jnp.float32)}
    with states.opened(tmp_path, keep=1) as out:
        out.save(1, STATE, {})
    with (
        pytest.raises(OSError, match=r"after 2 steps in .* still there: free some"),
        states.opened(tmp_path, keep=1) as out,
    ):
        out.save(2, large, {})
    assert states.latest(tmp_path) == 1
    same(states.restore(tmp_path, 1, STATE), STATE)
    with states.opened(tmp_path, keep=1) as out:
        out.save(2, STATE, {})
    assert numbers(tmp_path) == [2]


def test_what_fails_in_the_background_is_told_by_the_next_check(tmp_path):
    def full() -> None:
        raise OSError(28, "could not write b: No space left on device")

    with (
        pytest.raises(OSError, match="could not write b"),
        states.opened(tmp_path, keep=1) as out,
    ):
        out.save(1, STATE, {}, beside=(full,))
        for _ in range(10_000):
            out.check()
            os.sched_yield()
    assert states.latest(tmp_path) == 1

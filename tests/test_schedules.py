"""Sigma tables and learning rates."""

from typing import Any

import jax
import numpy as np
import pytest

from idlora_jax import schedules

TABLES = {
    "ltx2": schedules.ltx2,
    "linear_quadratic": schedules.linear_quadratic,
    "beta": schedules.beta,
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_tables_fall_from_one_to_zero_in_steps(name: str, steps: int):
    table = TABLES[name](steps)
    assert table.shape == (steps + 1,)
    assert table.dtype == np.float32
    assert table[0] == pytest.approx(1.0)
    assert table[-1] == 0
    assert np.all(np.diff(table) < 0)


def test_last_sigma_above_zero_is_the_terminal():
    for tokens in (18, 4096, 37200):
        table = schedules.ltx2(30, tokens=tokens, terminal=0.2)
        assert table[-2] == pytest.approx(0.2, abs=1e-6)


def test_more_tokens_mean_more_noise():
    few, many = (schedules.ltx2(10, tokens=n)[1:-2] for n in (1024, 4096))
    assert np.all(many > few)


def test_shift_is_linear_in_tokens_and_extrapolates():
    assert schedules.shift(1024) == pytest.approx(0.95)
    assert schedules.shift(4096) == pytest.approx(2.05)
    assert schedules.shift(7168) == pytest.approx(3.15)


def test_ltx2_equals_published_values():
    want = [0.9949570298194885, 0.9896030426025391, 0.9839084148406982]
    reference = schedules.ltx2(30, numerics="reference")
    np.testing.assert_array_equal(reference[1:4], np.float32(want))
    assert reference[0] == np.float32(0.99999994)
    np.testing.assert_allclose(schedules.ltx2(30), reference, atol=3e-7)
    assert schedules.ltx2(30)[0] == 1


def test_distilled_tables_share_their_end():
    np.testing.assert_array_equal(
        schedules.distilled()[-4:], schedules.stage2_distilled()
    )
    assert len(schedules.distilled()) == 9


def test_linear_quadratic_joins_smoothly():
    table = schedules.linear_quadratic(40, 20).astype(np.float64)
    slopes = -np.diff(table)
    np.testing.assert_allclose(slopes[:20], 0.025 / 20, atol=1e-6)
    np.testing.assert_allclose(np.diff(slopes[20:]), np.diff(slopes[20:])[0], atol=1e-6)
    assert slopes[20] > slopes[19]


def test_very_fine_beta_table_keeps_equal_levels_once():
    table = schedules.beta(3000, levels=1000)
    assert len(table) < 3001
    assert np.all(np.diff(table) < 0)


@pytest.mark.parametrize("name", TABLES)
def test_no_steps_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name}: steps must be at least 1, got 0"):
        TABLES[name](0)


def test_too_many_linear_steps_are_refused():
    with pytest.raises(ValueError, match=r"must be in 1..4, got 5"):
        schedules.linear_quadratic(4, 5)


def values(rate: Any, *steps: int) -> list[float]:
    return [float(rate(step)) for step in steps]


def test_linear_decay_ends_at_a_tenth_and_stays():
    lr = schedules.linear_decay(2e-4, 10)
    want = [2e-4, 1.46e-4, 1.1e-4, 2e-5, 2e-5]
    np.testing.assert_allclose(values(lr, 0, 3, 5, 10, 99), want, rtol=1e-6)


def test_cosine_falls_along_half_a_wave():
    lr = schedules.cosine(2e-4, 10)
    want = [2e-4, 1.5877852522924732e-4, 1e-4, 0, 0]
    np.testing.assert_allclose(values(lr, 0, 3, 5, 10, 12), want, rtol=1e-6, atol=1e-11)
    lr = schedules.cosine(1.0, 16, end_factor=0.1)
    np.testing.assert_allclose(values(lr, 0, 8, 16), [1, 0.55, 0.1], rtol=1e-6)


def test_restarts_begin_anew_after_each_cycle():
    lr = schedules.restarts(2e-4, 12, cycle=4, growth=2, end_factor=0.25)
    want = [2e-4, 1.7803300858899106e-4, 7.196699141100895e-5, 2e-4]
    want += [1.9429096493834652e-4, 5.5709035061653496e-5, 2e-4]
    got = values(lr, 0, 1, 3, 4, 5, 11, 12)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lr)(5), want[4], rtol=1e-6)
    with pytest.raises(ValueError, match="restarts: steps must be at least 1, got 0"):
        schedules.restarts(1.0, 12, cycle=0)


def test_polynomial_falls_as_a_power():
    lr = schedules.polynomial(2e-4, 10, power=2)
    want = [2e-4, 9.8e-5, 2e-6, 0, 0]
    np.testing.assert_allclose(values(lr, 0, 3, 9, 10, 20), want, rtol=1e-5, atol=1e-11)


def test_a_warmup_rises_to_the_first_value_of_what_follows():
    lr = schedules.warmed(schedules.cosine(1.0, 16, end_factor=0.1), 4)
    np.testing.assert_allclose(
        values(lr, 0, 2, 4, 12, 20), [0, 0.5, 1, 0.55, 0.1], atol=1e-6
    )
    same = schedules.constant(3e-4)
    assert schedules.warmed(same, 0) is same


def test_constant_is_constant():
    lr = schedules.constant(3e-4)
    assert lr(0) == lr(1000) == 3e-4


@pytest.mark.parity
def test_learning_rates_equal_those_of_torch():
    torch = pytest.importorskip("torch")
    kinds = torch.optim.lr_scheduler
    base, steps = 2e-4, 24
    rows = [
        (
            schedules.linear_decay(base, steps),
            lambda o: kinds.LinearLR(o, 1.0, 0.1, steps),
        ),
        (
            schedules.cosine(base, steps),
            lambda o: kinds.CosineAnnealingLR(o, steps, 0.0),
        ),
        (
            schedules.restarts(base, steps, cycle=6, end_factor=0.25),
            lambda o: kinds.CosineAnnealingWarmRestarts(o, 6, 1, 5e-5),
        ),
        (
            schedules.restarts(base, steps, cycle=3, growth=2, end_factor=0.25),
            lambda o: kinds.CosineAnnealingWarmRestarts(o, 3, 2, 5e-5),
        ),
        (
            schedules.polynomial(base, steps, power=1.5),
            lambda o: kinds.PolynomialLR(o, steps, 1.5),
        ),
    ]
    for ours, make in rows:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
        theirs = make(optimizer)
        for step in range(steps):
            want = optimizer.param_groups[0]["lr"]
            np.testing.assert_allclose(ours(step), want, rtol=2e-6, atol=1e-11)
            optimizer.step()
            theirs.step()

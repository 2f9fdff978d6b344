"""Sigma tables and learning rates."""

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


def test_linear_decay_ends_at_a_tenth_and_stays():
    lr = schedules.linear_decay(2e-4, 10)
    got = [float(lr(step)) for step in (0, 5, 10, 99)]
    np.testing.assert_allclose(got, [2e-4, 1.1e-4, 2e-5, 2e-5], rtol=1e-6)


def test_cosine_rises_over_the_warmup_then_falls():
    lr = schedules.cosine(1.0, 20, warmup=4, end_factor=0.1)
    got = [float(lr(step)) for step in (0, 2, 4, 12, 20)]
    np.testing.assert_allclose(got, [0, 0.5, 1, 0.55, 0.1], atol=1e-6)
    assert float(schedules.cosine(1.0, 20)(0)) == 1
    with pytest.raises(ValueError, match="warmup must be below steps"):
        schedules.cosine(1.0, 4, warmup=4)


def test_constant_is_constant():
    lr = schedules.constant(3e-4)
    assert lr(0) == lr(1000) == 3e-4

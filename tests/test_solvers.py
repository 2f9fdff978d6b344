"""Orders of convergence, exactness, and what the tables hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import gaussian, gaussian_path, toy_pair

from idlora_jax import denoise, schedules, solvers
from idlora_jax.types import AV, each

SOLVERS = {
    "euler": solvers.euler(),
    "gradient": solvers.gradient_estimation(),
    "res2s": solvers.res2s(),
    "res2s, no refinement": solvers.res2s(bong=False),
    "res2s, no noise": solvers.res2s(eta=0),
}


def error(solver: solvers.Solver, steps: int) -> float:
    """Distance to the exact flow from sigma 1 to 0.3."""
    sigmas = np.linspace(1, 0.3, steps + 1)
    pair = toy_pair()
    done = denoise.sample(gaussian, solver, sigmas, pair)
    off = each(lambda s, d: jnp.abs(gaussian_path(s.x, 0.3) - d.x).max(), pair, done)
    return float(max(off))


def slope(solver: solvers.Solver, steps: list[int]) -> float:
    """Order of convergence: the slope of log error over log step size."""
    errors = [error(solver, n) for n in steps]
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def test_euler_converges_with_order_one():
    assert slope(solvers.euler(), [8, 16, 32, 64]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("bong", [True, False])
def test_res2s_without_noise_converges_with_order_two(bong: bool):
    solver = solvers.res2s(eta=0, bong=bong)
    assert slope(solver, [4, 8, 16, 32]) == pytest.approx(2.0, abs=0.25)


def test_gradient_estimation_with_gamma_one_is_euler():
    sigmas = schedules.ltx2(6)
    plain, same = (
        denoise.sample(gaussian, s, sigmas, toy_pair())
        for s in (solvers.euler(), solvers.gradient_estimation(1))
    )
    each(lambda a, b: np.testing.assert_array_equal(a.x, b.x), plain, same)


@pytest.mark.parametrize("name", SOLVERS)
def test_at_sigma_zero_x_is_the_last_prediction(name: str):
    done, seen = denoise.sample(
        gaussian,
        SOLVERS[name],
        schedules.ltx2(4),
        toy_pair(),
        jax.random.key(0),
        record=True,
    )
    each(lambda s, x0: np.testing.assert_array_equal(s.x, x0[-1]), done, seen.x0)


@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_tokens_stay_clean_at_every_call(name: str):
    pair = toy_pair(fixed=2)
    done, seen = denoise.sample(
        gaussian, SOLVERS[name], schedules.ltx2(4), pair, jax.random.key(0), record=True
    )
    for part in (*seen.x, *seen.x0):
        np.testing.assert_array_equal(part[:, :, -2:], 3.0)
    each(lambda s: np.testing.assert_array_equal(s.x[:, -2:], 3.0), done)


def test_res2s_calls_the_model_twice_a_step_and_once_at_the_end():
    table = solvers.res2s().table(schedules.stage2_distilled())
    assert len(table.sigma) == 2 * 3 + 1
    np.testing.assert_array_equal(table.step, [0, 0, 1, 1, 2, 2, 2])
    assert table.sigma[-1] == np.float32(0.0011)
    middles = np.sqrt(table.sigma[0:6:2] * table.sigma[2:7:2])
    np.testing.assert_allclose(table.sigma[1:6:2], middles, rtol=1e-6)
    open_end = solvers.res2s().table(np.array([1.0, 0.5, 0.2]))
    assert len(open_end.sigma) == 4


def test_res2s_refines_only_short_steps_above_the_smallest_sigmas():
    table = solvers.res2s().table(np.array([1.0, 0.7, 0.2, 0.025, 0.02]))
    np.testing.assert_array_equal(table.rows.fresh[1::2], [True, False, False, False])
    without = solvers.res2s(bong=False).table(np.array([1.0, 0.7, 0.2]))
    assert not without.rows.fresh[1::2].any()


def test_refinement_equals_a_hundred_iterations():
    a, m, d = np.random.default_rng(0).normal(size=(3, 5))
    sigma, after = 0.9, 0.7
    c = 1 - np.sqrt(after / sigma)
    for _ in range(100):
        a = m - c * (d - a)
    g = solvers.res2s().table(np.array([sigma, after])).rows.g[1]
    np.testing.assert_allclose(m + g * (m - d), a, rtol=1e-6)


def test_res2s_tableau_is_consistent_and_of_order_two():
    h = np.array([0.01, 0.3, 2.0])
    a21, b1, b2 = solvers.res2s_coefficients(h)
    np.testing.assert_allclose(h * (b1 + b2), 1 - np.exp(-h))
    np.testing.assert_allclose(h * a21, 1 - np.exp(-h / 2))
    # Both stages agree on a denoised value that is linear in the time -log(sigma).
    np.testing.assert_allclose(b2 / 2, (np.exp(-h) - 1 + h) / h**2, rtol=1e-9)


def test_swapped_noise_keeps_the_variance():
    alpha, down, up = solvers.sde_coefficients(np.array([0.1, 0.5, 0.9]))
    after = np.array([0.1, 0.5, 0.9])
    np.testing.assert_allclose((alpha * down) ** 2 + up**2, after**2)
    np.testing.assert_allclose(alpha * (1 - down), 1 - after)


def test_normalised_noise_has_no_mean_and_unit_deviation():
    noise = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 6, 4))
    x = solvers.normalise(noise)
    np.testing.assert_allclose(x.mean((1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(x.std((1, 2), ddof=1), 1, rtol=1e-6)
    whole = (noise - noise.mean()) / noise.std()
    np.testing.assert_allclose(solvers.normalise(whole), x, atol=1e-5)


def test_stochastic_res2s_keeps_mean_and_deviation_of_the_data():
    x = jax.random.normal(jax.random.key(3), (2, 256, 16))
    base = toy_pair().video
    s = base._replace(
        x=x, clean=x, denoise=jnp.ones((2, 256), bool), is_ref=jnp.zeros((2, 256), bool)
    )
    sigmas = schedules.ltx2(20)
    done = denoise.sample(
        gaussian, solvers.res2s(), sigmas, AV(s, None), jax.random.key(4)
    )
    assert float(done.video.x.mean()) == pytest.approx(0.4, abs=0.03)
    assert float(done.video.x.std()) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "at least 2 values"),
        ([0.5, 1.0], "must fall"),
        ([1.0, 0.0, 0.0], "only the last may be 0"),
        ([1.0, -0.1], "must fall and be positive"),
        ([1.0, float("nan")], "must fall"),
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_impossible_sigmas_are_refused(name: str, sigmas: list, message: str):
    with pytest.raises(ValueError, match=message):
        SOLVERS[name].table(np.array(sigmas))


def test_res2s_refuses_equal_sigmas_which_euler_takes():
    sigmas = np.array([1.0, 1.0, 0.5])
    np.testing.assert_array_equal(solvers.euler().table(sigmas).rows.ratio, [1, 0.5])
    with pytest.raises(ValueError, match="strictly"):
        solvers.res2s().table(sigmas)


def test_only_noise_below_all_is_accepted():
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\), got 1"):
        solvers.res2s(eta=1)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.model import antialias

TAPS = antialias.phases(jnp.asarray(antialias.lowpass()))


def noise(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def variables(width, own_beta=True):
    names = ("alpha", "beta") if own_beta else ("alpha",)
    made = {n: 0.3 * noise(width, seed=i) for i, n in enumerate(names)}
    filters = {
        f"{way}_filter": jnp.asarray(antialias.lowpass()) for way in ("up", "down")
    }
    return {"params": made | filters}


def test_the_filter_is_even_sums_to_one_and_has_the_files_values():
    taps = antialias.lowpass()[:, 0, 0]
    np.testing.assert_array_equal(taps, taps[::-1])
    np.testing.assert_allclose(taps.sum(), 1, atol=1e-6)
    want = [0.00202896, 0.00938947, -0.02554346, -0.05765738, 0.1285726, 0.4432098]
    np.testing.assert_allclose(taps[:6], want, rtol=1e-5)


def test_a_constant_stays_constant_through_both_filters_up_to_the_edges():
    x = jnp.broadcast_to(jnp.array([-2.0, 0.5]), (1, 5, 2))
    high = antialias.interpolate(x, 2 * TAPS[::-1])
    np.testing.assert_allclose(high, jnp.repeat(x, 2, axis=1), rtol=1e-6)
    np.testing.assert_allclose(antialias.decimate(high, TAPS), x, rtol=1e-6)


def test_the_activation_of_a_constant_is_the_snake_of_it():
    given = variables(2)
    x = jnp.broadcast_to(jnp.array([-2.0, 0.5]), (1, 4, 2))
    own = given["params"]
    want = antialias.snake(x, own["alpha"], own["beta"])
    np.testing.assert_allclose(antialias.Snake().apply(given, x), want, rtol=1e-5)


def test_a_snake_is_the_identity_with_a_ripple():
    x = jnp.array([0, 0.5, 1, 1.5]).reshape(1, 4, 1)
    frequency, damping = jnp.log(jnp.array([[jnp.pi], [2.0]]))
    ripple = antialias.snake(x, frequency, damping) - x
    np.testing.assert_allclose(ripple[0, :, 0], [0, 0.5, 0, 0.5], atol=1e-6)


@pytest.mark.parametrize(("many", "size"), [(2, 7), (3, 5)])
def test_decimation_is_the_adjoint_of_interpolation(many, size):
    taps = noise(size, many)
    x = noise(1, 20, 3, seed=1).at[:, :5].set(0).at[:, -5:].set(0)
    y = noise(1, 20 * many, 3, seed=2)
    y = y.at[:, : 5 * many].set(0).at[:, -5 * many :].set(0)
    one = jnp.vdot(antialias.interpolate(x, taps), y)
    other = jnp.vdot(x, antialias.decimate(y, taps[::-1]))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_channels_do_not_mix():
    given, x = variables(3), noise(1, 6, 3)
    order = jnp.array([2, 0, 1])
    own = given["params"]
    permuted = own | {n: own[n][order] for n in ("alpha", "beta")}
    got = antialias.Snake().apply({"params": permuted}, x[..., order])
    want = antialias.Snake().apply(given, x)[..., order]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_without_a_beta_of_its_own_a_snake_takes_alpha():
    given, x = variables(3, own_beta=False), noise(1, 6, 3)
    both = given["params"] | {"beta": given["params"]["alpha"]}
    got = antialias.Snake(own_beta=False).apply(given, x)
    np.testing.assert_array_equal(got, antialias.Snake().apply({"params": both}, x))


def test_an_overtone_above_the_highest_frequency_comes_back_four_times_weaker():
    """sin^2 of a tone at 0.35 of the rate lies at 0.7, which samples show at 0.3."""
    x = jnp.sin(2 * np.pi * 0.35 * jnp.arange(400)).reshape(1, 400, 1)
    given = variables(1)
    own = given["params"] = given["params"] | {"alpha": jnp.zeros(1)}

    def alias(y):
        return np.abs(np.fft.rfft(np.asarray(y)[0, 100:300, 0]))[60]

    plain = antialias.snake(x, own["alpha"], own["beta"])
    assert alias(antialias.Snake().apply(given, x)) < 0.25 * alias(plain)

"""Predictions, the one step body, and how often it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from idlora_jax import denoise, geometry, guidance, schedules, solvers, streams
from idlora_jax.types import AV, AudioGrid, Branch, each

TERMS = (guidance.text_cfg(), guidance.identity(), guidance.stg([0]))
SCALES = {"text": (3, 7), "identity": (0, 3), "stg": (1, 1)}
SOLVERS = {
    "euler": solvers.euler(),
    "gradient": solvers.gradient_estimation(),
    "res2s": solvers.res2s(),
}


def pair() -> AV:
    """Video with its first frame given, audio with a reference."""
    grid = geometry.video_grid(9, 64, 32, 25)
    keys = jax.random.split(jax.random.key(0), 5)
    video = streams.target(None, grid, batch=2, channels=4)
    video = streams.fix_first_frame(video, jax.random.normal(keys[0], (2, 2, 4)))
    audio = streams.target(None, AudioGrid(5), batch=2, channels=4)
    ref = jax.random.normal(keys[1], (2, 3, 4))
    audio = streams.add_reference(audio, ref, geometry.reference_positions(3))
    noise = AV(
        *(
            jax.random.normal(k, (2, n, 4))
            for k, n in zip(keys[2:4], (4, 8), strict=True)
        )
    )
    return each(lambda s, n: streams.noise(s, n, jnp.ones(2)), AV(video, audio), noise)


def denoiser(terms: tuple = TERMS, apply=toys.apply, scale: float = 0.5, **kwargs):
    return denoise.make_denoiser(
        apply,
        toys.variables(scale),
        toys.prepared(),
        terms,
        AV(4, 5),
        depth=2,
        **kwargs,
    )


def scales(*names: str) -> dict:
    return {name: SCALES[name] for name in names}


def close(a: AV, b: AV, atol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_x0_undoes_the_noise_where_denoised_and_keeps_the_rest():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
    sigma = jnp.array([0.3, 0.9])
    mask = jnp.array([[True, True, False]] * 2)
    x = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
    velocity = (noise - clean).at[:, 2].set(jnp.nan)
    x0 = denoise.to_x0(x, velocity, mask, sigma)
    np.testing.assert_allclose(x0[:, :2], clean[:, :2], atol=1e-6)
    np.testing.assert_array_equal(x0[:, 2], x[:, 2])


def test_x0_of_bf16_velocities_is_computed_in_float32():
    x, v = jax.random.normal(jax.random.key(0), (2, 1, 3, 4))
    v = v.astype(jnp.bfloat16)
    x0 = denoise.to_x0(x, v, jnp.ones((1, 3), bool), jnp.ones(1))
    np.testing.assert_array_equal(x0, x - v.astype(jnp.float32))


def test_pin_puts_clean_back_over_nan():
    s = pair().audio
    pinned = denoise.pin(jnp.full_like(s.x, jnp.nan), s)
    np.testing.assert_array_equal(pinned[:, 5:], s.clean[:, 5:])
    assert jnp.isnan(pinned[:, :5]).all()


def test_predictions_of_every_branch_keep_fixed_tokens_clean():
    passes = guidance.branches(TERMS, 2)
    args = toys.variables(), toys.prepared(), pair(), jnp.float32(0.7), passes
    x0 = denoise.predict(toys.apply, *args, targets=AV(4, 5))
    assert len(x0) == 4
    for branch in x0:
        np.testing.assert_array_equal(branch.video[:, :2], pair().video.clean[:, :2])
        np.testing.assert_array_equal(branch.audio[:, 5:], pair().audio.clean[:, 5:])


def test_a_denoiser_shows_the_predictions_it_combines():
    passes = guidance.branches(TERMS, 2)
    args = toys.variables(), toys.prepared(), pair(), jnp.float32(0.7), passes
    want = denoise.predict(toys.apply, *args, targets=AV(4, 5))
    got = denoise.predictions(denoiser(), pair(), jnp.float32(0.7))
    for a, b in zip(got, want, strict=True):
        close(a, b, 0)


def test_apply_gets_levels_branches_targets_and_mode():
    seen = {}

    def apply(variables, prepared, streams, sigma, branches, *, targets, mode):
        seen.update(sigma=sigma, branches=branches, targets=targets, mode=mode)
        return toys.apply(
            variables, prepared, streams, sigma, branches, targets=targets, mode=mode
        )

    positive = Branch(video_sees_ref=False)
    d = denoiser(apply=apply, positive=positive, branches="batch")
    d(pair(), jnp.float32(0.5), jnp.ones((3, 2)), ())
    each(lambda x: np.testing.assert_array_equal(x, [0.5, 0.5]), seen["sigma"])
    assert seen["branches"] == guidance.branches(TERMS, 2, positive)
    assert (seen["targets"], seen["mode"]) == (AV(4, 5), "batch")


def test_a_branch_without_reference_leaks_nothing():
    weights = jnp.asarray(guidance.weights(TERMS, SCALES, 1)[0])
    x0, _ = denoiser()(pair(), jnp.float32(0.7), weights, ())
    assert all(jnp.isfinite(x).all() for x in x0)


def test_without_terms_the_positive_prediction_is_pinned_and_returned():
    args = toys.variables(), toys.prepared(), pair(), jnp.float32(0.7), (Branch(),)
    (want,) = denoise.predict(toys.apply, *args, targets=AV(4, 5))
    got, memory = denoiser(())(pair(), jnp.float32(0.7), jnp.zeros((0, 2)), ())
    close(got, want)
    assert memory == ()


@pytest.mark.parametrize("name", SOLVERS)
def test_weight_zero_terms_equal_absent_terms(name: str):
    sigmas, key = schedules.ltx2(3), jax.random.key(1)
    off = scales("text") | {"identity": (0, 0), "stg": (0, 0)}
    got = denoise.sample(
        denoiser(),
        SOLVERS[name],
        sigmas,
        pair(),
        key,
        weights=guidance.weights(TERMS, off, 3),
    )
    want = denoise.sample(
        denoiser(TERMS[:1]),
        SOLVERS[name],
        sigmas,
        pair(),
        key,
        weights=guidance.weights(TERMS[:1], scales("text"), 3),
    )
    close(got, want, 1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_sample_equals_iterate_and_yields_once_a_step(name: str):
    weights = guidance.weights(TERMS, SCALES, 3)
    args = denoiser(), SOLVERS[name], schedules.ltx2(3), pair(), jax.random.key(1)
    done = denoise.sample(*args, weights=weights)
    states = [s for s, _ in denoise.iterate(*args, weights=weights)]
    assert len(states) == 3
    close(states[-1], done, 1e-5)


def test_fixed_tokens_survive_sampling_bit_for_bit():
    weights = guidance.weights(TERMS, SCALES, 3)
    done = denoise.sample(
        denoiser(), solvers.euler(), schedules.ltx2(3), pair(), weights=weights
    )
    np.testing.assert_array_equal(done.video.x[:, :2], pair().video.clean[:, :2])
    np.testing.assert_array_equal(done.audio.x[:, 5:], pair().audio.clean[:, 5:])


def test_weights_may_change_from_step_to_step():
    terms = TERMS[:1]
    weights = np.array(guidance.weights(terms, scales("text"), 3))
    weights[1:] = 0
    sigmas = schedules.ltx2(3)
    args = denoiser(terms), solvers.euler(), sigmas, pair()
    first, _ = next(denoise.iterate(*args, weights=weights))
    rest = denoise.sample(denoiser(()), solvers.euler(), sigmas[1:], first)
    close(denoise.sample(*args, weights=weights), rest, 1e-5)


def test_momentum_is_carried_from_step_to_step():
    def run(momentum: float | None, steps: int) -> AV:
        term = guidance.Term("t", prompt=1, momentum=momentum)
        return denoise.sample(
            denoiser((term,)),
            solvers.euler(),
            schedules.ltx2(4)[: steps + 1],
            pair(),
            weights=np.ones((steps, 1, 2)),
        )

    close(run(0.5, 1), run(None, 1))
    assert not np.allclose(run(0.5, 2).video.x, run(None, 2).video.x)
    close(run(0.0, 2), run(None, 2))


def test_rescale_is_applied():
    args = pair(), jnp.float32(0.7), jnp.full((3, 2), 2.0), ()
    plain, _ = denoiser()(*args)
    scaled, _ = denoiser(rescale=(0.7, 0.0))(*args)
    assert not np.allclose(plain.video, scaled.video)
    np.testing.assert_allclose(plain.audio, scaled.audio, atol=1e-6)


def test_recorded_noise_replaces_the_key():
    sigmas, solver = schedules.ltx2(2), solvers.res2s()
    n = len(solver.table(sigmas).sigma)
    noise = AV(*(jax.random.normal(jax.random.key(5), (n, 2, t, 4)) for t in (4, 8)))
    full = denoise.sample(denoiser(()), solver, sigmas, pair(), noise)
    short = AV(*(x[:-1] for x in noise))
    close(full, denoise.sample(denoiser(()), solver, sigmas, pair(), short))
    with pytest.raises(ValueError, match="noise for 2 calls, expected 5"):
        few = AV(*(x[:2] for x in noise))
        denoise.sample(denoiser(()), solver, sigmas, pair(), few)


def test_one_key_gives_one_sample():
    args = denoiser(()), solvers.res2s(), schedules.ltx2(2), pair()
    one, same, other = (denoise.sample(*args, jax.random.key(k)) for k in (1, 1, 2))
    close(one, same, 0)
    assert not np.allclose(one.video.x, other.video.x)


def test_a_solver_that_draws_demands_draws():
    with pytest.raises(ValueError, match="draws noise; give `draws` a key"):
        denoise.sample(denoiser(()), solvers.res2s(), schedules.ltx2(2), pair())


@pytest.mark.parametrize("shape", [(3, 3), (4, 3, 2), (2, 3, 2), (3, 3, 1)])
def test_weights_of_wrong_shape_are_refused(shape: tuple):
    with pytest.raises(ValueError, match=r"weights must be \[steps, terms, 2\]"):
        denoise.sample(
            denoiser(),
            solvers.euler(),
            schedules.ltx2(3),
            pair(),
            weights=np.zeros(shape),
        )


@pytest.mark.parametrize("weights", [None, np.zeros((3, 2, 2))])
def test_weights_for_other_terms_are_refused(weights: np.ndarray | None):
    with pytest.raises(ValueError, match="expected \\['text', 'identity', 'stg'\\]"):
        denoise.sample(
            denoiser(), solvers.euler(), schedules.ltx2(3), pair(), weights=weights
        )


@pytest.mark.parametrize("missing", ["video", "audio"])
def test_one_modality_samples_alone(missing: str):
    alone = pair()._replace(**{missing: None})
    done = denoise.sample(
        denoiser(()), solvers.res2s(), schedules.ltx2(2), alone, jax.random.key(0)
    )
    assert getattr(done, missing) is None


def test_the_state_is_float32_whatever_the_streams_are():
    half = each(
        lambda s: s._replace(
            x=s.x.astype(jnp.bfloat16), clean=s.clean.astype(jnp.bfloat16)
        ),
        pair(),
    )
    done = denoise.sample(
        denoiser(()), solvers.res2s(), schedules.ltx2(2), half, jax.random.key(0)
    )
    assert done.video.x.dtype == done.audio.x.dtype == jnp.float32


class Counted:
    """`toys.apply`, counting how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, *args, **kwargs):
        self.traces += 1
        return toys.apply(*args, **kwargs)


@pytest.mark.parametrize("make", [solvers.euler, solvers.res2s])
def test_other_weights_sigmas_parameters_and_keys_share_one_trace(make):
    apply = Counted()
    for seed, scale in enumerate((0.5, 0.7)):
        new = scales("text") | {"identity": (0, scale), "stg": (1, 1)}
        denoise.sample(
            denoiser(apply=apply, scale=scale),
            make(),
            schedules.ltx2(3, terminal=0.2 * scale),
            pair(),
            jax.random.key(seed),
            weights=guidance.weights(TERMS, new, 3),
        )
    assert apply.traces == 1


def test_other_settings_of_a_solver_share_one_trace():
    apply = Counted()
    for solver in (solvers.res2s(), solvers.res2s(0.2, bong=False)):
        args = denoiser((), apply), solver, schedules.ltx2(3), pair()
        denoise.sample(*args, jax.random.key(0))
    assert apply.traces == 1


def test_iterate_compiles_one_step_for_all_steps():
    apply = Counted()
    args = denoiser((), apply), solvers.res2s(), schedules.ltx2(4), pair()
    assert len(list(denoise.iterate(*args, jax.random.key(0)))) == 4
    assert apply.traces == 1

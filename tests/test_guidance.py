"""Terms, branches and how predictions combine."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import guidance
from idlora_jax.types import AV, Branch, Skip


def predictions(n: int, seed: int = 0) -> tuple[AV, ...]:
    keys = jax.random.split(jax.random.key(seed), n)
    return tuple(
        AV(jax.random.normal(k, (2, 4, 3)), jax.random.normal(k, (2, 5, 3)))
        for k in keys
    )


def close(a: AV, b: AV, atol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


ALL = (
    guidance.text_cfg(),
    guidance.identity(),
    guidance.stg([1]),
    guidance.bimodal(),
)


def test_branches_say_what_each_pass_leaves_out():
    positive, text, identity, stg, bimodal = guidance.branches(ALL, depth=3)
    assert positive == Branch()
    assert text == Branch(prompt=1)
    assert identity == Branch(use_ref=False, reads=frozenset({"audio"}))
    skip = Skip(video_self=True, audio_self=True)
    assert stg == Branch(skip=(Skip(), skip, Skip()))
    assert bimodal == Branch(skip=(Skip(a2v=True, v2a=True),) * 3)


def test_branches_keep_what_the_positive_pass_leaves_out():
    one = (Skip(a2v=True), Skip())
    positive = Branch(skip=one, video_sees_ref=False, frozen=frozenset({"audio"}))
    _, text, stg = guidance.branches((ALL[0], guidance.stg([0])), 2, positive)
    assert text == replace(positive, prompt=1)
    assert stg.skip == (Skip(True, True, True, False), Skip())


def test_terms_and_branches_are_hashable_and_equal_by_value():
    assert hash(guidance.stg([1])) == hash(guidance.stg((1,)))
    assert guidance.text_cfg(guidance.Apg(0.5)) == guidance.text_cfg(guidance.Apg(0.5))
    assert len({*guidance.branches(ALL, 3), *guidance.branches(ALL, 3)}) == 5


def test_layers_outside_of_the_model_are_refused():
    with pytest.raises(ValueError, match="layer 29 is outside of a model of 4 layers"):
        guidance.branches((guidance.stg([29]),), 4)


def test_weights_are_scales_less_the_neutral_one():
    scales = {"text": (3, 7), "identity": (0, 3), "stg": (1, 1), "bimodal": (3, 3)}
    table = guidance.weights(ALL, scales, steps=2)
    want = [[2, 6], [0, 3], [1, 1], [2, 2]]
    np.testing.assert_array_equal(table, [want, want])
    assert guidance.weights((), {}, 4).shape == (4, 0, 2)


def test_a_term_moves_only_what_it_reads():
    scales = {"identity": (2, 3)}
    with pytest.raises(ValueError, match=r"reads \['audio'\] only.*video is 2"):
        guidance.weights([guidance.identity()], scales, 1)
    table = guidance.weights([guidance.identity(video=True)], scales, 1)
    np.testing.assert_array_equal(table, [[[2, 3]]])
    x0 = predictions(2)
    term = replace(guidance.identity(), momentum=0.5)
    memory = guidance.memory([term], x0[0])
    (direction,), memory = guidance.directions([term], x0, memory)
    assert direction.video is None and memory[0].video is None
    got = guidance.combine(x0, jnp.array([[9.0, 2.0]]), project=(direction,))
    want = guidance.combine(x0, jnp.array([[0.0, 2.0]]))
    close(got, want)


@pytest.mark.parametrize("scales", [{}, {"text": (3, 7), "stg": (1, 1)}])
def test_scales_must_match_the_terms(scales: dict):
    with pytest.raises(ValueError, match="expected one for each of the terms"):
        guidance.weights((guidance.text_cfg(),), scales, 1)


def test_combining_is_the_weighted_sum_per_modality():
    x0 = predictions(3)
    weights = jnp.array([[2.0, 6.0], [0.0, 3.0]])
    got = guidance.combine(x0, weights)
    p, a, b = x0
    close(AV(got.video, None), AV(3 * p.video - 2 * a.video, None), 1e-5)
    audio = p.audio + 6 * (p.audio - a.audio) + 3 * (p.audio - b.audio)
    close(AV(None, got.audio), AV(None, audio), 1e-5)


def test_weight_zero_equals_an_absent_term():
    x0 = predictions(3)
    weights = jnp.array([[2.0, 6.0], [0.0, 0.0]])
    close(guidance.combine(x0, weights), guidance.combine(x0[:2], weights[:1]))


def test_one_modality_combines_alone():
    x0 = tuple(AV(None, x.audio) for x in predictions(2))
    got = guidance.combine(x0, jnp.array([[1.0, 1.0]]))
    assert got.video is None
    close(got, AV(None, 2 * x0[0].audio - x0[1].audio), 1e-5)


def test_full_rescale_restores_the_deviation_of_every_sample():
    x0 = predictions(2)
    weights = jnp.array([[4.0, 4.0]])
    got = guidance.combine(x0, weights, rescale=jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(
        got.video.std((1, 2)), x0[0].video.std((1, 2)), rtol=1e-5
    )
    plain = guidance.combine(x0, weights)
    close(AV(None, got.audio), AV(None, plain.audio))


def test_rescale_over_the_batch_equals_per_sample_for_one_sample():
    x0 = predictions(2)
    weights, share = jnp.array([[4.0, 4.0]]), jnp.array([0.7, 0.7])
    one = jax.tree.map(lambda x: x[:1], x0)
    whole, single = (
        guidance.combine(one, weights, rescale=share, over=over)
        for over in ("batch", "sample")
    )
    close(whole, single)
    batch = guidance.combine(x0, weights, rescale=share, over="batch")
    assert not np.allclose(batch.video[:1], single.video)


def test_star_ignores_the_length_of_the_negative():
    p, n = predictions(2)
    terms = (guidance.text_cfg(guidance.star),)
    doubled = jax.tree.map(lambda x: 2 * x, n)
    (once,), _ = guidance.directions(terms, (p, n))
    (twice,), _ = guidance.directions(terms, (p, doubled))
    close(once, twice, 1e-5)
    dot = jnp.sum(once.video * n.video, axis=(1, 2))
    np.testing.assert_allclose(dot, 0, atol=1e-4)


def test_apg_with_neutral_settings_is_the_difference():
    x0 = predictions(2)
    (plain,), _ = guidance.directions((guidance.text_cfg(),), x0)
    (same,), _ = guidance.directions((guidance.text_cfg(guidance.Apg()),), x0)
    close(plain, same)


def test_apg_removes_the_parallel_part_and_bounds_the_length():
    x0 = predictions(2)
    apg = guidance.text_cfg(guidance.Apg(eta=0.0, norm_threshold=0.5))
    (d,), _ = guidance.directions((apg,), x0)
    dot = jnp.sum(d.video * x0[0].video, axis=(1, 2))
    np.testing.assert_allclose(dot, 0, atol=1e-5)
    assert jnp.all(jnp.sqrt(jnp.sum(d.video**2, axis=(1, 2))) <= 0.5 + 1e-6)


def test_apg_of_no_difference_is_finite():
    x0 = predictions(1) * 2
    apg = guidance.text_cfg(guidance.Apg(eta=0.0, norm_threshold=0.5))
    (d,), _ = guidance.directions((apg,), x0)
    np.testing.assert_array_equal(d.video, 0)


def test_momentum_sums_directions_and_leaves_other_terms_alone():
    terms = (guidance.Term("a", momentum=0.5), guidance.Term("b"))
    x0 = predictions(3)
    memory = guidance.memory(terms, x0[0])
    (first, other), memory = guidance.directions(terms, x0, memory)
    (second, again), _ = guidance.directions(terms, x0, memory)
    close(second, jax.tree.map(lambda x: 1.5 * x, first))
    close(again, other)


def test_terms_without_momentum_need_no_memory():
    assert guidance.memory(ALL, predictions(1)[0]) == ()


def test_a_projection_may_be_for_one_modality():
    x0 = predictions(2)
    found = {}
    for name, project in (
        ("none", None),
        ("both", guidance.star),
        ("video", AV(guidance.star, None)),
    ):
        ((direction,), _) = guidance.directions([guidance.text_cfg(project)], x0)
        found[name] = direction
    np.testing.assert_array_equal(found["video"].video, found["both"].video)
    np.testing.assert_array_equal(found["video"].audio, found["none"].audio)
    assert not np.allclose(found["both"].audio, found["none"].audio)


def test_schedules_are_read_at_each_steps_noise_level():
    sigmas = [0.9, 0.5, 0.1]
    scales = {
        "text": (guidance.Window(3.0, 0.2, 0.6, outside=1.0), lambda sigma: 10 * sigma)
    }
    table = guidance.weights((guidance.text_cfg(),), scales, sigmas)
    want = [[[0, 8]], [[2, 4]], [[0, 0]]]
    np.testing.assert_allclose(table, want, atol=1e-6)
    assert isinstance(table, np.ndarray) and table.dtype == np.float32


def test_a_schedule_needs_noise_levels():
    scales = {"text": (guidance.Window(3.0), 7.0)}
    with pytest.raises(ValueError, match="give the noise level each step starts from"):
        guidance.weights((guidance.text_cfg(),), scales, 3)


def test_a_traced_scale_gives_a_traced_table():
    def table(scale: jax.Array) -> jax.Array:
        scales = {"identity": (0.0, scale), "text": (guidance.Window(scale, 0.5), 1.0)}
        return guidance.weights(ALL[:2], scales, [1.0, 0.1])

    want = [[[2, 0], [0, 3]], [[-1, 0], [0, 3]]]
    np.testing.assert_array_equal(jax.jit(table)(3.0), want)
    np.testing.assert_array_equal(jax.jacobian(table)(3.0)[:, 1, 1], [1, 1])

"""Sounds of several lengths in one batch: padding is seen by nothing and not learnt."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
import toy_training as toy

from idlora_jax import adapters, losses, strategies, streams, training
from idlora_jax.experiment import Strategy
from idlora_jax.model import conditions, rope, transformer
from idlora_jax.types import Branch, each

KEY = jax.random.key(3)
SOUNDS, REFERENCES = (5, 3), (3, 2)
"""Valid latents of the two samples; the second one is padded in both."""
SPEC = Strategy(coin="sample", sigma="2.0", first_frame_p=0.5, reference_p_drop=0.5)
BRANCHES = (Branch(), strategies.branch(SPEC))
"""Both masks off, and on."""
generations = pytest.mark.parametrize("generation", ["2.0", "2.3"])


def batch(generation: str, padding: float = 0.0) -> strategies.Batch:
    made = toy.batch(0, size=2)

    def padded(x: jax.Array, lengths: tuple[int, ...]) -> jax.Array:
        behind = jnp.arange(x.shape[1])[None] >= jnp.asarray(lengths)[:, None]
        return jnp.where(behind[..., None, None], padding, x)

    return made._replace(
        audio=padded(made.audio, SOUNDS),
        reference=padded(made.reference, REFERENCES),
        prompt=small.prompt(generation, batch=2),
        audio_length=jnp.asarray(SOUNDS),
        reference_length=jnp.asarray(REFERENCES),
    )


def drawn(made: strategies.Batch, drop: list[bool]) -> strategies.Draws:
    return strategies.draw(KEY, made, SPEC)._replace(drop_ref=jnp.asarray(drop))


def second(made: strategies.Batch, draws: strategies.Draws) -> Any:
    """The second sample alone and without padding."""
    made, draws = jax.tree.map(lambda x: x[1:], (made, draws))
    frames, before = SOUNDS[1], REFERENCES[1]
    noise = draws.noise._replace(audio=draws.noise.audio[:, :frames])
    made = made._replace(
        audio=made.audio[:, :frames],
        reference=made.reference[:, :before],
        audio_length=None,
        reference_length=None,
    )
    return made, draws._replace(noise=noise)


@functools.cache
def predict(generation: str) -> Any:
    """Jitted (batch, draws) -> velocities of both branches, losses of each sample."""
    cfg = small.config(generation)

    @jax.jit
    def run(base: Any, made: Any, draws: Any) -> Any:
        variables = {"params": base}
        inputs = strategies.prepare(draws, made, SPEC)
        prompts = (made.prompt,)
        prepared = transformer.prepare(cfg, variables, inputs.streams, prompts)
        args = cfg, variables, prepared, inputs.streams, inputs.sigma, BRANCHES
        counts = strategies.targets(inputs)
        found = transformer.apply(*args, targets=counts)

        def of(velocity: Any, wanted: Any, mask: Any) -> Any:
            each_sample = jax.vmap(lambda *a: losses.masked_mse(*(x[None] for x in a)))
            return each_sample(velocity[:, : wanted.shape[1]], wanted, mask)

        return found, [each(of, v, inputs.velocity, inputs.mask) for v in found]

    return functools.partial(run, small.base(generation))


def near(got: Any, want: Any) -> None:
    """Equal to 1e-5 of the largest value of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        atol = 1e-5 * float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@generations
@pytest.mark.parametrize("dropped", [False, True])
def test_a_padded_sample_is_predicted_as_if_it_were_alone(generation, dropped):
    made = batch(generation)
    draws = drawn(made, [False, dropped])
    padded, errors = predict(generation)(made, draws)
    alone, wanted = predict(generation)(*second(made, draws))
    for got, want in zip(padded, alone, strict=True):
        near(got.video[1], want.video[0])
        near(got.audio[1, : SOUNDS[1]], want.audio[0, : SOUNDS[1]])
        if not dropped:  # a hidden reference is not asked
            rows = slice(SOUNDS[0], SOUNDS[0] + REFERENCES[1])
            near(got.audio[1, rows], want.audio[0, SOUNDS[1] :])
    near(jax.tree.map(lambda e: e[1:], errors), wanted)


@generations
def test_what_stands_in_the_padding_changes_no_bit(generation):
    draws = drawn(batch(generation), [False, False])
    quiet, loud = (predict(generation)(batch(generation, x), draws) for x in (0.0, 9.0))
    behind = drawn(batch(generation), [False, False]).noise
    noise = behind.audio.at[1, SOUNDS[1] :].set(-7.0)
    shaken = draws._replace(noise=behind._replace(audio=noise))
    for other in (loud, predict(generation)(batch(generation), shaken)):
        jax.tree.map(np.testing.assert_array_equal, other[1], quiet[1])
        for one, two in zip(other[0], quiet[0], strict=True):
            np.testing.assert_array_equal(one.video, two.video)
            for row, count in enumerate(SOUNDS):
                np.testing.assert_array_equal(
                    one.audio[row, :count], two.audio[row, :count]
                )


@pytest.mark.slow
def test_a_padded_sample_is_learnt_as_if_it_were_alone():
    cfg, base, made = small.config("2.0"), small.base("2.0"), batch("2.0")
    apply = transformer.bind(cfg, remat="none")
    task = training.Task(apply, functools.partial(transformer.prepare, cfg), SPEC)
    targets = ("blocks/audio/self_attn/[kv]", "blocks/video/cross_attn/[qv]")
    adapter = adapters.init(KEY, base, 2, targets)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)

    @jax.jit
    def learn(adapter: Any, made: Any, draws: Any, share: jax.Array) -> Any:
        inputs = strategies.prepare(draws, made, SPEC)

        def loss(adapter: Any) -> jax.Array:
            """Of samples, each as often as it is wanted."""
            found = training.predict(task, base, adapter, inputs)
            total = jnp.zeros(())
            for v, want, mask in zip(found, inputs.velocity, inputs.mask, strict=True):
                error = jnp.sum((v[:, : want.shape[1]] - want) ** 2, -1) * mask
                total += jnp.sum(share * jnp.mean(error, 1) * error.shape[1])
            return total

        return jax.grad(loss)(adapter)

    draws = drawn(made, [False, False])
    got = learn(adapter, made, draws, jnp.array([0.0, 1.0]))
    want = learn(adapter, *second(made, draws), jnp.ones(1))
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(want)) > 0.1
    near(got, want)


def test_the_loss_counts_every_token_alike():
    made = batch("2.0")
    inputs = strategies.prepare(drawn(made, [False, True]), made, SPEC)
    np.testing.assert_array_equal(inputs.mask.audio.sum(1), SOUNDS)
    audio = inputs.streams.audio
    np.testing.assert_array_equal(audio.target_length, SOUNDS)
    np.testing.assert_array_equal(audio.length, [5 + REFERENCES[0], 5])


def test_valid_keys_come_first_and_padding_of_targets_last():
    for targets, refs in ((1, 1), (4, 3), (5, 0)):
        valid = np.arange(1, targets + 1)
        m = transformer._dummy(small.config("2.0"), "audio")[2]
        tokens = targets + refs
        m = m._replace(
            ada=jnp.zeros((targets, 2, 6, 16)),
            rope=rope.Rope(*[jnp.zeros((1, tokens, 2, 4))] * 2),
            targets=jnp.asarray(valid),
        )
        order = conditions._ordered(m, targets).order
        at = np.arange(tokens)[None]
        padding = (at >= valid[:, None]) & (at < targets)
        want = np.argsort(padding, axis=1, stable=True)
        if refs:
            np.testing.assert_array_equal(order, want)
        else:
            assert order is None
        lengths = conditions._lengths(m, targets, [True, False])
        np.testing.assert_array_equal(lengths, [valid + refs, valid])


def test_nothing_is_reordered_where_sounds_have_one_length():
    s = small.pair()
    assert s.audio.target_length is None
    made = batch("2.0")._replace(audio_length=None)
    inputs = strategies.prepare(drawn(made, [False, False]), made, SPEC)
    assert inputs.streams.audio.target_length is None
    assert inputs.streams.video.target_length is None
    m = transformer._dummy(small.config("2.0"), "audio")[2]
    assert conditions._ordered(m, 1).order is None


def test_a_padded_stream_is_cut_into_a_padded_target_and_its_reference():
    made = batch("2.0")
    s = strategies.prepare(drawn(made, [False, False]), made, SPEC).streams.audio
    target, reference = streams.split(s, 5)
    np.testing.assert_array_equal(target.target_length, SOUNDS)
    assert target.length is None and reference.target_length is None
    np.testing.assert_array_equal(reference.length, REFERENCES)

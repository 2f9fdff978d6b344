"""What a training sample is made of."""

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
    adapters,
    geometry,
    guidance,
    starts,
    strategies,
    streams,
    training,
)
from idlora_jax.experiment import Strategy
from idlora_jax.model import transformer
from idlora_jax.types import AV, Branch, each

SPEC = Strategy(coin="sample", sigma="2.0")
BATCH = toy.batch(0, size=4)
KEY = jax.random.key(3)
FRAME = 2
"""Tokens of one latent frame."""


def drawn(spec: Strategy = SPEC, batch: strategies.Batch = BATCH) -> strategies.Draws:
    return strategies.draw(KEY, batch, spec)


def with_first(draws: strategies.Draws, *given: bool) -> strategies.Draws:
    return draws._replace(first_frame=jnp.array(given))


def changed(**changes: Any) -> Strategy:
    return dataclasses.replace(SPEC, **changes)


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_same_key_draws_the_same_and_another_key_does_not():
    same(drawn(), drawn())
    other = strategies.draw(jax.random.key(4), BATCH, SPEC)
    assert (other.sigma.video != drawn().sigma.video).all()
    assert (other.noise.audio != drawn().noise.audio).any()


def test_draws_depend_on_shapes_only():
    same(drawn(), drawn(batch=toy.batch(1, size=4)))


def test_noise_levels_of_no_generation_are_refused():
    with pytest.raises(ValueError, match=r"strategy\.sigma: got None"):
        drawn(changed(sigma=None))


@pytest.mark.parametrize("sigma", ["2.0", "2.3", "uniform"])
def test_noise_levels_lie_between_0_and_1_and_differ_within_a_batch(sigma):
    levels = drawn(changed(sigma=sigma)).sigma.video
    assert ((levels >= 0) & (levels <= 1)).all()
    assert len(set(np.asarray(levels).tolist())) == 4


def test_both_modalities_share_the_noise_level_unless_told_otherwise():
    np.testing.assert_array_equal(*drawn().sigma)
    apart = drawn(changed(shared_sigma=False)).sigma
    assert (apart.video != apart.audio).all()


def test_noise_is_drawn_for_targets_only():
    noise = drawn().noise
    assert noise.video.shape == (4, 4, 128)
    assert noise.audio.shape == (4, 5, 128)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_first_frame_is_given_never_or_always_at_the_ends(p):
    assert (drawn(changed(first_frame_p=p)).first_frame == bool(p)).all()


def test_one_coin_decides_for_the_batch_or_each_sample_has_its_own():
    def coins(coin: Any) -> np.ndarray:
        spec = changed(coin=coin, first_frame_p=0.5)
        keys = jax.random.split(KEY, 32)
        return np.array([strategies.draw(k, BATCH, spec).first_frame for k in keys])

    one, own = coins("batch"), coins("sample")
    assert (one == one[:, :1]).all()
    assert 0 < one[:, 0].sum() < 32
    assert not (own == own[:, :1]).all()


def test_the_input_is_mixed_and_the_velocity_points_from_clean_to_noise():
    draws = with_first(drawn(), False, False, False, False)
    got = strategies.prepare(draws, BATCH, SPEC)
    clean = geometry.patchify(BATCH.video)
    sigma = draws.sigma.video[:, None, None]
    x = (1 - sigma) * clean + sigma * draws.noise.video
    np.testing.assert_allclose(got.streams.video.x, x, rtol=1e-6)
    np.testing.assert_array_equal(got.velocity.video, draws.noise.video - clean)
    sound = geometry.patchify_audio(BATCH.audio)
    np.testing.assert_array_equal(got.velocity.audio, draws.noise.audio - sound)


def test_a_given_first_frame_is_clean_and_leaves_the_loss():
    draws = with_first(drawn(), True, False, True, False)
    got = strategies.prepare(draws, BATCH, SPEC)
    clean = geometry.patchify(BATCH.video)
    x = got.streams.video.x
    np.testing.assert_array_equal(x[0, :FRAME], clean[0, :FRAME])
    assert (x[1, :FRAME] != clean[1, :FRAME]).all()
    want = np.ones((4, 4), bool)
    want[[0, 2], :FRAME] = False
    np.testing.assert_array_equal(got.mask.video, want)
    np.testing.assert_array_equal(got.streams.video.denoise, want)
    assert got.mask.audio.all()


def test_a_still_picture_is_never_given_whole():
    still = BATCH._replace(video=BATCH.video[:, :1])
    draws = with_first(drawn(batch=still), True, True, True, True)
    assert strategies.prepare(draws, still, SPEC).mask.video.all()


def test_the_audio_stream_is_the_one_the_sampler_builds():
    draws = drawn()
    got = strategies.prepare(draws, BATCH, SPEC).streams.audio
    grid = strategies.layout(BATCH).audio
    assert grid is not None
    want = streams.target(geometry.patchify_audio(BATCH.audio), grid)
    ref = geometry.patchify_audio(BATCH.reference)
    want = streams.add_reference(want, ref, geometry.reference_positions(3))
    noise = jnp.pad(draws.noise.audio, ((0, 0), (0, 3), (0, 0)))
    same(got, streams.noise(want, noise, draws.sigma.audio))


def test_what_attention_hides_is_the_samplers_branch():
    assert strategies.branch(SPEC) == Branch(video_sees_ref=False, ref_sees_text=False)
    seeing = changed(video_sees_ref=True, ref_sees_text=True)
    assert strategies.branch(seeing) == Branch()
    assert strategies.branch(changed(name="text_to_video")) == Branch()


def test_without_negative_positions_the_reference_lies_on_the_plain_grid():
    got = strategies.prepare(drawn(), BATCH, changed(negative_positions=False))
    pos = got.streams.audio.pos
    np.testing.assert_array_equal(pos[:, :, 5:], pos[:, :, :3])


def test_the_gap_moves_the_reference():
    far = strategies.prepare(drawn(), BATCH, changed(gap_s=1.0)).streams.audio.pos
    near = strategies.prepare(drawn(), BATCH, SPEC).streams.audio.pos
    np.testing.assert_allclose(near[:, :, 5:] - far[:, :, 5:], 0.96, atol=1e-6)
    np.testing.assert_allclose(far[:, 0, -1, 1], -1.0, atol=1e-6)


def test_padded_references_lie_where_unpadded_ones_do():
    lengths = jnp.array([3, 1, 2, 3])
    padded = BATCH._replace(reference_length=lengths)
    got = strategies.prepare(drawn(), padded, SPEC).streams.audio
    np.testing.assert_array_equal(got.length, 5 + lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], BATCH)
        alone = alone._replace(reference=alone.reference[:, :n])
        draws = jax.tree.map(lambda x, row=row: x[row : row + 1], drawn())
        want = strategies.prepare(draws, alone, SPEC).streams.audio
        np.testing.assert_array_equal(got.pos[row, :, : 5 + n], want.pos[0])
        np.testing.assert_array_equal(got.x[row, : 5 + n], want.x[0])


def test_padding_of_a_clips_own_sound_leaves_the_loss():
    lengths = jnp.array([5, 4, 5, 2])
    batch = BATCH._replace(audio_length=lengths)
    got = strategies.prepare(drawn(), batch, changed(name="text_to_video"))
    np.testing.assert_array_equal(got.mask.audio.sum(1), lengths)
    np.testing.assert_array_equal(got.streams.audio.target_length, lengths)
    with_reference = strategies.prepare(drawn(), batch, SPEC)
    np.testing.assert_array_equal(with_reference.mask.audio, got.mask.audio)
    assert with_reference.streams.audio.length is None


def test_text_to_video_leaves_the_reference_away_and_needs_no_sound():
    spec = changed(name="text_to_video")
    got = strategies.prepare(drawn(spec), BATCH, spec)
    assert not got.streams.audio.is_ref.any()
    silent = BATCH._replace(audio=None, reference=None)
    draws = drawn(spec, silent)
    got = strategies.prepare(draws, silent, spec)
    assert got.streams.audio is None
    assert strategies.targets(got) == AV(4, None)


def test_a_mode_without_its_data_is_refused():
    silent = BATCH._replace(audio=None)
    with pytest.raises(ValueError, match="needs audio"):
        strategies.prepare(drawn(batch=silent), silent, SPEC)
    alone = BATCH._replace(reference=None)
    with pytest.raises(ValueError, match="reference_audio_latents"):
        strategies.prepare(drawn(batch=alone), alone, SPEC)


def test_targets_stand_before_references():
    got = strategies.prepare(drawn(), BATCH, SPEC)
    assert strategies.targets(got) == AV(4, 5)
    assert got.streams.audio.is_ref[:, 5:].all()
    assert not got.streams.audio.is_ref[:, :5].any()


def test_frames_per_second_stretch_the_time_of_video_only():
    fast = strategies.prepare(drawn(), BATCH, SPEC, fps=50.0).streams
    slow = strategies.prepare(drawn(), BATCH, SPEC, fps=25.0).streams
    np.testing.assert_allclose(2 * fast.video.pos[:, 0], slow.video.pos[:, 0])
    np.testing.assert_array_equal(fast.video.pos[:, 1:], slow.video.pos[:, 1:])
    np.testing.assert_array_equal(fast.audio.pos, slow.audio.pos)


def test_low_precision_latents_are_mixed_in_float32():
    half = BATCH._replace(video=BATCH.video.astype(jnp.bfloat16))
    assert strategies.prepare(drawn(), half, SPEC).streams.video.x.dtype == jnp.float32


# The other modes, dropped references, and what sampling builds of the same clip.

SILENT = ("video_to_video",)
PARTS = ("pos", "is_ref", "denoise", "length", "target_length")
VARIANTS = {
    "usual": {},
    "plain grid": {"negative_positions": False},
    "far": {"gap_s": 0.5, "negative_video": True},
}


def clips(size: int = 2) -> strategies.Batch:
    """Clips of 2 x 4 x 2 latents with references of every kind, video at half size."""
    made = toy.batch(0, size=size)
    return made._replace(
        video=small.draw(5, size, 2, 4, 2, 128),
        video_reference=small.draw(6, size, 2, 2, 1, 128),
    )


@pytest.mark.parametrize("rounding", [None, "train_bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", strategies.MODES)
def test_training_and_sampling_build_equal_streams(name, variant, rounding):
    spec = changed(name=name, first_frame_p=1.0, **VARIANTS[variant])
    batch = clips()
    how = {"numerics": "reference" if rounding else "exact", "rounding": rounding}
    got = strategies.prepare(drawn(spec, batch), batch, spec, fps=24.0, **how).streams
    used, layout = strategies.used(batch, spec), strategies.layout(batch, 24.0)
    if used.audio is None:
        layout = dataclasses.replace(layout, audio=None)
    request = starts.Request(
        (batch.prompt,),
        used.reference,
        batch.video[:, :1],
        video_reference=used.video_reference,
    )
    where = strategies.placing(spec, rounding)
    want = starts.start(request, layout, placing=where)
    assert (want.audio is None) == (got.audio is None) == (name in SILENT)
    for ours, theirs in zip(got, want, strict=True):
        for part in PARTS if ours is not None else ():
            same(getattr(ours, part), getattr(theirs, part))
        if ours is not None:
            given = ~np.asarray(ours.denoise)
            same(ours.x[given], theirs.x[given])


def test_video_to_video_learns_video_from_video_alone():
    spec = changed(name="video_to_video", first_frame_p=0.0)
    batch = clips()
    got = strategies.prepare(drawn(spec, batch), batch, spec)
    assert got.streams.audio is got.velocity.audio is got.sigma.audio is None
    assert strategies.targets(got) == AV(16, None)
    assert got.mask.video.all()
    np.testing.assert_array_equal(got.streams.video.is_ref.sum(1), [4, 4])
    assert strategies.branch(spec) == Branch()
    assert drawn(spec, batch).noise.audio is None


def test_an_audio_video_mode_has_both_references():
    spec = changed(name="audio_video_ic")
    got = strategies.prepare(drawn(spec, clips()), clips(), spec)
    assert [int(s.is_ref[0].sum()) for s in got.streams] == [4, 3]
    assert strategies.targets(got) == AV(16, 5)
    assert strategies.branch(spec) == strategies.branch(SPEC)


def test_text_to_video_may_leave_the_sound_away():
    spec = changed(name="text_to_video", with_audio=False)
    got = strategies.prepare(drawn(spec), BATCH, spec)
    assert got.streams.audio is None
    assert strategies.targets(got) == AV(4, None)


@pytest.mark.parametrize(
    ("name", "missing", "folder"),
    [
        ("video_to_video", "video_reference", "reference_latents"),
        ("audio_video_ic", "video_reference", "reference_latents"),
        ("audio_video_ic", "reference", "reference_audio_latents"),
        ("audio_video_ic", "audio", "audio_latents"),
    ],
)
def test_each_mode_says_which_folder_it_lacks(name, missing, folder):
    batch, spec = clips()._replace(**{missing: None}), changed(name=name)
    with pytest.raises(ValueError, match=f"{name} needs .*add the folder {folder}/"):
        strategies.draw(KEY, batch, spec)


def test_references_are_dropped_as_often_as_asked_and_nothing_else_changes():
    spec = changed(reference_p_drop=0.25)
    big = toy.batch(0, size=400)
    draws = strategies.draw(KEY, big, spec)
    assert draws.drop_ref is not None and 70 < draws.drop_ref.sum() < 130
    same(draws._replace(drop_ref=None), strategies.draw(KEY, big, SPEC))
    alone = changed(name="text_to_video", reference_p_drop=1.0)
    assert strategies.draw(KEY, BATCH, alone).drop_ref is None


def test_a_dropped_reference_is_hidden_and_targets_stay():
    draws = drawn(changed(reference_p_drop=0.5))
    draws = draws._replace(drop_ref=jnp.array([True, False, True, False]))
    batch = BATCH._replace(reference_length=jnp.array([3, 2, 1, 3]))
    got = strategies.prepare(draws, batch, SPEC)
    np.testing.assert_array_equal(got.streams.audio.length, [5, 7, 5, 8])
    assert got.streams.video.length is None
    want = strategies.prepare(draws._replace(drop_ref=None), batch, SPEC)
    same(got._replace(streams=None), want._replace(streams=None))


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_training_without_reference_is_identity_guidances_unconditional_pass(
    generation,
):
    spec = changed(name="audio_video_ic")
    cfg, base = small.config(generation), small.base(generation)
    batch = clips()._replace(prompt=small.prompt(generation, batch=2))
    draws = drawn(spec, batch)._replace(drop_ref=jnp.array([True, False]))
    task = training.Task(
        transformer.bind(cfg, remat="none"),
        functools.partial(transformer.prepare, cfg),
        spec,
    )
    adapter = adapters.init(KEY, base, 2)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    inputs = strategies.prepare(draws, batch, spec)
    got = jax.jit(functools.partial(training.predict, task))(base, adapter, inputs)
    shown = strategies.prepare(draws._replace(drop_ref=None), batch, spec).streams
    terms = (guidance.identity(video=True),)
    passes = guidance.branches(terms, 2, strategies.branch(spec))
    variables = {"params": base, "lora": adapter}
    counts = strategies.targets(inputs)

    @jax.jit
    def sampled(variables: Any) -> tuple[AV, ...]:
        prepared = transformer.prepare(cfg, variables, shown, (batch.prompt,))
        args = cfg, variables, prepared, shown, inputs.sigma, passes
        return transformer.apply(*args, targets=counts)

    conditional, unconditional = sampled(variables)
    for row, want in ((0, unconditional), (1, conditional)):
        cut = lambda v, n, row=row: v[row, :n]
        small.close(each(cut, got, counts), each(cut, want, counts))
    far = np.abs(np.asarray(conditional.audio - unconditional.audio))[:, :5]
    assert far.max() > 1e-2

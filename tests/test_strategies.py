"""What a training sample is made of."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training as toy

from idlora_jax import geometry, strategies, streams
from idlora_jax.experiment import Strategy
from idlora_jax.types import AV, Branch

SPEC = Strategy(coin="sample")
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
    np.testing.assert_array_equal(got.streams.audio.length, lengths)
    with pytest.raises(ValueError, match="cut the clips to one length"):
        strategies.prepare(drawn(), batch, SPEC)


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

"""What a stage starts from: requests by stage, and refinement at twice the size."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from small_transformer import GRID, SOUND, draw, prompt

from idlora_jax import geometry, starts
from idlora_jax.starts import Request
from idlora_jax.types import AV, Layout, each

LAYOUT = Layout(GRID, SOUND)
LARGE = starts.larger(LAYOUT)


def latents() -> AV:
    assert LARGE.video is not None and LARGE.audio is not None
    grid = geometry.latent_shape(LARGE.video)
    bins, channels = geometry.AUDIO_BINS, geometry.AUDIO_CHANNELS
    return AV(
        draw(0, 1, *grid, geometry.VIDEO_CHANNELS),
        draw(1, 1, LARGE.audio.frames, bins, channels),
    )


def test_the_larger_clip_has_twice_the_sides_and_the_same_time():
    assert LARGE.video is not None and LAYOUT.video is not None
    assert (LARGE.video.height, LARGE.video.width) == (
        2 * LAYOUT.video.height,
        2 * LAYOUT.video.width,
    )
    assert LARGE.video.frames == LAYOUT.video.frames
    assert LARGE.audio == LAYOUT.audio
    with pytest.raises(ValueError, match="no video"):
        starts.larger(Layout(None, SOUND))


def test_refinement_noises_the_video_and_leaves_the_sound_alone():
    before = latents()
    s = starts.refine(Request((prompt("2.0", 0),)), before, LARGE)
    assert s.video.denoise.all() and not s.audio.denoise.any()
    noise = AV(draw(2, *s.video.x.shape), draw(3, *s.audio.x.shape))
    noisy = starts.add_noise(s, noise, 0.9)
    np.testing.assert_allclose(
        noisy.video.x, 0.1 * s.video.clean + 0.9 * noise.video, atol=1e-6
    )
    done = starts.finish(noisy, LARGE)
    np.testing.assert_array_equal(done.audio, before.audio)


def test_the_first_frame_of_a_refinement_is_its_own():
    frame = draw(4, 1, 1, *latents().video.shape[2:])
    s = starts.refine(Request((prompt("2.0", 0),), None, frame), latents(), LARGE)
    count = frame.shape[2] * frame.shape[3]
    assert not s.video.denoise[:, :count].any() and s.video.denoise[:, count:].all()
    np.testing.assert_array_equal(s.video.x[:, :count], geometry.patchify(frame))
    small = frame[:, :, :1]
    with pytest.raises(ValueError, match="encode it at the clip's size"):
        starts.refine(Request((prompt("2.0", 0),), None, small), latents(), LARGE)


def test_each_stage_takes_its_own_part_of_a_request():
    noises = tuple(AV(jnp.full(1, n), jnp.full(1, n)) for n in (0.0, 1.0))
    request = Request((), "voice", ("small", "large"), noises)
    first, second = (starts.of_stage(request, n) for n in range(2))
    assert (first.reference, first.first_frame) == ("voice", "small")
    assert (second.reference, second.first_frame) == (None, "large")
    assert second.noise is noises[1]
    alone = Request((), "voice", "small", noises[0])
    assert starts.of_stage(alone, 0) == alone
    with pytest.raises(ValueError, match=r"first_frame for 1 stages.*one per stage"):
        starts.of_stage(alone, 1)
    assert starts.of_stage(alone._replace(first_frame=None), 1).noise is None


def request(**changes) -> Request:
    return Request((prompt("2.0", 0),), **changes)


def segment(seed: int, count: int):
    return draw(seed, 1, count, geometry.AUDIO_BINS, geometry.AUDIO_CHANNELS)


def test_several_references_lie_one_before_the_other():
    one, two = segment(5, 3), segment(6, 4)
    s = starts.start(request(reference=(one, two)), LAYOUT).audio
    count = SOUND.frames
    alone = starts.start(request(reference=one), LAYOUT).audio
    np.testing.assert_array_equal(s.x[:, : count + 3], alone.x)
    np.testing.assert_array_equal(s.pos[:, :, : count + 3], alone.pos)
    pos = np.asarray(s.pos)[0, 0]
    first, second = pos[count : count + 3], pos[count + 3 :]
    np.testing.assert_allclose(first[-1, 1], -geometry.GAP_S, atol=1e-6)
    np.testing.assert_allclose(second[-1, 1], first[0, 0] - geometry.GAP_S, atol=1e-6)
    # Each is what it would be alone, further back.
    own = geometry.reference_positions(4)[0, 0]
    np.testing.assert_allclose(second - second[-1], own - own[-1], atol=1e-6)
    assert s.is_ref.sum() == 7 and not s.denoise[:, count:].any()


def test_a_pre_roll_lies_before_zero_and_moves_the_reference():
    layout = starts.clip(9, 64, 32, pre_roll=0.2)
    assert layout.audio is not None and (layout.audio.before, SOUND.frames) == (5, 5)
    plain = starts.clip(9, 64, 32)
    assert layout.audio.frames == plain.audio.frames + 5
    assert geometry.seconds(layout.audio) == geometry.seconds(plain.audio)
    s = starts.start(request(reference=segment(5, 3)), layout).audio
    np.testing.assert_allclose(s.pos[0, 0, 0, 0], -0.2, atol=1e-7)
    np.testing.assert_allclose(s.pos[0, 0, 5, 1], 0.01, atol=1e-7)
    last = layout.audio.frames + 2
    np.testing.assert_allclose(s.pos[0, 0, last, 1], -0.2 - geometry.GAP_S, atol=1e-6)


def test_a_clip_may_begin_with_the_end_of_another():
    grid = geometry.latent_shape(GRID)[1:]
    frames = draw(7, 1, 2, *grid, geometry.VIDEO_CHANNELS)
    asked = request(first_frame=frames, first_audio=segment(8, 2))
    s = starts.start(asked, LAYOUT)
    done = starts.finish(starts.add_noise(s, each(lambda s: s.x + 1, s), 1.0), LAYOUT)
    np.testing.assert_array_equal(done.video[:, :2], frames)
    np.testing.assert_array_equal(done.audio[:, :2], asked.first_audio)
    assert s.audio.denoise[:, 2:].all()


def test_given_latents_must_fit_into_the_clip():
    grid = geometry.latent_shape(GRID)[1:]
    long = request(first_frame=draw(7, 1, 3, *grid, geometry.VIDEO_CHANNELS))
    with pytest.raises(ValueError, match=r"first_frame has shape .* 1 to 2"):
        starts.start(long, LAYOUT)
    with pytest.raises(ValueError, match="first_audio has 6 latents, the clip 5"):
        starts.start(request(first_audio=segment(8, 6)), LAYOUT)
    rolled = starts.clip(9, 64, 32, pre_roll=0.2)
    with pytest.raises(ValueError, match="and no pre-roll"):
        starts.start(request(first_audio=segment(8, 2)), rolled)

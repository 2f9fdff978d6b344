"""What a stage starts from: requests by stage, and refinement at twice the size."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from small_transformer import GRID, SOUND, draw, prompt

from idlora_jax import geometry, starts
from idlora_jax.starts import Request
from idlora_jax.types import AV, Layout

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
    with pytest.raises(ValueError, match="encode the image at the clip's size"):
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

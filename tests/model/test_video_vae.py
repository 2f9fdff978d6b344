import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_sections import GROUP_VIDEO, NOISY_VIDEO, TINY_VIDEO, TINY_VIDEO_23

from idlora_jax.config_video_vae import video_vae_config
from idlora_jax.model import video_vae

CONFIGS = {
    "2.0": video_vae_config({"vae": TINY_VIDEO}),
    "2.3": video_vae_config({"vae": TINY_VIDEO_23}),
}
CFG = CONFIGS["2.0"]


@pytest.fixture(scope="module")
def params():
    return {g: video_vae.init(c, jax.random.key(0)) for g, c in CONFIGS.items()}


@pytest.fixture(scope="module")
def encode(params):
    return jax.jit(partial(video_vae.encode, CFG, params["2.0"]))


@pytest.fixture(scope="module")
def video():
    return jax.random.uniform(jax.random.key(1), (1, 17, 32, 64, 3)) * 2 - 1


@pytest.fixture(scope="module")
def latents(encode, video):
    return encode(video)


def test_encoding_shrinks_time_by_8_after_the_first_frame_and_sides_by_32(latents):
    assert latents.shape == (1, 3, 1, 2, 4)


def test_a_later_frame_leaves_earlier_latents_unchanged(encode, video, latents):
    changed = encode(video.at[:, 9:].add(0.5))
    np.testing.assert_array_equal(changed[:, :2], latents[:, :2])
    assert float(jnp.abs(changed[:, 2] - latents[:, 2]).min()) > 1e-3


def test_one_frame_alone_gives_the_first_latent_of_a_longer_clip(
    encode, video, latents
):
    np.testing.assert_allclose(encode(video[:, :1])[:, 0], latents[:, 0], atol=1e-5)


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_decoding_f_latent_frames_gives_8f_minus_7_frames(params, generation):
    cfg = CONFIGS[generation]
    for frames in (1, 2, 4):
        latent = jax.ShapeDtypeStruct((2, frames, 1, 2, 4), jnp.float32)
        decode = partial(video_vae.decode, cfg, params[generation])
        shape = jax.eval_shape(decode, latent).shape
        assert shape == (2, 8 * (frames - 1) + 1, 32, 64, 3)


@pytest.mark.parametrize("causal", [True, False])
def test_only_a_causal_decoder_ignores_the_frames_to_come(params, causal):
    cfg = dataclasses.replace(CFG, causal_decoder=causal)
    decode = jax.jit(partial(video_vae.decode, cfg, params["2.0"]))
    latent = jax.random.normal(jax.random.key(2), (1, 3, 1, 1, 4))
    before, after = decode(latent), decode(latent.at[:, 2].add(1))
    assert bool((before[:, :9] == after[:, :9]).all()) is causal
    assert bool((before[:, 9:] != after[:, 9:]).any())


def test_unnormalize_undoes_normalize():
    stats = {"mean": jnp.arange(4.0), "std": jnp.arange(1.0, 5.0)}
    x = jax.random.normal(jax.random.key(0), (2, 3, 1, 2, 4))
    there = video_vae.normalize(stats, x)
    np.testing.assert_allclose(video_vae.unnormalize(stats, there), x, atol=1e-6)
    np.testing.assert_allclose(there[..., 3], (x[..., 3] - 3) / 4, rtol=1e-6)


def test_encoded_means_are_normalised_by_the_statistics(params, video, latents):
    p = params["2.0"]
    stats = p["stats"] | {"mean": jnp.full(4, 2.0), "std": jnp.full(4, 3.0)}
    encode = jax.jit(partial(video_vae.encode, CFG))
    other = encode(p | {"stats": stats}, video[:, :1])
    np.testing.assert_allclose(other, (latents[:, :1] - 2) / 3, atol=1e-5)


def test_the_computation_runs_in_the_dtype_of_the_input(params):
    p = params["2.0"]
    for f, shape in (("encode", (1, 1, 32, 32, 3)), ("decode", (1, 1, 1, 1, 4))):
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        run = partial(getattr(video_vae, f), CFG, p)
        assert jax.eval_shape(run, x).dtype == jnp.bfloat16


def test_to_uint8_clamps_and_cuts_fractions_off():
    x = jnp.array([-2, -1, 0, 0.999, 1, 3]).reshape(1, 1, 1, 6, 1)
    got = video_vae.to_uint8(x)
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got.ravel(), [0, 0, 127, 254, 255, 255])


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (8, 1), (9, 9), (24, 17)])
def test_crop_frames_keeps_the_longest_valid_start(frames, kept):
    video = jnp.arange(float(frames)).reshape(1, frames, 1, 1, 1)
    cropped = video_vae.crop_frames(CFG, video)
    np.testing.assert_array_equal(cropped.ravel(), np.arange(kept))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((10, 32, 32), r"frames must be 8k\+1, got 10 \(use 9,"),
        ((16, 32, 32), r"frames must be 8k\+1, got 16 \(use 17,"),
        ((9, 40, 32), r"height must be a multiple of 32, got 40 \(use 32\)"),
        ((9, 32, 60), r"width must be a multiple of 32, got 60 \(use 64\)"),
        ((9, 8, 32), r"height must be a multiple of 32, got 8 \(use 32\)"),
    ],
)
def test_a_wrong_size_names_the_nearest_valid_one(params, size, message):
    with pytest.raises(ValueError, match=message):
        video_vae.encode(CFG, params["2.0"], jnp.zeros((1, *size, 3)))


def test_a_latent_of_other_width_is_refused(params):
    with pytest.raises(ValueError, match=r"latent must be \[B f h w 4\], got"):
        video_vae.decode(CFG, params["2.0"], jnp.zeros((1, 1, 1, 1, 5)))


NOISY = video_vae_config({"vae": NOISY_VIDEO})


@pytest.fixture(scope="module")
def noisy():
    return video_vae.init(NOISY, jax.random.key(0))


@pytest.fixture(scope="module")
def denoise(noisy):
    return jax.jit(partial(video_vae.decode, NOISY, noisy))


@pytest.fixture(scope="module")
def noisy_latent():
    return jax.random.normal(jax.random.key(3), (2, 2, 2, 2, 2))


@pytest.fixture(scope="module")
def draws(noisy_latent):
    return video_vae.draw(jax.random.key(4), NOISY, noisy_latent.shape)


def test_a_decoder_that_denoises_draws_a_latent_and_a_map_per_injection(draws):
    assert draws.latent.shape == (2, 2, 2, 2, 2)
    assert [m.shape for m in draws.maps] == [(4, 4), (4, 4), (16, 16), (16, 16)]
    none = video_vae.draw(jax.random.key(0), CFG, (1, 2, 2, 2, 4))
    assert none == video_vae.Draws(None, ())


def test_a_conditioned_decoder_is_told_0_05_unless_given(denoise, noisy_latent, draws):
    unsaid = denoise(noisy_latent, draws=draws)
    assert unsaid.shape == (2, 9, 64, 64, 3)
    said = denoise(noisy_latent, draws=draws, timestep=jnp.full(2, 0.05))
    np.testing.assert_allclose(said, unsaid, atol=1e-4)
    other = denoise(noisy_latent, draws=draws, timestep=jnp.array([0.05, 0.5]))
    np.testing.assert_allclose(other[0], unsaid[0], atol=1e-5)
    assert float(jnp.abs(other[1] - unsaid[1]).max()) > 1e-2


def test_a_fortieth_of_the_latent_is_noise(denoise, noisy_latent, draws):
    same = denoise(noisy_latent, draws=draws._replace(latent=noisy_latent))
    none = draws._replace(latent=jnp.zeros_like(noisy_latent))
    np.testing.assert_allclose(
        denoise(noisy_latent / 0.975, draws=none), same, atol=1e-3
    )


def test_noise_of_other_shapes_is_refused(noisy, noisy_latent, draws):
    decode = partial(video_vae.decode, NOISY, noisy, noisy_latent)
    with pytest.raises(ValueError, match=r"needs noise of shapes .* got \[\] \(use"):
        decode()
    with pytest.raises(ValueError, match="needs noise of shapes"):
        decode(draws=draws._replace(maps=draws.maps[:2]))
    with pytest.raises(ValueError, match=r"needs noise of shapes \[\], got"):
        video_vae.decode(CFG, {}, jnp.zeros((1, 1, 1, 1, 4)), draws=draws)


def test_noise_parameters_start_as_the_file_format_has_them(noisy):
    decoder = noisy["decoder"]
    assert float(decoder["timestep_scale"]) == 1000
    assert decoder["blocks_6"]["res_0"]["noise_scale1"].shape == (1, 1, 2)
    groups = video_vae_config({"vae": GROUP_VIDEO})
    shapes = jax.eval_shape(partial(video_vae.init, groups), jax.random.key(0))
    assert shapes["encoder"]["norm_out"]["scale"].shape == (64,)


@pytest.mark.parametrize("section", [NOISY_VIDEO, GROUP_VIDEO])
def test_every_kind_of_block_keeps_the_factors_of_time_and_space(section):
    cfg = video_vae_config({"vae": section})
    made = partial(jax.eval_shape, partial(video_vae.init, cfg))(jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((1, 9, 64, 32, 3), jnp.float32)
    latent = jax.eval_shape(partial(video_vae.encode, cfg), made, pixels)
    assert latent.shape == (1, 2, 2, 1, cfg.latent_channels)
    draw = partial(video_vae.draw, cfg=cfg, shape=latent.shape)
    noise = jax.eval_shape(draw, jax.random.key(0))
    decode = partial(video_vae.decode, cfg)
    assert jax.eval_shape(decode, made, latent, draws=noise).shape == pixels.shape

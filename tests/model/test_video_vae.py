import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_sections import TINY_VIDEO, TINY_VIDEO_23

from idlora_jax.config_codecs import Resample, Residual, video_vae_config
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


def test_depth_to_space_undoes_space_to_depth():
    x = jax.random.normal(jax.random.key(0), (1, 4, 6, 2, 3))
    there = video_vae.space_to_depth(x, (2, 3, 1))
    assert there.shape == (1, 2, 2, 2, 18)
    np.testing.assert_array_equal(video_vae.depth_to_space(there, (2, 3, 1)), x)


def test_space_to_depth_puts_the_block_fastest_then_its_columns():
    x = jnp.arange(8.0).reshape(1, 1, 2, 2, 2)  # rows x columns x channels
    there = video_vae.space_to_depth(x, (1, 2, 2))
    np.testing.assert_array_equal(there.ravel(), [0, 2, 4, 6, 1, 3, 5, 7])


def _silent(module, x):
    """The module with its convolution at zero: what the shortcut alone gives."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    return module.apply(zeros, x)


def test_the_shortcut_of_a_downsampling_is_the_mean_of_channel_groups():
    pads = video_vae._pads(True, "zeros")
    down = video_vae.Down(Resample((1, 2, 2), 2, 4, shortcut=True), pads)
    x = jnp.arange(8.0).reshape(1, 1, 2, 2, 2)
    np.testing.assert_allclose(_silent(down, x).ravel(), [1, 5, 2, 6])


def test_a_temporal_downsampling_counts_the_first_frame_twice():
    pads = video_vae._pads(True, "zeros")
    down = video_vae.Down(Resample((2, 1, 1), 1, 2, shortcut=True), pads)
    x = jnp.arange(1.0, 4.0).reshape(1, 3, 1, 1, 1)
    np.testing.assert_allclose(_silent(down, x).ravel(), [1, 1, 2, 3])


def test_the_shortcut_of_an_upsampling_repeats_the_rearranged_input():
    pads = video_vae._pads(False, "zeros")
    x = jnp.arange(8.0).reshape(1, 1, 1, 1, 8)
    for shortcut, first in ((True, [4, 4, 4, 4]), (False, [0, 0, 0, 0])):
        up = video_vae.Up(Resample((2, 2, 2), 8, 4, shortcut=shortcut), pads)
        y = _silent(up, x)
        assert y.shape == (1, 1, 2, 2, 4)  # the first of two frames is dropped
        np.testing.assert_allclose(y[0, 0, 0, 0], first)


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


@pytest.mark.parametrize(
    "section",
    [
        TINY_VIDEO | {"timestep_conditioning": True},
        {k: v for k, v in TINY_VIDEO.items() if k != "timestep_conditioning"},
        TINY_VIDEO
        | {"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]},
    ],
)
def test_a_noise_conditioned_decoder_is_refused(section):
    cfg = video_vae_config({"vae": section})
    with pytest.raises(ValueError, match="only a decoder without either"):
        video_vae.init(cfg, jax.random.key(0))
    with pytest.raises(ValueError, match="only a decoder without either"):
        video_vae.decode(cfg, {}, jnp.zeros((1, 1, 1, 1, 4)))


def test_widths_follow_the_multipliers_in_2_0_and_the_base_in_2_3():
    first = [CONFIGS[g].decoder[0] for g in ("2.0", "2.3")]
    assert first == [
        Resample((2, 2, 2), 32, 16, shortcut=True),
        Resample((2, 2, 2), 32, 16, shortcut=False),
    ]
    assert CONFIGS["2.3"].decoder[2] == Resample((2, 1, 1), 16, 8, shortcut=False)
    assert CONFIGS["2.0"].decoder[-1] == Residual(4, 1)
    assert CONFIGS["2.0"].encoder[-1] == Resample((2, 2, 2), 32, 32, shortcut=True)
    assert (CFG.time_factor, CFG.space_factor) == (8, 32)


def test_padding_defaults_are_zeros_for_the_encoder_and_reflect_for_the_decoder():
    assert (CFG.encoder_padding, CFG.decoder_padding) == ("zeros", "reflect")
    newer = CONFIGS["2.3"]
    assert (newer.encoder_padding, newer.decoder_padding) == ("zeros", "zeros")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_layer": "group_norm"}, "norm_layer = 'group_norm' is not supported"),
        ({"latent_log_var": "none"}, "latent_log_var 'none' is not supported"),
        ({"spatial_padding_mode": "circular"}, "'circular' is not supported"),
        ({"encoder_blocks": [["res_x_y", {}]]}, "encoder block 'res_x_y' is not"),
        ({"decoder_blocks": [["attn_res_x", {}]]}, "decoder block 'attn_res_x' is"),
    ],
)
def test_a_config_of_another_network_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        video_vae_config({"vae": TINY_VIDEO | change})


def test_a_checkpoint_without_the_section_is_refused():
    with pytest.raises(ValueError, match=r"no 'vae' section, got \['transformer'\]"):
        video_vae_config({"transformer": {}})

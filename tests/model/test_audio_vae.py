from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_sections import TINY_AUDIO, audio_section

from idlora_jax.config_codecs import audio_vae_config
from idlora_jax.model import audio_vae

CFG = audio_vae_config({"audio_vae": TINY_AUDIO})
ATTENDING = audio_vae_config(
    {
        "audio_vae": audio_section(
            attn_resolutions=[64], mid_block_add_attention=True, resolution=256
        )
    }
)


@pytest.fixture(scope="module")
def params():
    return audio_vae.init(CFG, jax.random.key(0))


@pytest.fixture(scope="module")
def encode(params):
    return jax.jit(partial(audio_vae.encode, CFG, params))


@pytest.fixture(scope="module")
def decode(params):
    return jax.jit(partial(audio_vae.decode, CFG, params))


def test_four_mel_frames_make_one_latent_frame_rounded_up(params):
    for frames, expected in ((1, 1), (4, 1), (5, 2), (25, 7), (30, 8)):
        mel = jax.ShapeDtypeStruct((2, frames, 16, 2), jnp.float32)
        shape = jax.eval_shape(partial(audio_vae.encode, CFG, params), mel).shape
        assert shape == (2, expected, 4, 2)


def test_t_latent_frames_decode_to_4t_minus_3_mel_frames(params):
    for frames in (1, 2, 6):
        latent = jax.ShapeDtypeStruct((2, frames, 4, 2), jnp.float32)
        shape = jax.eval_shape(partial(audio_vae.decode, CFG, params), latent).shape
        assert shape == (2, 4 * frames - 3, 16, 2)


def test_later_mel_frames_leave_earlier_latents_unchanged(encode):
    mel = jax.random.normal(jax.random.key(1), (1, 9, 16, 2))
    before, after = encode(mel), encode(mel.at[:, 5:].add(1))
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert float(jnp.abs(before[:, 2] - after[:, 2]).min()) > 1e-4


def test_later_latents_leave_earlier_mel_frames_unchanged(decode):
    latent = jax.random.normal(jax.random.key(1), (1, 3, 4, 2))
    before, after = decode(latent), decode(latent.at[:, 2].add(1))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert float(jnp.abs(before[:, 5:] - after[:, 5:]).max()) > 1e-4


def test_attention_sees_later_frames_too():
    params = audio_vae.init(ATTENDING, jax.random.key(0))
    attentions = {
        part: [n for n in ("down_0", "down_2", "up_0", "up_2", "mid") if n in tree]
        for part in ("encoder", "decoder")
        for tree in [
            {k: v for k, v in params[part].items() if any("attn" in n for n in v)}
        ]
    }
    assert attentions == {"encoder": ["down_2", "mid"], "decoder": ["up_2", "mid"]}
    encode = jax.jit(partial(audio_vae.encode, ATTENDING, params))
    mel = jax.random.normal(jax.random.key(1), (1, 9, 16, 2))
    assert bool((encode(mel)[:, 0] != encode(mel.at[:, 8].add(1))[:, 0]).any())


def test_attention_weights_of_equal_keys_give_the_mean_of_the_values():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 4))
    eye = {"kernel": jnp.eye(4)[None, None], "bias": jnp.zeros(4)}
    none = {"kernel": jnp.zeros((1, 1, 4, 4)), "bias": jnp.zeros(4)}
    params = {"q": none, "k": none, "v": eye, "out": eye}
    y = audio_vae.Attention().apply({"params": params}, x)
    normed = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    expected = x + normed.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_statistics_are_ordered_by_channel_then_bin():
    stats = {"mean": jnp.arange(8.0), "std": jnp.ones(8)}
    shifted = audio_vae.unnormalize(stats, jnp.zeros((1, 1, 4, 2)))
    np.testing.assert_array_equal(shifted[0, 0, :, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(shifted[0, 0, :, 1], [4, 5, 6, 7])


def test_unnormalize_undoes_normalize():
    stats = {"mean": jnp.arange(8.0), "std": jnp.arange(1.0, 9.0)}
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    there = audio_vae.normalize(stats, x)
    np.testing.assert_allclose(audio_vae.unnormalize(stats, there), x, atol=1e-5)


def test_the_computation_runs_in_the_dtype_of_the_input(params):
    for f, shape in (("encode", (1, 5, 16, 2)), ("decode", (1, 2, 4, 2))):
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        run = partial(getattr(audio_vae, f), CFG, params)
        assert jax.eval_shape(run, x).dtype == jnp.bfloat16


def test_another_number_of_bins_or_channels_is_refused(params):
    with pytest.raises(ValueError, match=r"encode: expected \[B T 16 2\] with T >= 1"):
        audio_vae.encode(CFG, params, jnp.zeros((1, 5, 12, 2)))
    with pytest.raises(ValueError, match=r"encode: expected \[B T 16 2\] with T >= 1"):
        audio_vae.encode(CFG, params, jnp.zeros((1, 0, 16, 2)))
    with pytest.raises(ValueError, match=r"decode: expected \[B T 4 2\] with T >= 1"):
        audio_vae.decode(CFG, params, jnp.zeros((1, 5, 4, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causality_axis": "width"}, "causality_axis = 'width' is not supported"),
        ({"norm_type": "group"}, "norm_type = 'group' is not supported"),
        ({"double_z": False}, "double_z = False is not supported"),
        ({"mel_bins": 32}, r"ch = 8 must equal z_channels 2 x mel_bins 32 / 4"),
    ],
)
def test_a_config_of_another_network_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        audio_vae_config({"audio_vae": audio_section(**change)})

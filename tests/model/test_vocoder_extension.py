"""The vocoder of generation 2.3: snakes, and a second generator after the first."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_sections import TINY_VOCODER, TINY_VOCODER_23

from idlora_jax.config_vocoder import vocoder_config
from idlora_jax.model import antialias, bandwidth, vocoder
from idlora_jax.weights import rules, tables

CFG = vocoder_config({"vocoder": TINY_VOCODER_23})
EXTENSION = CFG.extension


def initial(cfg):
    return jax.jit(partial(vocoder.init, cfg))(jax.random.key(0))


@pytest.fixture(scope="module")
def params():
    return initial(CFG)


@pytest.fixture(scope="module")
def synthesize():
    return jax.jit(partial(vocoder.synthesize, CFG))


@pytest.fixture(scope="module")
def mel():
    return jax.random.normal(jax.random.key(1), (2, 5, 64, 2))


def louder(params, part, gain):
    kernel = params[part]["conv_out"]["kernel"]
    return params | {part: params[part] | {"conv_out": {"kernel": gain * kernel}}}


def test_the_waveform_is_as_long_as_both_rates_say(synthesize, params, mel):
    assert (CFG.factor, EXTENSION.ratio) == (3 * 2 * 3, 3)
    for frames in (1, 5):
        wave = synthesize(params, mel[:, :frames])
        assert wave.shape == (2, 2, frames * 18) and wave.dtype == mel.dtype


def test_it_is_clamped_where_it_is_loud_and_not_where_it_is_soft(
    synthesize, params, mel
):
    loud = np.abs(synthesize(louder(params, "bwe", 1e3), mel))
    assert loud.max() == 1 and (loud == 1).mean() > 0.5
    soft = louder(louder(params, "bwe", 1e-3), "base", 1e-3)
    assert 0 < np.abs(synthesize(soft, mel)).max() < 1


def test_the_second_generator_adds_to_the_resampled_first(synthesize, params, mel):
    low = jax.jit(partial(vocoder.generate, CFG.generator))(params["base"], mel)
    whole = bandwidth.resample(EXTENSION, jnp.pad(low, ((0, 0), (0, 2), (0, 0))))
    want = jnp.clip(whole, -1, 1)[:, : 3 * low.shape[1]].transpose(0, 2, 1)
    got = synthesize(louder(params, "bwe", 0.0), mel)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert float(jnp.abs(synthesize(params, mel) - want).max()) > 1e-3


def test_sound_of_any_length_can_be_extended(params):
    low = 0.1 * jax.random.normal(jax.random.key(0), (1, 8, 2))
    extend = jax.jit(partial(vocoder.extend, EXTENSION))
    assert extend(params, low).shape == (1, 24, 2)
    silent = extend(params, low.at[:, 5:].set(0))
    np.testing.assert_allclose(extend(params, low[:, :5]), silent[:, :15], atol=1e-6)


def test_a_chunk_sounds_as_it_does_in_the_whole(synthesize, params):
    """Frames 30 to 34, with 24 around them on both sides or with all."""
    mel = jax.random.normal(jax.random.key(2), (1, 64, 64, 2))
    whole = synthesize(params, mel)[..., 18 * 30 : 18 * 34]
    chunk = synthesize(params, mel[:, 6:58])[..., 18 * 24 : 18 * 28]
    np.testing.assert_allclose(chunk, whole, atol=1e-5)


def test_init_gives_the_buffers_that_files_hold(params):
    flat = rules.flatten(params)
    filters = [x for path, x in flat.items() if path.endswith("_filter")]
    assert len(filters) == 2 * (2 * 4 + 1 + 4 + 1)
    for x in filters:
        np.testing.assert_array_equal(x, antialias.lowpass())
    for name, want in bandwidth.bases(EXTENSION).items():
        np.testing.assert_array_equal(params["stft"][name], want)


def test_buffers_keep_the_dtype_of_the_parameters(params):
    half = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params)
    made = vocoder.with_buffers(CFG, half)
    assert {np.dtype(x.dtype) for x in jax.tree.leaves(made)} == {
        np.dtype(jnp.bfloat16)
    }
    assert jax.tree.structure(made) == jax.tree.structure(params)


def test_bfloat16_parameters_compute_in_float32(synthesize, params, mel):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    back = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    got = synthesize(half, mel)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, synthesize(back, mel), atol=1e-6)


@pytest.mark.parametrize("section", [TINY_VOCODER, TINY_VOCODER_23])
def test_no_product_is_of_reduced_precision(section):
    cfg = vocoder_config({"vocoder": section})
    like = jax.eval_shape(lambda k: vocoder.init(cfg, k), jax.random.key(0))
    mel = jax.ShapeDtypeStruct((1, 2, 64, 2), jnp.float32)
    program = str(jax.make_jaxpr(partial(vocoder.synthesize, cfg))(like, mel))
    products = re.findall(r"(?:conv_general_dilated|dot_general)\[", program)
    full = re.findall(r"precision=\(?Precision\.HIGHEST", program)
    assert len(products) == len(full) > 10


def test_one_generator_may_have_snakes_too(mel):
    section = TINY_VOCODER_23["vocoder"] | {"activation": "snake"}
    cfg = vocoder_config({"vocoder": section})
    params = jax.eval_shape(partial(vocoder.init, cfg), jax.random.key(0))
    assert set(params["res_0"]["plain_0_act"]) == {"alpha", "up_filter", "down_filter"}
    assert "beta" in params["act_out"] and "bias" not in params["conv_out"]
    assert jax.eval_shape(partial(vocoder.synthesize, cfg), params, mel).shape == (
        2,
        2,
        5 * cfg.factor,
    )


THEIRS = {
    ".resblocks.": ".resnets.",
    ".conv_pre.": ".conv_in.",
    ".conv_post.": ".conv_out.",
    ".act_post.": ".act_out.",
    ".ups.": ".upsamplers.",
    ".lowpass.filter": ".filter",
}


def their_config(section, prefix=""):
    return {
        f"{prefix}hidden_channels": section["upsample_initial_channel"],
        f"{prefix}upsample_factors": section["upsample_rates"],
        f"{prefix}upsample_kernel_sizes": section["upsample_kernel_sizes"],
        f"{prefix}resnet_kernel_sizes": section["resblock_kernel_sizes"],
        f"{prefix}resnet_dilations": section["resblock_dilation_sizes"],
    }


def their_key(key):
    for ours, theirs in THEIRS.items():
        key = key.replace(ours, theirs)
    return key.removeprefix("vocoder.")


@pytest.mark.parity
def test_diffusers_gives_the_same_sound():
    """All is random, buffers too, so that no filter is symmetric."""
    diffusers = pytest.importorskip("diffusers.pipelines.ltx2.vocoder")
    torch = pytest.importorskip("torch")
    base, bwe = TINY_VOCODER_23["vocoder"], TINY_VOCODER_23["bwe"]
    bwe = bwe | {"num_mels": 64, "hop_length": 6, "n_fft": 64}
    bwe |= {"upsample_rates": [6, 3], "upsample_kernel_sizes": [8, 5]}
    cfg = vocoder_config({"vocoder": {"vocoder": base, "bwe": bwe}})
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), initial(cfg)
    )
    params = louder(louder(params, "base", 0.1), "bwe", 0.01)
    model = diffusers.LTX2VocoderWithBWE(
        **their_config(base),
        **their_config(bwe, "bwe_"),
        filter_length=bwe["n_fft"],
        window_length=bwe["n_fft"],
        hop_length=bwe["hop_length"],
        num_mel_channels=bwe["num_mels"],
        final_act_fn="clamp",
    )
    tensors = rules.export({"vocoder": params}, tables.VOCODER)
    model.load_state_dict({their_key(k): torch.tensor(v) for k, v in tensors.items()})
    mel = rng.standard_normal((2, 4, 64, 2), np.float32)
    with torch.no_grad():
        want = model(torch.tensor(mel.transpose(0, 3, 1, 2))).numpy()
    got = jax.jit(partial(vocoder.synthesize, cfg))(params, jnp.asarray(mel))
    assert 0.01 < np.abs(want).mean() < 0.9
    np.testing.assert_allclose(got, want, atol=1e-5)

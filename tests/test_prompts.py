"""Texts -> features -> prompts with the tiny model's real files."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import prompts
from idlora_jax.data import tokenize
from idlora_jax.types import AV
from idlora_jax.weights import networks

TEXTS = ["[VISUAL]: a face [SPEECH]: hello [SOUNDS]: a voice", "worst quality", ""]


@pytest.fixture(scope="module")
def model(tiny_model):
    base, text_encoder = tiny_model
    names = ("text_encoder", "text_connector")
    nets, params = networks.load(base, names, text_encoder_path=text_encoder)
    return nets, params, tokenize.load(text_encoder)


@pytest.fixture(scope="module")
def stored(model):
    return prompts.features(*model, TEXTS)


def test_features_have_the_tokenizers_length_and_the_connectors_width(model, stored):
    nets, _, tokenizer = model
    features, mask = stored
    width = nets.text_connector.text_width
    assert features.video.shape == (3, tokenizer.length, width)
    np.testing.assert_array_equal(features.audio, features.video)
    assert mask.shape == (3, tokenizer.length) and mask.dtype == bool
    assert bool(jnp.all(jnp.diff(mask.astype(int), axis=1) >= 0))
    assert bool(jnp.all(features.video[~mask] == 0))


def test_a_text_gives_the_same_features_in_any_company(model, stored):
    features, mask = prompts.features(*model, TEXTS[1:2])
    np.testing.assert_array_equal(features.video[0], stored[0].video[1])
    np.testing.assert_array_equal(mask[0], stored[1][1])


def test_prompts_have_each_modalitys_width_and_no_mask(model, stored):
    nets, params, tokenizer = model
    prompt = prompts.prompts(nets, params, *stored)
    cfg = nets.text_connector
    assert prompt.video.shape == (3, tokenizer.length, cfg.video.width)
    assert prompt.audio.shape == (3, tokenizer.length, cfg.audio.width)
    assert prompt.mask is None
    assert bool(jnp.all(jnp.isfinite(prompt.video)))


def test_padding_is_not_read(model, stored):
    nets, params, _ = model
    features, mask = stored
    noise = jax.random.normal(jax.random.key(0), features.video.shape)
    dirty = AV(*(jnp.where(mask[..., None], x, noise) for x in features))
    chex.assert_trees_all_equal(
        prompts.prompts(nets, params, dirty, mask),
        prompts.prompts(nets, params, features, np.asarray(mask, np.int64)),
    )


def test_encode_is_both_steps(model, stored):
    nets, params, _ = model
    want = prompts.prompts(nets, params, *stored)
    chex.assert_trees_all_equal(prompts.encode(*model, TEXTS), want)


def test_another_number_of_texts_compiles_nothing(model, stored):
    nets, params, _ = model
    prompts.prompts(nets, params, *stored)
    sizes = prompts._features._cache_size(), prompts._connect._cache_size()
    prompts.encode(*model, ["one"])
    prompts.encode(*model, ["one", "two", "three", "four"])
    assert (prompts._features._cache_size(), prompts._connect._cache_size()) == sizes


def test_what_cannot_be_encoded_is_refused(model):
    nets, params, tokenizer = model
    with pytest.raises(ValueError, match="got 0 texts"):
        prompts.features(nets, params, tokenizer, [])
    with pytest.raises(ValueError, match=r"100 tokens.*multiple of 128"):
        odd = dataclasses.replace(tokenizer, length=100)
        prompts.features(nets, params, odd, TEXTS)
    with pytest.raises(ValueError, match="--text-encoder"):
        alone = {"text_connector": params["text_connector"]}
        prompts.features(nets, alone, tokenizer, TEXTS)

"""Texts -> what a data set stores for them -> the prompt the transformer attends to.

    texts --tokenize--> ids [B S] --text_encoder--> states [L + 1, B, S, D]
          --text_connector.features--> features, mask     (stored in `conditions/`)
    features, mask --text_connector.connect--> Prompt      (never stored: 20 MB each)

Every text passes alone through one compiled shape, [1 S]: a text gives the same numbers
in any company, another count of texts compiles nothing, and the states of a long list
never lie in memory together.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int

from idlora_jax import programs
from idlora_jax.config_text import TextConnectorConfig, TextEncoderConfig
from idlora_jax.data import tokenize
from idlora_jax.data.tokenize import TextTokenizer
from idlora_jax.model import text_connector, text_encoder
from idlora_jax.types import AV, Numerics, Prompt, Tree
from idlora_jax.weights.networks import Networks

Mask = Bool[ArrayLike, "B S"] | Int[ArrayLike, "B S"]


@functools.partial(programs.jit, name="text encoder", static_argnums=(0, 1))
def _features(
    encoder: TextEncoderConfig,
    connector: TextConnectorConfig,
    params: AV,
    ids: Int[Array, "B S"],
    mask: Bool[Array, "B S"],
) -> AV:
    """Tower and feature extractor; `params` are those of (encoder, connector)."""
    states = text_encoder.hidden_states(encoder, params[0], ids, mask)
    return text_connector.features(connector, params[1], states, mask)


@functools.partial(programs.jit, name="text connectors", static_argnums=(0, 1))
def _connect(
    connector: TextConnectorConfig,
    numerics: Numerics,
    params: Tree,
    features: AV,
    mask: Bool[Array, "B S"],
) -> Prompt:
    return text_connector.connect(connector, params, features, mask, numerics=numerics)


def _row_by_row(f: Callable[..., Any], *batched: Any) -> Any:
    """`f` on each row of trees of [B ...], the results joined to [B ...] again."""
    count = jax.tree.leaves(batched)[0].shape[0]
    cuts = [operator.itemgetter(slice(i, i + 1)) for i in range(count)]
    rows = [f(*jax.tree.map(cut, batched)) for cut in cuts]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


def _text_encoder(nets: Networks, params: Tree) -> TextEncoderConfig:
    if nets.text_encoder is None or "text_encoder" not in params:
        raise ValueError(
            "prompts: a text needs the text encoder, got networks without one; give "
            "the folder of gemma-3-12b-it (--text-encoder)"
        )
    return nets.text_encoder


def features(
    nets: Networks, params: Tree, tokenizer: TextTokenizer, texts: Sequence[str]
) -> tuple[AV, Bool[Array, "B S"]]:
    """What a data set stores for its captions: features before the connectors, mask.

    Args:
        nets: with `text_encoder` and `text_connector`.
        params: parameters by the same two names.
        tokenizer: of the text encoder's folder; its `length` is S.
        texts: B of them.

    Returns:
        AV of [B S D] (equal ones in generation 2.0), padded on the left, in the dtype
        of the parameters; and the mask, True for tokens.

    Raises:
        ValueError: without texts or without a text encoder, or if S is not a multiple
            of the connectors' registers.

    Source: ltx_trainer scripts/process_captions.py: compute_captions_embeddings.
    """
    encoder = _text_encoder(nets, params)
    registers = nets.text_connector.registers
    if tokenizer.length % registers or not texts:
        raise ValueError(
            f"prompts: got {len(texts)} texts of {tokenizer.length} tokens, expected "
            f"at least one text and a multiple of {registers} tokens; set "
            "model_max_length in tokenizer_config.json"
        )
    ids, mask = tokenize.encode(tokenizer, texts)
    both = AV(params["text_encoder"], params["text_connector"])
    run = functools.partial(_features, encoder, nets.text_connector, both)
    return _row_by_row(run, jnp.asarray(ids), jnp.asarray(mask)), jnp.asarray(mask)


def prompts(
    nets: Networks,
    params: Tree,
    features: AV,
    mask: Mask,
    *,
    numerics: Numerics = "exact",
) -> Prompt:
    """Run the connectors: stored features -> what the transformer attends to.

    Args:
        nets: with `text_connector`.
        params: parameters by the same name.
        features: AV of [B S D], padded on the left.
        mask: [B S], True (1) for tokens.
        numerics: how the rotary frequencies are built.

    Returns:
        Prompt of [B S D] and [B S Da], all tokens valid (mask None).

    Source: ltx_core/text_encoders/gemma/embeddings_connector.py.
    """
    run = functools.partial(
        _connect, nets.text_connector, numerics, params["text_connector"]
    )
    valid = jnp.asarray(mask).astype(bool)
    return _row_by_row(run, AV(*map(jnp.asarray, features)), valid)


def encode(
    nets: Networks, params: Tree, tokenizer: TextTokenizer, texts: Sequence[str]
) -> Prompt:
    """`features`, then `prompts`: texts -> Prompt of [B S D] and [B S Da]."""
    return prompts(nets, params, *features(nets, params, tokenizer, texts))

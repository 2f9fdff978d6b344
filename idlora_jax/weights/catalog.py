"""The networks of a base checkpoint: keys, rules, configuration, shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from idlora_jax import config as core
from idlora_jax import config_codecs, config_text, config_video_vae, config_vocoder
from idlora_jax.config import Generation
from idlora_jax.model import (
    audio_vae,
    text_connector,
    transformer,
    video_vae,
    vocoder,
)
from idlora_jax.types import Tree
from idlora_jax.weights import tables
from idlora_jax.weights.rules import Rule

_DIT = "model.diffusion_model."
STATES = 49
"""Of Gemma-3 12B, where nothing tells how many the text encoder gives."""


class Network(NamedTuple):
    """How a network is read: its keys' prefixes, rules, configuration, parameters.

    `config` takes the embedded JSON, the generation, and how many states the text
    encoder gives, which only the text connector asks for.
    """

    prefixes: tuple[str, ...]
    rules: tuple[Rule, ...]
    config: Callable[[dict[str, Any], Generation, int], Any]
    init: Callable[[Any, jax.Array], Tree]


def text_width(config: dict[str, Any]) -> int:
    """The text encoder's width, which an embedded config says."""
    return config.get("transformer", {}).get("caption_channels", 3840)


NETWORKS: dict[str, Network] = {
    "transformer": Network(
        (_DIT,),
        tables.TRANSFORMER,
        lambda config, generation, _: core.transformer_config(config, generation),
        transformer.init,
    ),
    "text_connector": Network(
        (
            f"{_DIT}video_embeddings_connector.",
            f"{_DIT}audio_embeddings_connector.",
            "text_embedding_projection.",
        ),
        tables.TEXT_CONNECTOR,
        lambda config, generation, states: config_text.text_connector_config(
            config, generation, text_width=text_width(config), text_states=states
        ),
        text_connector.init,
    ),
    "video_vae": Network(
        ("vae.",),
        tables.VIDEO_VAE,
        lambda config, generation, _: config_video_vae.video_vae_config(
            config, generation
        ),
        video_vae.init,
    ),
    "audio_vae": Network(
        ("audio_vae.",),
        tables.AUDIO_VAE,
        lambda config, *_: config_codecs.audio_vae_config(config),
        audio_vae.init,
    ),
    "vocoder": Network(
        ("vocoder.",),
        tables.VOCODER,
        lambda config, *_: config_vocoder.vocoder_config(config),
        vocoder.init,
    ),
}


def network(name: str) -> Network:
    """How a network is read.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in NETWORKS:
        raise ValueError(f"weights: no network {name!r}, use one of {[*NETWORKS]}")
    return NETWORKS[name]


def owner(key: str) -> str | None:
    """The network an original key belongs to: that of its longest known prefix."""
    hits = [
        (len(prefix), name)
        for name, network in NETWORKS.items()
        for prefix in network.prefixes
        if key.startswith(prefix)
    ]
    return max(hits)[1] if hits else None


def read_config(
    name: str,
    config: dict[str, Any],
    generation: Generation,
    text_states: int = STATES,
) -> Any:
    """The frozen configuration of a network, from an embedded config.

    Raises:
        ValueError: for a name that is no network's, or a network not supported.
    """
    return network(name).config(config, generation, text_states)


@functools.lru_cache(maxsize=32)
def shapes_of(name: str, cfg: Any) -> Tree:
    """Shapes of the parameters of a network; nothing is allocated."""
    init = network(name).init
    return jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))

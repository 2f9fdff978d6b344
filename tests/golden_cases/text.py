"""The text side: the Gemma tower, the feature extractors, the connectors."""

from __future__ import annotations

import jax
import numpy as np
from goldens import Golden

from golden_cases import case
from idlora_jax.config_text import text_connector_config, text_encoder_config
from idlora_jax.model import text_connector, text_encoder
from idlora_jax.weights import rules, tables


@case("gemma3_text")
def gemma3_text(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    params = rules.import_(golden.weights, tables.GEMMA)["text_encoder"]
    run = jax.jit(text_encoder.hidden_states, static_argnums=0)
    ids, mask = golden.inputs["input_ids"], golden.inputs["attention_mask"]
    states = run(text_encoder_config(golden.config), params, ids, mask)
    return {"hidden_states": np.asarray(states)}


@case("text_embeddings", "text_embeddings_alt")
def text_embeddings(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    params = rules.import_(golden.weights, tables.TEXT_CONNECTOR)["text_connector"]
    hidden, mask = golden.inputs["hidden_states"], golden.inputs["attention_mask"]
    cfg = text_connector_config(
        golden.config,
        golden.generation,
        text_states=hidden.shape[0],
        text_width=hidden.shape[-1],
    )
    found = text_connector.features(cfg, params, hidden, mask)
    prompt = text_connector.connect(cfg, params, found, mask, numerics=numerics)
    valid = np.ones(mask.shape) if prompt.mask is None else np.asarray(prompt.mask)
    return {
        "features": np.asarray(found.video),
        "video_features": np.asarray(found.video),
        "audio_features": np.asarray(found.audio),
        "video_encoding": np.asarray(prompt.video),
        "audio_encoding": np.asarray(prompt.audio),
        "attention_mask": valid.astype(np.int64),
    }

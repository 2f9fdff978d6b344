"""What the text networks are: frozen dataclasses read from published JSON.

The encoder is described by the `config.json` of a Gemma-3 folder, in the older spelling
(`rope_theta`, `rope_local_base_freq`, `rope_scaling`, `sliding_window_pattern`) or the
newer one (`rope_parameters` and `layer_types`); a key that a file lacks has the value
transformers gives it. The connectors are described by the `connector_*` keys of the
`transformer` section embedded in an LTX-2 checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from idlora_jax.config import Generation, Json


@dataclass(frozen=True)
class TextEncoderConfig:
    """The Gemma-3 text tower.

    Attributes:
        vocab: number of tokens in the vocabulary.
        width: D.
        mlp_width: inner width of the gated MLP.
        heads: N, query heads.
        kv_heads: key and value heads, a divisor of N.
        head_dim: K.
        query_scalar: scores are scaled by `query_scalar ** -0.5`.
        norm_eps: of every norm.
        window: tokens a local layer sees, the query's own included.
        is_global: per layer, whether it sees all earlier tokens.
        global_theta: rotary base of global layers.
        global_rope_factor: positions of global layers are divided by it.
        local_theta: rotary base of local layers.
        local_rope_factor: positions of local layers are divided by it.
    """

    vocab: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    query_scalar: float
    norm_eps: float
    window: int
    is_global: tuple[bool, ...]
    global_theta: float
    global_rope_factor: float
    local_theta: float
    local_rope_factor: float

    @property
    def layers(self) -> int:
        """L; `hidden_states` gives L + 1 states."""
        return len(self.is_global)


@dataclass(frozen=True)
class ConnectorConfig:
    """One modality's connector."""

    layers: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """D: heads times head width."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TextConnectorConfig:
    """Feature extractor and both connectors.

    Attributes:
        video: the video connector.
        audio: the audio connector.
        text_width: width of the text encoder's states.
        text_states: number of states, the encoder's layers + 1.
        features: "range" (2.0: mean and range of a layer over the sample, one shared
            projection) or "rms" (2.3: per token and layer, one projection each).
        gated_attention: per-head gates in the connectors' attention.
        registers: learned tokens that fill the padding.
        max_pos: extent of the one position axis, in tokens.
        rope: how pairs of channels are rotated.
        rope_float64: the checkpoint's frequency grid.
    """

    video: ConnectorConfig
    audio: ConnectorConfig
    text_width: int
    text_states: int
    features: Literal["range", "rms"]
    gated_attention: bool
    registers: int
    max_pos: float
    rope: Literal["split", "interleaved"]
    rope_float64: bool


def _demand(where: str, section: Json, required: Mapping[str, Any], hint: str) -> None:
    """Refuse values this code does not implement; a missing key is fine."""
    for key, value in required.items():
        if section.get(key, value) != value:
            raise ValueError(
                f"{where}: {key} = {section[key]!r} is not supported, expected "
                f"{value!r}; {hint}"
            )


_GEMMA_REQUIRED = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
}


def _rope_factor(rope: Json) -> float:
    """The divisor of positions in one rope description."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(
            f"text_config: rope_type {kind!r} is not supported, expected 'default' or "
            "'linear'; LTX-2 uses the text tower of gemma-3-12b-it"
        )
    return float(rope["factor"]) if kind == "linear" else 1.0


def _ropes(t: Json) -> dict[str, float]:
    """The four rotary fields from either spelling."""
    new = t.get("rope_parameters") or {}
    glob = {**(new.get("full_attention") or {}), **(t.get("rope_scaling") or {})}
    local = new.get("sliding_attention") or {}
    if "rope_theta" in new:
        raise ValueError(
            "text_config: rope_parameters must hold 'full_attention' and "
            f"'sliding_attention', got {sorted(new)}; is this a Gemma-3 folder?"
        )
    far, near = t.get("rope_theta", 1e6), t.get("rope_local_base_freq", 1e4)
    return {
        "global_theta": float(glob.get("rope_theta", far)),
        "global_rope_factor": _rope_factor(glob),
        "local_theta": float(local.get("rope_theta", near)),
        "local_rope_factor": _rope_factor(local),
    }


def _is_global(t: Json, layers: int) -> tuple[bool, ...]:
    """Which layers see everything, from `layer_types` or from the period."""
    kinds = t.get("layer_types")
    if kinds is None:
        period = t.get("sliding_window_pattern", t.get("_sliding_window_pattern", 6))
        return tuple((layer + 1) % period == 0 for layer in range(layers))
    known = {"full_attention", "sliding_attention"}
    if len(kinds) != layers or not set(kinds) <= known:
        raise ValueError(
            f"text_config: layer_types must list {layers} of {sorted(known)}, got "
            f"{len(kinds)} of {sorted(set(kinds))}"
        )
    return tuple(kind == "full_attention" for kind in kinds)


def text_encoder_config(config: Json) -> TextEncoderConfig:
    """Read a Gemma-3 folder's `config.json` (whole, or its `text_config` alone).

    Raises:
        ValueError: if it describes another kind of network.

    Source: transformers, models/gemma3: Gemma3TextConfig.
    """
    t = config.get("text_config", config)
    hint = "LTX-2 uses the text tower of gemma-3-12b-it"
    _demand("text_config", t, _GEMMA_REQUIRED, hint)
    if t.get("use_bidirectional_attention"):
        raise ValueError(
            f"text_config: use_bidirectional_attention is not supported; {hint}"
        )
    heads, kv_heads = t.get("num_attention_heads", 8), t.get("num_key_value_heads", 4)
    if heads % kv_heads:
        raise ValueError(
            f"text_config: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    return TextEncoderConfig(
        vocab=t.get("vocab_size", 262_208),
        width=t.get("hidden_size", 2304),
        mlp_width=t.get("intermediate_size", 9216),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=t.get("head_dim", 256),
        query_scalar=float(t.get("query_pre_attn_scalar", 256)),
        norm_eps=float(t.get("rms_norm_eps", 1e-6)),
        window=t.get("sliding_window", 4096),
        is_global=_is_global(t, t.get("num_hidden_layers", 26)),
        **_ropes(t),
    )


_PROJECTED_BEFORE = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
}
_CONNECTOR_REQUIRED = {
    "use_embeddings_connector": True,
    "connector_norm_output": True,
    "text_encoder_norm_type": "per_token_rms",
}


def _features(t: Json, generation: Generation | None) -> Literal["range", "rms"]:
    """Which feature extractor: the newer one is named by four keys together."""
    given = {key: t[key] for key in _PROJECTED_BEFORE if key in t}
    if not given:
        return "range"
    if given != _PROJECTED_BEFORE:
        raise ValueError(
            f"transformer config: caption keys {given} fit no known feature extractor, "
            f"expected none of them or {_PROJECTED_BEFORE}"
        )
    if generation == "2.0":
        raise ValueError(
            "transformer config: caption_proj_before_connector belongs to generation "
            "2.3, got generation '2.0'; read the file as '2.3'"
        )
    return "rms"


def text_connector_config(
    config: Json,
    generation: Generation | None = None,
    *,
    text_width: int = 3840,
    text_states: int = 49,
) -> TextConnectorConfig:
    """Read the `connector_*` keys of an embedded config.

    Args:
        config: the whole embedded JSON.
        generation: if given, must not contradict the config's keys.
        text_width: width of the text encoder (no checkpoint states it).
        text_states: number of the text encoder's states, layers + 1.

    Raises:
        ValueError: if the keys describe other networks.

    Source: ltx_core/text_encoders/gemma/embeddings_connector.py and
    encoders/encoder_configurator.py: EmbeddingsProcessorConfigurator (2.3); the 2.0
    code fixes the values that its checkpoints carry.
    """
    t = config.get("transformer", {})
    hint = "this is not an LTX-2 2.0 or 2.3 checkpoint"
    _demand("transformer config", t, _CONNECTOR_REQUIRED, hint)

    def connector(prefix: str, old: ConnectorConfig) -> ConnectorConfig:
        return ConnectorConfig(
            layers=t.get(f"{prefix}connector_num_layers", old.layers),
            heads=t.get(f"{prefix}connector_num_attention_heads", old.heads),
            head_dim=t.get(f"{prefix}connector_attention_head_dim", old.head_dim),
        )

    video = connector("", ConnectorConfig(layers=2, heads=30, head_dim=128))
    audio = connector("audio_", video)
    features = _features(t, generation)
    if features == "range" and {video.width, audio.width} != {text_width}:
        raise ValueError(
            f"transformer config: connectors of widths {video.width} (video) and "
            f"{audio.width} (audio) must equal the text encoder's, {text_width}"
        )
    return TextConnectorConfig(
        video=video,
        audio=audio,
        text_width=text_width,
        text_states=text_states,
        features=features,
        gated_attention=t.get("connector_apply_gated_attention", False),
        registers=t.get("connector_num_learnable_registers", 128),
        max_pos=float(t.get("connector_positional_embedding_max_pos", [1])[0]),
        rope=t.get("rope_type", "interleaved"),
        rope_float64=t.get("frequencies_precision") == "float64",
    )

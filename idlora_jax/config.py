"""What a network is: frozen dataclasses read from a checkpoint's embedded JSON.

Defaults are those of the reference code for keys a file lacks; the real files set most
of them otherwise (shared facts, section 2), so always read the file's own config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Generation = Literal["2.0", "2.3"]
BlindGradient = Literal["softmax", "fused"]
Json = Mapping[str, Any]

AUDIO_TARGETS = (
    "blocks/audio/self_attn/*",
    "blocks/audio/text_attn/*",
    "blocks/audio/cross_attn/*",
    "blocks/video/cross_attn/*",
    "blocks/audio/ff/*",
)
"""The 18 modules per layer that ID-LoRA adapts (gates are not among them)."""


@dataclass(frozen=True)
class ModalityConfig:
    """One modality of the transformer. `max_pos`: seconds, then pixels."""

    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    text_width: int
    max_pos: tuple[float, ...]

    @property
    def width(self) -> int:
        """D: heads times head width."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TransformerConfig:
    """The audio-video diffusion transformer of either generation.

    Two fields are behaviour that no weight shape reveals: `cross_sigma` (whose timestep
    modulates audio-video attention: the modality's own tokens, or the other's sigma)
    and `skipped_self_attention` (drop the residual, or pass the values through).
    `blind_gradient` is how rows that see no text are differentiated in training:
    "softmax", or S times that as fused attention kernels do (`attention.blind`).
    """

    layers: int
    video: ModalityConfig
    audio: ModalityConfig
    caption_channels: int
    caption_projection: bool
    gated_attention: bool
    text_adaln: bool
    rope: Literal["split", "interleaved"]
    rope_float64: bool
    rope_theta: float
    cross_width: int
    timestep_scale: float
    cross_gate_scale: float
    norm_eps: float
    cross_sigma: Literal["own", "other"]
    skipped_self_attention: Literal["drop", "values"]
    blind_gradient: BlindGradient = "softmax"

    @property
    def generation(self) -> Generation:
        """The generation whose behaviour this configuration has."""
        return "2.0" if self.cross_sigma == "own" else "2.3"


def detect_generation(config: Json, model_version: str | None = None) -> Generation:
    """Which generation an embedded config (all sections) belongs to."""
    if model_version:
        return "2.3" if model_version.startswith("2.3") else "2.0"
    t = config.get("transformer", {})
    newer = ("caption_proj_before_connector", "cross_attention_adaln")
    newer += ("apply_gated_attention",)
    return "2.3" if any(t.get(key) for key in newer) else "2.0"


_REQUIRED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "use_middle_indices_grid": True,
}


def _check_required(section: Json) -> None:
    for key, value in _REQUIRED.items():
        if section.get(key, value) != value:
            raise ValueError(
                f"transformer config: {key} = {section[key]!r} is not supported, "
                f"expected {value!r}; this is not an LTX-2 2.0 or 2.3 checkpoint"
            )


def _modality(t: Json, prefix: str, heads: int, width: int) -> ModalityConfig:
    default_pos = [20] if prefix else [20, 2048, 2048]
    head_dim = 64 if prefix else 128
    extent = t.get(f"{prefix}positional_embedding_max_pos", default_pos)
    return ModalityConfig(
        heads=t.get(f"{prefix}num_attention_heads", heads),
        head_dim=t.get(f"{prefix}attention_head_dim", head_dim),
        in_channels=t.get(f"{prefix}in_channels", 128),
        out_channels=t.get(f"{prefix}out_channels", 128),
        text_width=t.get(f"{prefix}cross_attention_dim", width),
        max_pos=tuple(map(float, extent)),
    )


def transformer_config(
    config: Json, generation: Generation | None = None
) -> TransformerConfig:
    """Read the `transformer` section of an embedded config.

    Args:
        config: the whole embedded JSON.
        generation: overrides what the config's keys suggest.

    Raises:
        ValueError: if the section describes another kind of network.
    """
    if "transformer" not in config:
        raise ValueError(
            f"config has no 'transformer' section, got {sorted(config)}; "
            "is this an LTX-2 checkpoint?"
        )
    t = config["transformer"]
    _check_required(t)
    old = (generation or detect_generation(config)) == "2.0"
    return TransformerConfig(
        layers=t.get("num_layers", 48),
        video=_modality(t, "", 32, 4096),
        audio=_modality(t, "audio_", 32, 2048),
        caption_channels=t.get("caption_channels", 3840),
        caption_projection=not t.get("caption_proj_before_connector", False),
        gated_attention=t.get("apply_gated_attention", False),
        text_adaln=t.get("cross_attention_adaln", False),
        rope=t.get("rope_type", "interleaved"),
        rope_float64=t.get("frequencies_precision") == "float64",
        rope_theta=float(t.get("positional_embedding_theta", 10000.0)),
        cross_width=t.get("audio_cross_attention_dim", 2048),
        timestep_scale=float(t.get("timestep_scale_multiplier", 1000)),
        cross_gate_scale=float(t.get("av_ca_timestep_scale_multiplier", 1)),
        norm_eps=t.get("norm_eps", 1e-6),
        cross_sigma="own" if old else "other",
        skipped_self_attention="drop" if old else "values",
    )


_BOTH = {
    "av_ca_timestep_scale_multiplier": 1000.0,
    "frequencies_precision": "float64",
    "rope_type": "split",
}
_NEWER = {
    "apply_gated_attention": True,
    "caption_proj_before_connector": True,
    "cross_attention_adaln": True,
}
_TINY = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "cross_attention_dim": 64,
    "audio_num_attention_heads": 4,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 32,
    "caption_channels": 48,
}

_CONNECTORS: Mapping[Generation, Json] = {
    "2.0": {"connector_positional_embedding_max_pos": [4096]},
    "2.3": {
        "connector_positional_embedding_max_pos": [4096],
        "connector_num_layers": 8,
        "connector_num_attention_heads": 32,
        "connector_apply_gated_attention": True,
        "audio_connector_num_attention_heads": 32,
        "audio_connector_attention_head_dim": 64,
        "text_encoder_norm_type": "per_token_rms",
        "caption_projection_first_linear": False,
        "caption_projection_second_linear": False,
        "caption_proj_input_norm": False,
    },
}


def published(generation: Generation) -> dict[str, Any]:
    """What the published checkpoint of a generation embeds on transformer and text.

    Keys whose values are the reference code's defaults are left out.
    """
    newer = _NEWER if generation == "2.3" else {}
    return {"transformer": _BOTH | newer | dict(_CONNECTORS[generation])}


LTX2_19B = transformer_config(published("2.0"))
"""The published transformer of LTX-2, generation 2.0."""

LTX2_3_22B = transformer_config(published("2.3"))
"""The published transformer of LTX-2.3."""


def tiny_section(generation: Generation = "2.0") -> dict[str, Any]:
    """The `transformer` section of the tiny checkpoint, as embedded in a file."""
    return _BOTH | _TINY | (_NEWER if generation == "2.3" else {})


def tiny(generation: Generation = "2.0") -> TransformerConfig:
    """A transformer of either generation that runs in milliseconds."""
    return transformer_config({"transformer": tiny_section(generation)})

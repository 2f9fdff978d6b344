"""Embedded config <-> config.json of diffusers: the transformer and the connectors.

An original file embeds one JSON object with a section per network; diffusers keeps a
flat config.json beside every network. `..._to_diffusers` makes these of a configuration
that was read, `..._to_original` makes sections that our readers take. Fields that a
folder lacks have the defaults of diffusers' classes, which are not those of original
files; values that no LTX-2 of generation 2.0 or 2.3 has are refused.

Source: diffusers, models/transformers/transformer_ltx2.py and pipelines/ltx2/
connectors.py (parameters of the classes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from idlora_jax.config import Json, TransformerConfig
from idlora_jax.config_text import TextConnectorConfig

Section = dict[str, Any]


def demand(component: str, config: Json, required: Json) -> None:
    """Refuse values that the networks here do not have; a missing key is fine.

    Raises:
        ValueError: naming the key.
    """
    for key, value in required.items():
        found = config.get(key, value)
        found = list(found) if isinstance(found, tuple) else found
        if found != value:
            raise ValueError(
                f"{component}/config.json: {key} = {found!r} is not supported, "
                f"expected {value!r}; use a folder of LTX-2 or LTX-2.3"
            )


def _alike(component: str, config: Json, pairs: Iterable[tuple[str, str]]) -> None:
    for a, b in pairs:
        demand(component, config, {b: config[a]})


def number(value: float | int) -> float | int:
    """The same number, as an integer if it is whole."""
    return int(value) if float(value).is_integer() else value


_TRANSFORMER_FIXED = {
    "patch_size": 1,
    "patch_size_t": 1,
    "vae_scale_factors": [8, 32, 32],
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
    "audio_scale_factor": 4,
    "audio_sampling_rate": 16000,
    "audio_hop_length": 160,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "attention_bias": True,
    "attention_out_bias": True,
    "causal_offset": 1,
}
_TRANSFORMER_NEWER = {
    "ff_bias": True,
    "audio_ff_bias": True,
    "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": False,
}
_TRANSFORMER_DEFAULTS = {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "pos_embed_max_pos": 20,
    "base_height": 2048,
    "base_width": 2048,
    "gated_attn": False,
    "cross_attn_mod": False,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_pos_embed_max_pos": 20,
    "audio_gated_attn": False,
    "audio_cross_attn_mod": False,
    "num_layers": 48,
    "norm_eps": 1e-6,
    "caption_channels": 3840,
    "rope_theta": 10000.0,
    "rope_double_precision": True,
    "timestep_scale_multiplier": 1000,
    "cross_attn_timestep_scale_multiplier": 1000,
    "rope_type": "interleaved",
    "use_prompt_embeddings": True,
}
_SAME = (
    "in_channels",
    "out_channels",
    "num_attention_heads",
    "attention_head_dim",
    "cross_attention_dim",
    "audio_in_channels",
    "audio_out_channels",
    "audio_num_attention_heads",
    "audio_attention_head_dim",
    "audio_cross_attention_dim",
    "num_layers",
    "norm_eps",
    "caption_channels",
    "rope_type",
    "timestep_scale_multiplier",
)
"""Keys of the transformer that both sides spell alike."""

_RENAMED = {
    "positional_embedding_theta": "rope_theta",
    "av_ca_timestep_scale_multiplier": "cross_attn_timestep_scale_multiplier",
    "apply_gated_attention": "gated_attn",
    "cross_attention_adaln": "cross_attn_mod",
}
_ORIGINAL_FIXED = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "cross_attention_norm": True,
    "upcast_attention": False,
    "use_linear_projection": False,
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "positional_embedding_type": "rope",
    "causal_temporal_positioning": True,
    "use_audio_video_cross_attention": True,
    "share_ff": False,
    "av_cross_ada_norm": True,
    "use_middle_indices_grid": True,
}
_PROJECTED_BEFORE = {
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "caption_proj_before_connector": True,
    "text_encoder_norm_type": "per_token_rms",
}
"""How 2.3 files say that the text is projected before the connectors."""


def transformer_to_diffusers(cfg: TransformerConfig) -> Section:
    """The config.json of `LTX2VideoTransformer3DModel`."""
    frames, height, width = map(number, cfg.video.max_pos)
    video, audio = cfg.video, cfg.audio
    return {
        "in_channels": video.in_channels,
        "out_channels": video.out_channels,
        "num_attention_heads": video.heads,
        "attention_head_dim": video.head_dim,
        "cross_attention_dim": video.text_width,
        "pos_embed_max_pos": frames,
        "base_height": height,
        "base_width": width,
        "gated_attn": cfg.gated_attention,
        "cross_attn_mod": cfg.text_adaln,
        "audio_in_channels": audio.in_channels,
        "audio_out_channels": audio.out_channels,
        "audio_num_attention_heads": audio.heads,
        "audio_attention_head_dim": audio.head_dim,
        "audio_cross_attention_dim": audio.text_width,
        "audio_pos_embed_max_pos": number(audio.max_pos[0]),
        "audio_gated_attn": cfg.gated_attention,
        "audio_cross_attn_mod": cfg.text_adaln,
        "num_layers": cfg.layers,
        "norm_eps": cfg.norm_eps,
        "caption_channels": cfg.caption_channels,
        "rope_theta": cfg.rope_theta,
        "rope_double_precision": cfg.rope_float64,
        "timestep_scale_multiplier": number(cfg.timestep_scale),
        "cross_attn_timestep_scale_multiplier": number(cfg.cross_gate_scale),
        "rope_type": cfg.rope,
        "use_prompt_embeddings": cfg.caption_projection,
        "perturbed_attn": cfg.skipped_self_attention == "values",
        **_TRANSFORMER_FIXED,
    }


def _precision(double: bool) -> Section:
    return {"frequencies_precision": "float64"} if double else {}


def transformer_to_original(config: Json) -> dict[str, Section]:
    """Sections of an original file from the transformer's config.json.

    Raises:
        ValueError: if it describes another kind of network.
    """
    demand("transformer", config, {**_TRANSFORMER_FIXED, **_TRANSFORMER_NEWER})
    c = {**_TRANSFORMER_DEFAULTS, **config}
    pairs = (
        ("gated_attn", "audio_gated_attn"),
        ("cross_attn_mod", "audio_cross_attn_mod"),
    )
    _alike("transformer", c, pairs)
    section = {
        **_ORIGINAL_FIXED,
        **{key: c[key] for key in _SAME},
        **{ours: c[theirs] for ours, theirs in _RENAMED.items()},
        "positional_embedding_max_pos": [
            c[key] for key in ("pos_embed_max_pos", "base_height", "base_width")
        ],
        "audio_positional_embedding_max_pos": [c["audio_pos_embed_max_pos"]],
        **_precision(c["rope_double_precision"]),
        **({} if c["use_prompt_embeddings"] else _PROJECTED_BEFORE),
    }
    return {"transformer": section}


_CONNECTOR_DEFAULTS = {
    "caption_channels": 3840,
    "connector_rope_base_seq_len": 4096,
    "rope_double_precision": True,
    "rope_type": "interleaved",
    "per_modality_projections": False,
    "proj_bias": False,
    "video_hidden_dim": 4096,
    "audio_hidden_dim": 2048,
} | {
    f"{side}_{key}": value
    for side in ("video", "audio")
    for key, value in {
        "connector_num_attention_heads": 30,
        "connector_attention_head_dim": 128,
        "connector_num_layers": 2,
        "connector_num_learnable_registers": 128,
        "gated_attn": False,
    }.items()
}


def connectors_to_diffusers(cfg: TextConnectorConfig) -> Section:
    """The config.json of `LTX2TextConnectors`."""
    separate = cfg.features == "rms"
    config: Section = {
        "caption_channels": cfg.text_width,
        "text_proj_in_factor": cfg.text_states,
        "connector_rope_base_seq_len": number(cfg.max_pos),
        "rope_theta": 10000.0,
        "rope_double_precision": cfg.rope_float64,
        "causal_temporal_positioning": False,
        "rope_type": cfg.rope,
        "per_modality_projections": separate,
        "proj_bias": separate,
    }
    for side, connector in (("video", cfg.video), ("audio", cfg.audio)):
        config |= {
            f"{side}_connector_num_attention_heads": connector.heads,
            f"{side}_connector_attention_head_dim": connector.head_dim,
            f"{side}_connector_num_layers": connector.layers,
            f"{side}_connector_num_learnable_registers": cfg.registers,
            f"{side}_gated_attn": cfg.gated_attention,
            f"{side}_hidden_dim": connector.width,
        }
    return config


def connectors_to_original(config: Json) -> dict[str, Section]:
    """Sections of an original file from the connectors' config.json.

    Raises:
        ValueError: if it describes another kind of network.
    """
    fixed = {"rope_theta": 10000.0, "causal_temporal_positioning": False}
    demand("connectors", config, fixed)
    c = {**_CONNECTOR_DEFAULTS, **config}
    alike = ("gated_attn", "connector_num_learnable_registers")
    _alike("connectors", c, [(f"video_{key}", f"audio_{key}") for key in alike])
    _alike("connectors", c, [("per_modality_projections", "proj_bias")])
    section: Section = {
        "use_embeddings_connector": True,
        "connector_norm_output": True,
        "caption_channels": c["caption_channels"],
        "connector_positional_embedding_max_pos": [c["connector_rope_base_seq_len"]],
        "connector_num_learnable_registers": c[
            "video_connector_num_learnable_registers"
        ],
        "connector_apply_gated_attention": c["video_gated_attn"],
        "rope_type": c["rope_type"],
        **_precision(c["rope_double_precision"]),
        **(_PROJECTED_BEFORE if c["per_modality_projections"] else {}),
    }
    for side, prefix in (("video", ""), ("audio", "audio_")):
        for key in ("num_attention_heads", "attention_head_dim", "num_layers"):
            section[f"{prefix}connector_{key}"] = c[f"{side}_connector_{key}"]
        if c["per_modality_projections"]:
            heads = c[f"{side}_connector_num_attention_heads"]
            width = heads * c[f"{side}_connector_attention_head_dim"]
            demand("connectors", c, {f"{side}_hidden_dim": width})
    return {"transformer": section}


def merged(sections: Iterable[tuple[str, Mapping[str, Section]]]) -> dict[str, Section]:
    """The sections of several components in one embedded config.

    Args:
        sections: pairs of a component's name and what it says.

    Raises:
        ValueError: if two components say different things.
    """
    out: dict[str, Section] = {}
    said_by: dict[tuple[str, str], str] = {}
    for component, found in sections:
        for name, section in found.items():
            held = out.setdefault(name, {})
            for key, value in section.items():
                other = said_by.setdefault((name, key), component)
                if held.setdefault(key, value) != value:
                    raise ValueError(
                        f"{component}/config.json and {other}/config.json disagree on "
                        f"{key}: got {value!r} and {held[key]!r}; take both from one "
                        "download"
                    )
    return out

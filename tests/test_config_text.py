"""Text configs: both published spellings, sparse files, refusals."""

import dataclasses

import pytest

from idlora_jax.config_text import (
    ConnectorConfig,
    text_connector_config,
    text_encoder_config,
)

OLD = {
    "model_type": "gemma3_text",
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_attention_heads": 16,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rope_local_base_freq": 20000,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 500000,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
}
KINDS = [*["sliding_attention"] * 5, "full_attention"] * 8
SHARED = {k: v for k, v in OLD.items() if "rope" not in k and "pattern" not in k}
NEW = SHARED | {
    "layer_types": KINDS,
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_theta": 500000, "rope_type": "linear"},
        "sliding_attention": {"rope_theta": 20000, "rope_type": "default"},
    },
}
V23 = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
}


def test_both_spellings_of_a_gemma_config_are_equal():
    assert text_encoder_config({"text_config": OLD}) == text_encoder_config(NEW)


def test_every_sixth_layer_is_global_and_only_global_positions_are_divided():
    cfg = text_encoder_config(OLD)
    assert [n for n, far in enumerate(cfg.is_global) if far] == list(range(5, 48, 6))
    assert (cfg.global_rope_factor, cfg.local_rope_factor) == (8.0, 1.0)
    assert (cfg.global_theta, cfg.local_theta) == (500000, 20000)


def test_keys_absent_from_a_sparse_gemma_file_take_the_published_values():
    sparse = {k: v for k, v in OLD.items() if k not in ("rope_theta", "model_type")}
    del sparse["rope_local_base_freq"], sparse["sliding_window_pattern"]
    cfg = text_encoder_config(sparse)
    assert (cfg.vocab, cfg.head_dim, cfg.query_scalar) == (262208, 256, 256)
    assert (cfg.global_theta, cfg.local_theta) == (1e6, 1e4)
    assert cfg.layers == 48 and sum(cfg.is_global) == 8


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "gemma2"}, "model_type"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"layer_types": KINDS[:-1]}, "layer_types"),
        ({"layer_types": ["chunked"] * 48}, "chunked"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
    ],
)
def test_another_kind_of_text_encoder_is_refused(change: dict, names: str):
    with pytest.raises(ValueError, match=names):
        text_encoder_config({"text_config": OLD | change})


def test_an_empty_transformer_section_means_the_connectors_of_2_0():
    cfg = text_connector_config({"transformer": {}})
    assert cfg.video == cfg.audio == ConnectorConfig(layers=2, heads=30, head_dim=128)
    assert cfg.video.width == cfg.text_width == 3840
    assert (cfg.features, cfg.gated_attention) == ("range", False)


def test_the_audio_connector_inherits_what_it_does_not_state():
    section = V23 | {
        "connector_num_layers": 8,
        "connector_num_attention_heads": 32,
        "connector_apply_gated_attention": True,
        "audio_connector_attention_head_dim": 64,
    }
    cfg = text_connector_config({"transformer": section}, "2.3")
    assert cfg.features == "rms" and cfg.gated_attention
    assert cfg.audio == dataclasses.replace(cfg.video, head_dim=64)


def test_caption_keys_that_fit_no_generation_are_refused():
    part = dict(list(V23.items())[:2])
    with pytest.raises(ValueError, match="no known feature extractor"):
        text_connector_config({"transformer": part})
    with pytest.raises(ValueError, match=r"generation '2\.0'"):
        text_connector_config({"transformer": V23}, "2.0")


def test_connectors_narrower_than_the_shared_features_are_refused():
    with pytest.raises(ValueError, match="widths 1920"):
        text_connector_config({"transformer": {"connector_num_attention_heads": 15}})

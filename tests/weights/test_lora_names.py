"""What every tool calls a module: no name means two, no module has none."""

import functools

import pytest

from idlora_jax import config, tiny
from idlora_jax.weights import io, lora_names, tables
from idlora_jax.weights.lora_names import FORMATS

generations = pytest.mark.parametrize("generation", ["2.0", "2.3"])


@functools.cache
def slots(generation):
    embedded = tiny.tiny_config(generation)
    bases = {
        name: io.shapes_of(name, io.read_config(name, embedded, generation, 7))
        for name in ("transformer", "text_connector")
    }
    return lora_names.slots(bases)


def names(generation, format):
    return [
        lora_names.filled(lora_names.spelled(slot.module, format) or "", slot.layer)
        for slot in slots(generation)
    ]


def test_every_linear_kernel_of_both_networks_has_a_module():
    rules = tables.TRANSFORMER + tables.TEXT_CONNECTOR
    kernels = {rule.flax for rule in rules if rule.layout == "linear"}
    assert {f"{m.network}/{m.path}" for m in lora_names.MODULES} == kernels


@generations
@pytest.mark.parametrize("format", FORMATS)
def test_a_format_s_names_lead_back_to_their_places(generation, format):
    index = lora_names.index(slots(generation))
    for slot, name in zip(slots(generation), names(generation, format), strict=True):
        if name:
            assert index[name] == (format, slot)
            assert lora_names.known(name) == (slot.module, slot.layer)


def test_only_kohya_has_no_name_for_the_text_projection():
    for generation, count in (("2.0", 1), ("2.3", 2)):
        for format in FORMATS:
            missing = names(generation, format).count("")
            assert missing == (count if format == "kohya" else 0)


def test_the_names_are_those_the_tools_use():
    by_path = {(m.network, m.path): m for m in lora_names.MODULES}
    block = by_path["transformer", "blocks/video/cross_attn/out/kernel"]
    ada = by_path["transformer", "audio/ada/down/kernel"]
    text = by_path["text_connector", "projection/shared/kernel"]
    connector = by_path["text_connector", "audio/blocks/attn/k/kernel"]
    found = {
        (m.original, format): lora_names.filled(lora_names.spelled(m, format), 7)
        for m in (block, ada, text, connector)
        for format in FORMATS
        if lora_names.spelled(m, format)
    }
    out = "transformer_blocks.7.audio_to_video_attn.to_out.0"
    embed = "emb.timestep_embedder.linear_2"
    key = "audio_embeddings_connector.transformer_1d_blocks.7.attn1.to_k"
    assert [*found.values()] == [
        f"diffusion_model.{out}",
        f"transformer.{out}",
        f"base_model.model.{out}",
        "lora_unet_transformer_blocks_7_audio_to_video_attn_to_out_0",
        f"diffusion_model.audio_adaln_single.{embed}",
        f"transformer.audio_time_embed.{embed}",
        f"base_model.model.audio_time_embed.{embed}",
        "lora_unet_audio_adaln_single_emb_timestep_embedder_linear_2",
        "text_embedding_projection.aggregate_embed",
        "connectors.text_proj_in",
        "base_model.model.text_proj_in",
        f"diffusion_model.{key}",
        "connectors.audio_connector.transformer_blocks.7.attn1.to_k",
        "base_model.model.audio_connector.transformer_blocks.7.attn1.to_k",
        f"lora_unet_{key.replace('.', '_')}",
    ]


@pytest.mark.parametrize("name", ["nose", "transformer.", "lora_unet_transformer"])
def test_a_name_of_nothing_is_not_known(name):
    assert lora_names.known(name) is None


def test_places_are_those_of_the_model_s_depth():
    shapes = {"transformer": io.shapes_of("transformer", config.tiny())}
    layers = {slot.layer for slot in lora_names.slots(shapes)}
    assert layers == {None, *range(config.tiny().layers)}


def test_a_trainer_that_wraps_the_model_has_names_of_its_own():
    index = lora_names.index(slots("2.3"))
    names = {
        "lora_unet_model_transformer_blocks_1_audio_ff_net_0_proj": (
            "transformer",
            "blocks/audio/ff/up/kernel",
        ),
        "lora_unet_embeddings_connector_transformer_1d_blocks_1_attn1_to_q": (
            "text_connector",
            "video/blocks/attn/q/kernel",
        ),
    }
    for name, place in names.items():
        format, slot = index[name]
        assert (slot.module.network, slot.module.path) == place
        assert (format, slot.layer) == ("kohya", 1)
        assert lora_names.known(name) == (slot.module, 1)

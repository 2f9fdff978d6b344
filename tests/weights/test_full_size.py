"""The published models without their weights: shapes from config, keys from rules."""

import math

import pytest
import sparse_files

from idlora_jax import config, tiny
from idlora_jax.weights import io, leaves, rules, tables

CONNECTORS = {
    "2.0": {"connector_num_attention_heads": 30, "connector_num_layers": 2},
    "2.3": {
        "connector_num_attention_heads": 32,
        "connector_num_layers": 8,
        "connector_apply_gated_attention": True,
        "audio_connector_attention_head_dim": 64,
        "caption_proj_before_connector": True,
        "caption_projection_first_linear": False,
        "caption_projection_second_linear": False,
        "caption_proj_input_norm": False,
    },
}
# Tensors and parameters of the published checkpoints, connectors with projection.
PUBLISHED = {
    ("transformer", "2.0"): (3_510, 18_876_174_592),
    ("transformer", "2.3"): (4_186, 18_988_838_144),
    ("text_connector", "2.0"): (29 + 29 + 1, 2 * 354_470_400 + 722_534_400),
    ("text_connector", "2.3"): (
        129 + 129 + 4,
        1_612_546_304 + 403_620_096 + 1_156_061_184,
    ),
}
FILES = {"2.0": "ltx-2-19b", "2.3": "ltx-2.3-22b"}


def configuration(name, generation):
    if name == "transformer":
        return {"2.0": config.LTX2_19B, "2.3": config.LTX2_3_22B}[generation]
    return io.read_config(name, {"transformer": CONNECTORS[generation]}, generation)


def torch_shapes(name, shapes):
    """Original key -> shape of everything in a network's tree of shapes."""
    table = tables.GEMMA if name == "text_encoder" else io.NETWORKS[name].rules
    needed = leaves.sources(name, shapes, table)
    return {key: s.torch_shape for s in needed.values() for key in s.keys}


@pytest.mark.parametrize(("name", "generation"), PUBLISHED)
def test_a_published_network_has_the_published_number_of_parameters(name, generation):
    shapes = io.shapes_of(name, configuration(name, generation))
    found = torch_shapes(name, shapes)
    count = sum(math.prod(shape) for shape in found.values())
    assert (len(found), count) == PUBLISHED[name, generation]


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
@pytest.mark.parametrize(
    "name", ["transformer", "text_connector", "video_vae", "vocoder"]
)
def test_the_keys_of_a_tiny_network_lead_back_to_its_parameters(name, generation):
    cfg = io.read_config(name, tiny.tiny_config(generation), generation, 7)
    shapes = io.shapes_of(name, cfg)
    keys = torch_shapes(name, shapes)
    assert {io.owner(key) for key in keys} == {name}
    paths = set(rules.plan(keys, tables.BASE))
    assert paths == set(rules.flatten(shapes, name))


@pytest.mark.parametrize("generation", FILES)
def test_the_constants_are_what_the_published_configs_say(generation):
    read = config.transformer_config(sparse_files.config(FILES[generation]))
    assert read == configuration("transformer", generation)
    assert read.generation == generation

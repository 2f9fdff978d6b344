"""The published models without their weights: shapes from config, keys from rules."""

import gzip
import json
import math
import os
import pathlib

import jax
import pytest

from idlora_jax import config, tiny
from idlora_jax.config_text import text_encoder_config
from idlora_jax.model import text_encoder
from idlora_jax.weights import adapter_files, io, leaves, rules, tables

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
MANIFESTS = os.environ.get("IDLORA_MANIFESTS")
CONFIGS = os.environ.get("IDLORA_CONFIGS")
needs_manifests = pytest.mark.skipif(
    not (MANIFESTS and CONFIGS),
    reason="IDLORA_MANIFESTS and IDLORA_CONFIGS name no folders of published files",
)


def configuration(name, generation):
    if name == "transformer":
        return {"2.0": config.LTX2_19B, "2.3": config.LTX2_3_22B}[generation]
    return io.read_config(name, {"transformer": CONNECTORS[generation]}, generation)


def torch_shapes(name, shapes):
    """Original key -> shape of everything in a network's tree of shapes."""
    table = tables.GEMMA if name == "text_encoder" else io.NETWORKS[name].rules
    needed = leaves.sources(name, shapes, table)
    return {key: s.torch_shape for s in needed.values() for key in s.keys}


def manifest(file):
    path = pathlib.Path(MANIFESTS or "", f"{file}.json.gz")
    found = json.loads(gzip.decompress(path.read_bytes()))
    return {key: tuple(value["shape"]) for key, value in found.items()}


@pytest.mark.parametrize(("name", "generation"), PUBLISHED)
def test_a_published_network_has_the_published_number_of_parameters(name, generation):
    shapes = io.shapes_of(name, configuration(name, generation))
    found = torch_shapes(name, shapes)
    count = sum(math.prod(shape) for shape in found.values())
    assert (len(found), count) == PUBLISHED[name, generation]


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
@pytest.mark.parametrize("name", ["transformer", "text_connector", "video_vae"])
def test_the_keys_of_a_tiny_network_lead_back_to_its_parameters(name, generation):
    cfg = io.read_config(name, tiny.tiny_config(generation), generation, 7)
    shapes = io.shapes_of(name, cfg)
    keys = torch_shapes(name, shapes)
    assert {io.owner(key) for key in keys} == {name}
    paths = set(rules.plan(keys, tables.BASE))
    assert paths == set(rules.flatten(shapes, name))


@needs_manifests
@pytest.mark.parametrize("generation", FILES)
def test_a_published_file_holds_exactly_the_keys_and_shapes_of_its_config(generation):
    path = pathlib.Path(CONFIGS or "", f"{FILES[generation]}.json")
    embedded = json.loads(path.read_text())
    theirs = manifest(f"{FILES[generation]}-dev")
    assert {io.owner(key) for key in theirs} == set(io.NETWORKS)
    for name in io.NETWORKS:
        if (name, generation) == ("vocoder", "2.3"):
            continue
        cfg = io.read_config(name, embedded, generation)
        want = {key: s for key, s in theirs.items() if io.owner(key) == name}
        assert torch_shapes(name, io.shapes_of(name, cfg)) == want


@needs_manifests
@pytest.mark.parametrize("generation", FILES)
def test_the_constants_are_what_the_published_configs_say(generation):
    path = pathlib.Path(CONFIGS or "", f"{FILES[generation]}.json")
    read = config.transformer_config(json.loads(path.read_text()))
    assert read == configuration("transformer", generation)
    assert read.generation == generation


@needs_manifests
def test_the_published_text_encoder_holds_exactly_its_keys_and_shapes():
    path = pathlib.Path(CONFIGS or "", "gemma-3-12b-it.json")
    cfg = text_encoder_config(json.loads(path.read_text()))
    like = jax.eval_shape(lambda k: text_encoder.init(cfg, k), jax.random.key(0))
    theirs = manifest("gemma-3-12b-it")
    kept = {k: s for k, s in theirs.items() if not k.startswith(tables.GEMMA_IGNORED)}
    assert torch_shapes("text_encoder", like) == kept


@needs_manifests
@pytest.mark.parametrize("generation", FILES)
def test_a_published_adapter_fits_its_base(generation):
    file = {"2.0": "id-lora-19b", "2.3": "id-lora-22b"}[generation]
    shapes = io.shapes_of("transformer", configuration("transformer", generation))
    tensors = {
        key: jax.ShapeDtypeStruct(shape, "bfloat16")
        for key, shape in manifest(file).items()
    }
    report = adapter_files.compare(tensors, shapes)
    assert str(report) == "1728 keys matched, 0 unmatched, 0 of a wrong shape"

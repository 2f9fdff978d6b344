"""Every published file without its weights: one rule for each key, no leaf unfilled.

The parameters' shapes come from `eval_shape` of the full-size networks, whose
configurations are the embedded ones; keys, shapes and dtypes from tests/manifests.
"""

import json
import math

import jax
import pytest
import sparse_files

from idlora_jax import config_upsampler
from idlora_jax.config_text import text_encoder_config
from idlora_jax.model import text_encoder, upsampler
from idlora_jax.weights import (
    fp8_files,
    io,
    leaves,
    lora_match,
    rules,
    tables,
)
from idlora_jax.weights.leaves import Where
from idlora_jax.weights.tensorfile import DTYPES, Spec, Tensors

INDEX = json.loads((sparse_files.MANIFESTS / "index.json").read_text("utf-8"))
HERE = Where("the manifest", "")


def tensors(name):
    found = sparse_files.manifest(name).items()
    return {k: Spec(tuple(t["shape"]), DTYPES[t["dtype"]]) for k, t in found}


def network(name, embedded, generation):
    """Sources of a base's network by path."""
    cfg = io.read_config(name, embedded, generation)
    shapes = io.shapes_of(name, cfg)
    return leaves.sources(name, shapes, io.NETWORKS[name].rules)


def base(name, held):
    """A checkpoint: its rules, and the keys and shapes that its networks ask for."""
    embedded = sparse_files.config(sparse_files.CONFIGS[name])
    generation = "2.3" if "2.3" in name else "2.0"
    asked = {}
    for part in io.NETWORKS:
        needed = network(part, embedded, generation)
        keys = [key for key in held if io.owner(key) == part]
        view = Tensors(held, {})
        found = fp8_files.from_original(view, keys, needed, HERE)
        for entry in fp8_files.original_entries(found, needed):
            asked[entry.name] = entry.spec.shape
    return tables.BASE + tables.SCALES, asked


def plain(part, shapes, table):
    needed = leaves.sources(part, shapes, table)
    return table, {key: s.torch_shape for s in needed.values() for key in s.keys}


def upscaler(name):
    cfg = config_upsampler.upsampler_config(
        sparse_files.config(sparse_files.CONFIGS[name])
    )
    shapes = jax.eval_shape(lambda key: upsampler.init(cfg, key), jax.random.key(0))
    return plain("upsampler", shapes, tables.UPSAMPLER)


def gemma():
    cfg = text_encoder_config(sparse_files.config("gemma-3-12b-it"))
    shapes = jax.eval_shape(lambda key: text_encoder.init(cfg, key), jax.random.key(0))
    return plain("text_encoder", shapes, tables.GEMMA)


def lora(name, held):
    """A LoRA fills a part of its base: what is asked for is what was matched."""
    model = {"19b": ("ltx-2-19b", "2.0"), "22b": ("ltx-2.3-22b", "2.3")}
    config_name, generation = model["19b" if "19b" in name else "22b"]
    embedded = sparse_files.config(config_name)
    bases = {
        part: io.shapes_of(part, io.read_config(part, embedded, generation))
        for part in ("transformer", "text_connector")
    }
    report = lora_match.match(held, bases)
    assert not report.unmatched and not report.wrong_shape
    return {key: held[key].shape for key in report.matched}


@pytest.mark.parametrize("name", sparse_files.NAMES)
def test_every_key_has_one_rule_and_every_parameter_its_tensor(name):
    held = tensors(name)
    assert len(held) == INDEX[name]["tensors"]
    total = sum(math.prod(spec.shape) for spec in held.values())
    assert total == INDEX[name]["params"]
    table = None
    if "lora" in name:
        asked = lora(name, held)
    elif "upscaler" in name:
        table, asked = upscaler(name)
    elif name.startswith("gemma"):
        table, asked = gemma()
        held = {k: s for k, s in held.items() if not k.startswith(tables.GEMMA_IGNORED)}
    else:
        table, asked = base(name, held)
    assert asked == {key: spec.shape for key, spec in held.items()}
    if table is not None:
        match = rules.matcher(table, "torch")
        assert {len(match(key)) for key in held} == {1}

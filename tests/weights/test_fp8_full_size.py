"""The published 8-bit checkpoint without its weights: each key, shape and byte."""

import functools
import gzip
import json
import math
import pathlib

import jax
import numpy as np

from idlora_jax import adapters, quantized
from idlora_jax.quantized import Quantized
from idlora_jax.weights import fp8, fp8_files, io, leaves, rules, tables
from idlora_jax.weights.leaves import Where
from idlora_jax.weights.tensorfile import DTYPES, Spec, Tensors

MANIFESTS = pathlib.Path(__file__).parents[1] / "manifests"
FILE = "ltx-2-19b-dev-fp8"


def read(name):
    return json.loads((MANIFESTS / name).read_text())


@functools.cache
def manifest():
    """Shape and dtype of every tensor of the file."""
    raw = gzip.decompress((MANIFESTS / f"{FILE}.json.gz").read_bytes())
    return {
        key: Spec(tuple(value["shape"]), DTYPES[value["dtype"]])
        for key, value in json.loads(raw).items()
    }


@functools.cache
def located(name):
    """Leaves and sources of a network, as if the file were there."""
    cfg = io.read_config(name, read("configs/ltx-2-19b.json"), "2.0")
    needed = leaves.sources(name, io.shapes_of(name, cfg), io.NETWORKS[name].rules)
    keys = [key for key in manifest() if io.owner(key) == name]
    where = Where("the manifest", "")
    found = fp8_files.from_original(
        Tensors(manifest(), {}), keys, needed, where, scaled=name == "transformer"
    )
    return found, needed


def test_every_key_is_matched_by_exactly_one_rule():
    match = rules.matcher(tables.BASE + tables.SCALES, "torch")
    assert {key: len(match(key)) for key in manifest()} == dict.fromkeys(manifest(), 1)


def test_every_parameter_is_filled_and_every_tensor_used():
    entries = [
        entry
        for name in io.NETWORKS
        for entry in fp8_files.original_entries(*located(name))
    ]
    assert {entry.name: entry.spec for entry in entries} == manifest()
    said = read("index.json")[FILE]
    count = sum(math.prod(entry.spec.shape) for entry in entries)
    assert (len(entries), count) == (said["tensors"], said["params"])
    assert (len(entries), count) == (6_404, 21_638_973_589)


def test_the_layers_in_8_bits_are_those_of_the_file():
    found, _ = located("transformer")
    packed = {path: leaf.narrow for path, leaf in found.items() if leaf.narrow}
    assert len(packed) == 28
    for narrow in packed.values():
        assert narrow.at == tuple(range(1, 43))
        assert set(narrow.scales) == {fp8.SCALE, fp8.INPUT_SCALE}


@functools.cache
def kept():
    """What `io.load_network(base, "transformer", weights="keep")` would give."""
    put = lambda path, leaf, dtype: jax.ShapeDtypeStruct(leaf.spec.shape, dtype)
    found, _ = located("transformer")
    flat = {p: fp8.read(p, leaf, None, "keep", put) for p, leaf in found.items()}
    return rules.nest(flat)


def test_kept_parameters_have_the_shapes_of_the_model():
    cfg = io.read_config("transformer", read("configs/ltx-2-19b.json"), "2.0")
    want = rules.flatten(io.shapes_of("transformer", cfg))
    got = rules.flatten(jax.eval_shape(quantized.plain, kept()))
    assert {p: a.shape for p, a in got.items()} == {p: a.shape for p, a in want.items()}
    assert {p: q.shape for p, q in rules.flatten(kept()).items()} == {
        path: array.shape for path, array in want.items()
    }
    new = jax.eval_shape(lambda k: adapters.init(k, kept(), 128), jax.random.key(0))
    adapters.check(new, kept())
    assert len(jax.tree.leaves(new)) == 2 * 18


def test_kept_parameters_take_a_byte_where_the_file_takes_one():
    held = sum(
        math.prod(a.shape) * np.dtype(a.dtype).itemsize for a in jax.tree.leaves(kept())
    )
    stored = sum(
        s.nbytes for k, s in manifest().items() if io.owner(k) == "transformer"
    )
    tables_of_rows = 28 * 48 * 4
    assert held == stored + tables_of_rows
    wide = 2 * sum(math.prod(q.shape) for q in rules.flatten(kept()).values())
    assert held < 0.58 * wide


def test_the_folder_would_hold_the_same_bytes():
    found, _ = located("transformer")
    entries = leaves.our_entries(fp8.stored(found, "keep", None), None)
    parts = {entry.name for entry in entries}
    assert "blocks/audio/ff/up/kernel_fp8" in parts
    packed = [q for q in rules.flatten(kept()).values() if isinstance(q, Quantized)]
    stored = sum(
        s.nbytes for k, s in manifest().items() if io.owner(k) == "transformer"
    )
    rows = 4 * 48 * len(packed)
    assert sum(entry.spec.nbytes for entry in entries) == stored + rows

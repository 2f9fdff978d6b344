"""Kernels in int8: what is rounded, what files hold, what is read, what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import eight_bits
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlora_jax import adapters, outlines, quantized
from idlora_jax.quantized import Int8
from idlora_jax.types import Tree
from idlora_jax.weights import check, convert, int8, io, rules, tensorfile
from idlora_jax.weights.leaves import Leaf
from idlora_jax.weights.tensorfile import Spec

KERNEL = "blocks/video/ff/up/kernel"


def quiet(_: str) -> None:
    """Takes lines about progress."""


@pytest.fixture(scope="module")
def folder(checkpoint: Any, tmp_path_factory: Any) -> Any:
    """The small base, converted."""
    made = tmp_path_factory.mktemp("int8") / "folder"
    assert convert.convert_base(checkpoint, made, weights="int8", say=quiet)
    return made


def load(path: Any, weights: Any = "int8", dtype: Any = None) -> Tree:
    return io.load_network(io.open_base(path), "transformer", dtype, weights=weights)


def same(got: Tree, want: Tree) -> None:
    """Equal to the bit, dtypes included."""
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(0, 2**32 - 1), st.booleans())
def test_a_value_is_at_most_half_a_step_off(wide: int, seed: int, narrow: bool):
    kernel = np.random.default_rng(seed).normal(size=(7, wide)).astype(np.float32)
    kernel = kernel.astype(ml_dtypes.bfloat16) if narrow else kernel
    kernel[:, 0] = 0
    values, scales = int8.rounded("here", kernel)
    assert values.dtype == np.int8 and scales.shape == (1, wide)
    assert (np.abs(values).max(axis=0)[1:] == int8.LARGEST).all()
    assert not values[:, 0].any() and scales[0, 0] == 0
    got = int8.widened(values, scales, np.dtype(np.float32))
    off = np.abs(got - kernel.astype(np.float32))
    assert (off <= scales * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_kernel_that_is_not_finite_is_refused_by_name(wrong: float):
    kernel = np.ones((3, 2), np.float32)
    kernel[1, 1] = wrong
    leaf = Leaf(Spec((1, 3, 2), kernel.dtype), 1, lambda _: kernel)
    with pytest.raises(ValueError, match=f"{KERNEL}, layer 0: got .* not finite"):
        int8.quantised(KERNEL, leaf).piece(0)


def test_each_piece_is_read_once_and_scales_come_with_values():
    reads = []

    def piece(index: int) -> np.ndarray:
        reads.append(index)
        return np.full((3, 2), index + 1, np.float32)

    leaf = int8.quantised(KERNEL, Leaf(Spec((4, 3, 2), np.dtype("f4")), 4, piece))
    assert leaf.narrow is not None and not reads
    scales = leaf.narrow.scales[int8.SCALES]
    for n in range(4):
        assert (leaf.piece(n) == int8.LARGEST).all()
    got = [scales.piece(n)[0, 0] * int8.LARGEST for n in range(4)]
    assert reads == [0, 1, 2, 3]
    np.testing.assert_allclose(got, [1, 2, 3, 4], rtol=1e-6)


def test_only_kernels_of_the_blocks_are_made_int8(checkpoint: Any):
    got, plain = (rules.flatten(load(checkpoint, w)) for w in ("int8", "upcast"))
    assert got.keys() == plain.keys()
    for path, leaf in got.items():
        kernel = path.startswith("blocks/") and path.endswith("/kernel")
        assert isinstance(leaf, Int8) == kernel, path
        assert (leaf.shape, leaf.dtype) == (plain[path].shape, plain[path].dtype)
        if not kernel:
            same(leaf, plain[path])
            continue
        wide = np.asarray(plain[path], np.float32)
        off = np.abs(np.asarray(quantized.whole(leaf), np.float32) - wide)
        assert (off <= np.asarray(leaf.scales) * 1.1).all()


def test_a_folder_holds_int8_and_is_read_as_such_whatever_is_asked(
    checkpoint: Any, folder: Any
):
    specs = tensorfile.tensors_of(folder / "transformer.safetensors").specs
    assert specs[f"{KERNEL}_int8"].dtype == np.int8 and KERNEL not in specs
    layers, _, wide = specs[f"{KERNEL}_int8"].shape
    assert specs[f"{KERNEL}_scales"] == ((layers, 1, wide), np.dtype("f4"))
    want = load(checkpoint, "int8", jnp.bfloat16)
    for weights in ("upcast", "keep", "int8"):
        same(load(folder, weights, jnp.bfloat16), want)
    assert outlines.stored_as(folder) == "int8"
    assert outlines.stored_as(checkpoint) == "plain"
    whole, parts = check.report(checkpoint), check.report(folder)
    assert parts.complete and parts.parts[0].parameters == whole.parts[0].parameters


def test_the_folder_remembers_what_it_was_made_as(checkpoint: Any, folder: Any):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["dtype"] == "as stored, blocks in int8"
    assert manifest["base_hash"] == io.open_base(checkpoint).base_hash
    assert not convert.convert_base(checkpoint, folder, weights="int8", say=quiet)
    with pytest.raises(ValueError, match="blocks in int8"):
        convert.convert_base(checkpoint, folder, say=quiet)


def test_an_export_has_the_widened_kernels_under_their_names(
    checkpoint: Any, folder: Any, tmp_path: Any
):
    path = tmp_path / "back.safetensors"
    convert.export_base(folder, path, say=quiet)
    back, first = (tensorfile.tensors_of(p).specs for p in (path, checkpoint))
    assert {k: s.shape for k, s in back.items()} == {
        k: s.shape for k, s in first.items()
    }
    wide = quantized.plain(load(folder, "int8", jnp.bfloat16))
    same(load(path, "upcast", jnp.bfloat16), wide)
    made = tmp_path / "memory.safetensors"
    tree = {"transformer": load(folder)}
    io.save_original(made, tree, io.open_base(folder).config)
    same(load(made, "upcast", jnp.bfloat16), wide)


def test_fp8_is_widened_with_its_scales_before_it_is_made_int8(
    checkpoint: Any, tmp_path: Any
):
    tensors, said = eight_bits.read(checkpoint)
    narrow = eight_bits.scaled(tensors, eight_bits.in_layers(1, 2))
    path = eight_bits.write(tmp_path / "fp8.safetensors", narrow, said)
    plain = eight_bits.dequantized(narrow)
    wide = eight_bits.write(tmp_path / "wide.safetensors", plain, said)
    got, want = (
        load(p, "int8", jnp.float32)["blocks"]["video"]["ff"]["up"]["kernel"]
        for p in (path, wide)
    )
    same(got, want)
    assert outlines.stored_as(path) == "fp8"


def test_shapes_of_what_is_read_are_known_without_reading(checkpoint: Any, folder: Any):
    for path, choice in ((checkpoint, "int8"), (folder, "upcast")):
        live = load(path, choice, jnp.bfloat16)
        names = ("transformer",)
        made = outlines.parameters(path, choice=choice, names=names)["transformer"]
        facts = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
        assert facts(made) == facts(live)


def test_a_damaged_scale_is_refused(folder: Any, tmp_path: Any):
    found = tensorfile.tensors_of(folder / "transformer.safetensors")
    tensors = {name: found.tensor(name) for name in found.specs}
    scales = tensors[f"{KERNEL}_scales"].copy()
    scales[1, 0, 3] = -1
    tensors[f"{KERNEL}_scales"] = scales
    entries = [tensorfile.entry(*pair) for pair in tensors.items()]
    tensorfile.write(tmp_path / "transformer.safetensors", entries)
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest["networks"]
    manifest["networks"] = {"transformer": files["transformer"]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(
        ValueError, match=f"{KERNEL}_scales, layer 1: got a scale of -1"
    ):
        load(tmp_path)


def test_an_adapter_fits_and_merging_widens_only_what_it_changes(checkpoint: Any):
    kept, wide = load(checkpoint, "int8"), load(checkpoint, "upcast")
    targets = ("blocks/audio/ff/*",)
    one, two = (
        adapters.init(jax.random.key(0), base, 2, targets) for base in (kept, wide)
    )
    same(one, two)
    drawn = jax.tree.map(jnp.ones_like, one)
    flat, before = rules.flatten(adapters.merge(kept, drawn)), rules.flatten(kept)
    changed = {path for path, leaf in flat.items() if leaf is not before[path]}
    assert changed and all(path.startswith("blocks/audio/ff/") for path in changed)
    for path in changed:
        assert flat[path].dtype == before[path].dtype and not isinstance(
            flat[path], Int8
        )


def test_int8_takes_a_byte_a_parameter(checkpoint: Any):
    leaf = rules.flatten(load(checkpoint))[KERNEL]
    layers, _, wide = leaf.shape
    nbytes = sum(x.nbytes for x in jax.tree.leaves(leaf))
    assert nbytes == math.prod(leaf.shape) + 4 * layers * wide

"""Safetensors files written piece by piece: readable, hashed, whole or absent."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from idlora_jax.weights import tensorfile
from idlora_jax.weights.tensorfile import Entry, Spec

RNG = np.random.default_rng(0)
TENSORS = {
    "odd": RNG.integers(0, 9, 3).astype(np.uint8),
    "half": RNG.normal(size=(3, 5)).astype(ml_dtypes.bfloat16),
    "wide": RNG.normal(size=(2, 3, 4)).astype(np.float32),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "flag": np.array([True, False]),
}


def entries():
    return [tensorfile.entry(name, array) for name, array in TENSORS.items()]


def test_safetensors_reads_what_we_write(tmp_path):
    path = tmp_path / "x.safetensors"
    tensorfile.write(path, entries(), {"note": 'a "quoted" text'})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["note"] == 'a "quoted" text'


def test_we_read_the_header_of_what_safetensors_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"note": "x"})
    head = tensorfile.header(path)
    want = {name: Spec(array.shape, array.dtype) for name, array in TENSORS.items()}
    assert head.tensors == want and head.metadata == {"note": "x"}


def test_tensors_are_aligned_to_their_items(tmp_path):
    path = tmp_path / "x.safetensors"
    tensorfile.write(path, entries())
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    found = json.loads(raw[8 : 8 + length])
    del found["__metadata__"]
    assert length % 8 == 0
    for name, entry in found.items():
        assert entry["data_offsets"][0] % TENSORS[name].itemsize == 0


def test_pieces_in_turn_equal_the_whole(tmp_path):
    whole, pieces = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    stack = TENSORS["wide"]
    tensorfile.write(whole, [tensorfile.entry("x", stack)])
    tensorfile.write(
        pieces, [Entry("x", Spec(stack.shape, stack.dtype), lambda: stack)]
    )
    assert whole.read_bytes() == pieces.read_bytes()


def test_the_recorded_hash_is_that_of_the_contents(tmp_path):
    path = tmp_path / "x.safetensors"
    digest = tensorfile.write(path, entries(), {"source": "0" * 64})
    assert tensorfile.header(path).metadata[tensorfile.HASH] == digest
    assert tensorfile.verify(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert not tensorfile.verify(path)


def test_the_order_of_entries_does_not_matter_and_contents_do(tmp_path):
    path = tmp_path / "x.safetensors"
    first = tensorfile.write(path, entries())
    assert tensorfile.write(path, reversed(entries())) == first
    assert tensorfile.write(path, entries()[1:]) != first
    assert tensorfile.write(path, entries(), {"note": "x"}) != first


def test_nothing_is_left_when_a_piece_fails_and_the_old_file_stays(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def broken():
        yield np.zeros((1, 2), np.float32)
        raise OSError(28, "no space left")

    spec = Spec((2, 2), np.dtype(np.float32))
    with pytest.raises(OSError, match="no space left"):
        tensorfile.write(path, [Entry("x", spec, broken)])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (np.zeros((1, 2), np.float32), "got 8 bytes, expected 16"),
        (np.zeros((2, 2), np.float64), "piece of float64"),
    ],
)
def test_pieces_that_do_not_make_up_the_tensor_are_refused(piece, message, tmp_path):
    spec = Spec((2, 2), np.dtype(np.float32))
    with pytest.raises(ValueError, match=message):
        tensorfile.write(tmp_path / "x", [Entry("x", spec, lambda: (piece,))])
    assert not any(tmp_path.iterdir())


def test_a_name_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="named twice"):
        tensorfile.write(tmp_path / "x", entries() + entries()[:1])


def test_one_layer_of_a_stack_is_read_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    tensorfile.write(path, entries())
    opened = tensorfile.tensors_of(path)
    np.testing.assert_array_equal(opened.layer("wide", 1), TENSORS["wide"][1])
    assert opened.layer("half", 2).dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(opened.tensor("scalar"), TENSORS["scalar"])

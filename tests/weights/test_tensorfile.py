"""Safetensors files written piece by piece: readable, hashed, whole or absent."""

import gc
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import sparse_files
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from idlora_jax.weights import reading, tensorfile
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


@pytest.fixture
def stacked(tmp_path):
    """A file of tensors of many dtypes and ranks, and the tensors."""
    kinds = {
        "half": ml_dtypes.bfloat16,
        "eighth": ml_dtypes.float8_e4m3fn,
        "other_eighth": ml_dtypes.float8_e5m2,
        "scale": ml_dtypes.float8_e8m0fnu,
        "whole": np.int64,
        "complex": np.complex64,
    }
    raw = RNG.integers(1, 120, (3, 4, 5, 6), dtype=np.uint8)
    arrays = {name: raw.astype(np.float32).astype(k) for name, k in kinds.items()}
    arrays |= TENSORS
    path = tmp_path / "stacked.safetensors"
    tensorfile.write(path, [tensorfile.entry(k, a) for k, a in arrays.items()])
    return path, arrays


def assert_same(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()


def test_every_tensor_and_every_layer_is_read_as_it_was_written(stacked):
    path, arrays = stacked
    opened = tensorfile.tensors_of(path)
    for name, array in arrays.items():
        assert_same(opened.tensor(name), array)
        for index in range(array.shape[0] if array.shape else 0):
            assert_same(opened.layer(name, index), array[index])


def test_what_is_read_is_writable_and_the_caller_s_own(stacked):
    path, arrays = stacked
    opened = tensorfile.tensors_of(path)
    for name in arrays:
        first = opened.tensor(name)
        assert first.flags.writeable and first.flags.c_contiguous
        first[...] = 0
        assert_same(opened.tensor(name), arrays[name])


CUTS = st.slices(7).filter(lambda cut: cut.step is None or cut.step > 0)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(CUTS, max_size=4), st.integers(0, 2**9), st.integers(1, 2**9))
def test_a_part_is_what_indexing_the_whole_gives(parts_file, cuts, long_row, block):
    path, array = parts_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_LONG_ROW", long_row)
        patch.setattr(reading, "_BLOCK", block)
        got = tensorfile.tensors_of(path).slice("x", tuple(cuts))
    assert_same(got, array[tuple(cuts)])


@pytest.fixture(scope="module")
def parts_file(tmp_path_factory):
    array = RNG.normal(size=(5, 3, 6, 7)).astype(ml_dtypes.bfloat16)
    path = tmp_path_factory.mktemp("parts") / "x.safetensors"
    tensorfile.write(path, [tensorfile.entry("x", array)])
    return path, array


def test_only_the_rows_that_are_asked_for_are_read(parts_file, monkeypatch):
    path, array = parts_file
    read, original = [], reading.File.fill

    def spy(self, out, start):
        read.append(out.nbytes)
        original(self, out, start)

    monkeypatch.setattr(reading.File, "fill", spy)
    monkeypatch.setattr(reading, "_LONG_ROW", 64)
    opened = tensorfile.tensors_of(path)
    opened.slice("x", (slice(1, 4), slice(2, 3)))
    assert sum(read) == array[1:4, 2:3].nbytes
    read.clear()
    opened.slice("x", (slice(0, 5, 2),))
    assert sum(read) == array[::2].nbytes
    read.clear()
    opened.slice("x", (slice(2, 2),))
    opened.slice("x", (slice(None), slice(None), slice(9, 9)))
    assert read == []


def test_impossible_parts_are_refused(parts_file):
    opened = tensorfile.tensors_of(parts_file[0])
    with pytest.raises(ValueError, match="step of -1"):
        opened.slice("x", (slice(None, None, -1),))
    with pytest.raises(ValueError, match="5 slices of a tensor"):
        opened.slice("x", (slice(None),) * 5)
    for index in (-1, 5):
        with pytest.raises(ValueError, match=rf"layer {index} of a tensor \[5, 3"):
            opened.layer("x", index)


def test_several_files_are_read_as_one_and_a_name_in_two_is_refused(tmp_path):
    paths = [tmp_path / f"{n}.safetensors" for n in "abc"]
    for path, names in zip(paths, ("pq", "rs", "tq"), strict=True):
        arrays = {name: np.full(3, ord(name), np.float32) for name in names}
        tensorfile.write(path, [tensorfile.entry(k, a) for k, a in arrays.items()])
    opened = tensorfile.tensors_of(*paths[:2])
    assert {name: opened.tensor(name)[0] for name in opened.specs} == {
        name: ord(name) for name in "pqrs"
    }
    with pytest.raises(ValueError, match="every name once") as caught:
        tensorfile.tensors_of(*paths)
    text = str(caught.value)
    assert "'q'" in text and str(paths[0]) in text and str(paths[2]) in text


def descriptors(path):
    """How many descriptors of this process are of that file."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.path.exists(x) and os.path.samefile(x, path) for x in links)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_a_file_is_opened_at_the_first_read_and_closed_after_the_last(parts_file):
    path, _ = parts_file
    opened = tensorfile.tensors_of(path)
    assert descriptors(path) == 0
    for _ in range(3):
        opened.layer("x", 0)
    assert descriptors(path) == 1
    del opened
    gc.collect()
    assert descriptors(path) == 0


def test_a_file_that_shrinks_or_changes_after_it_was_opened_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.zeros((1 << 16,), np.float32)
    tensorfile.write(path, [tensorfile.entry("x", array)])
    early, late = tensorfile.tensors_of(path), tensorfile.tensors_of(path)
    early.slice("x", (slice(0, 1),))
    os.truncate(path, path.stat().st_size - 8192)
    with pytest.raises(ValueError, match=r"x\.safetensors: got a file that ends at"):
        early.tensor("x")
    assert early.slice("x", (slice(0, 9),)).shape == (9,)
    with pytest.raises(ValueError, match="got a file that was changed"):
        late.tensor("x")


def test_a_file_that_is_replaced_is_still_the_one_that_was_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    tensorfile.write(path, [tensorfile.entry("x", np.zeros(4, np.float32))])
    early, late = tensorfile.tensors_of(path), tensorfile.tensors_of(path)
    early.tensor("x")
    tensorfile.write(path, [tensorfile.entry("x", np.ones(4, np.float32))])
    assert early.tensor("x").sum() == 0
    with pytest.raises(ValueError, match="open it again"):
        late.tensor("x")


def test_reading_a_large_file_a_piece_at_a_time_holds_one_piece(tmp_path):
    some = lambda name: "transformer_blocks.1" in name
    path = sparse_files.write(tmp_path / "x.safetensors", "id-lora-22b", only=some)
    script = f"""
import resource
from idlora_jax.weights import tensorfile
opened = tensorfile.tensors_of({str(path)!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
total = sum(opened.tensor(name).nbytes for name in opened.specs)
print(total, peak() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    total, more = map(int, run.stdout.split())
    assert total > 200e6 and more < 32e6


def test_verifying_tells_the_bytes_it_read_and_needs_a_recorded_hash(tmp_path):
    path, told = tmp_path / "x.safetensors", []
    tensorfile.write(path, entries())
    assert tensorfile.verify(path, progress=told.append)
    assert sum(told) == path.stat().st_size
    save_file(TENSORS, path)
    with pytest.raises(ValueError, match="without a recorded hash"):
        tensorfile.verify(path)

"""Headers of safetensors files: every contradiction is one clear error."""

import json
import re
import time
import tracemalloc

import cpu_time
import ml_dtypes
import numpy as np
import pytest
import sparse_files
from safetensors.numpy import save_file

from idlora_jax.weights.header import DTYPES, LONGEST, Spec, header


def raw(text, data=b"", length=None):
    """A file of a header and data; the announced length may be another."""
    text = text if isinstance(text, bytes) else text.encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def file(entries, data=b"", **metadata):
    """A file of entries as they are."""
    about = {"__metadata__": metadata} if metadata else {}
    return raw(json.dumps(about | entries), data)


def tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": [*shape], "data_offsets": [*offsets]}


def refused(tmp_path, content):
    """The message of the error that a file gives."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"got .*, expected .*; ") as caught:
        header(path)
    text = str(caught.value)
    assert text.startswith(f"weights: {path}: got ") and "\n" not in text
    assert len(text) < 700
    return text.removeprefix(f"weights: {path}: ")


def test_a_header_says_shapes_dtypes_places_and_metadata(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        file({"a": tensor(), "b": tensor((), (8, 9), "BOOL")}, bytes(9), note="x")
    )
    found = header(path)
    start = path.stat().st_size - 9
    assert found.tensors == {
        "a": Spec((2,), np.dtype("f4")),
        "b": Spec((), np.dtype("?")),
    }
    assert found.metadata == {"note": "x"}
    assert found.starts == {"a": start, "b": start + 8}


def test_scalars_empty_tensors_no_tensors_and_no_metadata_are_fine(tmp_path):
    path = tmp_path / "x.safetensors"
    empty = {"a": tensor((0, 3), (0, 0)), "b": tensor((), (0, 4))}
    empty["c"] = tensor((2, 0), (4, 4))
    path.write_bytes(file(empty, bytes(4)))
    assert [s.nbytes for s in header(path).tensors.values()] == [0, 4, 0]
    path.write_bytes(raw('{"__metadata__":null}'))
    assert header(path)[:2] == ({}, {})


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_has_its_size(name, tmp_path):
    path, dtype = tmp_path / "x.safetensors", DTYPES[name]
    size = 6 * dtype.itemsize
    path.write_bytes(file({"a": tensor((2, 3), (0, size), name)}, bytes(size)))
    assert header(path).tensors["a"] == Spec((2, 3), dtype)


def test_the_dtypes_are_those_that_safetensors_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    kinds = (*"?bBhHiIqQefdF", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
    arrays = {str(n): np.zeros(2, kind) for n, kind in enumerate(kinds)}
    save_file(arrays, path)
    found = header(path).tensors
    assert {k: s.dtype for k, s in found.items()} == {
        k: a.dtype for k, a in arrays.items()
    }


FOREIGN = {
    b"": "an empty file",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "git-lfs pointer",
    b"<!DOCTYPE html><html><body>Access denied": "a web page",
    b"\xef\xbb\xbf  \n<html>": "a web page",
    b"PK\x03\x04\x00\x00\x08\x08\x00\x00": r"a zip archive \(.pt",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P": r"a pickle \(.pt",
    b"GGUF\x03\x00\x00\x00\x01\x00": "GGUF",
    b"\x28\xb5\x2f\xfd\x04\x00\x00\x00\x00": ".zst archive",
    b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03": ".gz archive",
    b'{"metadata": {"total_size": 1}}': "JSON text",
    b'{"abcd":{"total_size": 1}}': "JSON text",
    b"abc": "starts with b'abc'",
    b"\x02\x00\x00\x00\x00\x00\x00\x00[]": "starts with",
    b"\x01\x00\x00\x00\x00\x00\x00\x00{": "starts with",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_what_is_no_safetensors_is_called_by_its_name(content, tmp_path):
    text = refused(tmp_path, content)
    assert re.search(FOREIGN[content], text), text
    assert "expected a .safetensors file; " in text


WHOLE = file({"a": tensor()}, bytes(8), note="x")
DEEP = "[" * 100_000
UNREADABLE = {
    "cut off in the header": (WHOLE[:40], "header cut off after 32 of"),
    "nothing but the length": (WHOLE[:9], "header cut off after 1 of"),
    "one byte is missing": (WHOLE[:-1], r"got \d+ bytes, expected \d+ bytes as"),
    "a byte too many": (WHOLE + b"x", r"got \d+ bytes, expected \d+ bytes as"),
    "a huge header": (raw("{}", length=LONGEST + 1), "a header of 33,554,433 bytes"),
    "the longest number": (raw("{}", length=2**64 - 1), r"got a header of 18,446"),
    "not UTF-8": (raw(b'{"\xff":1}'), "header that is not UTF-8"),
    "half a character": (raw(r'{"\ud800":1}'), "header that is not UTF-8"),
    "no JSON": (raw("{'a':1}"), "header that is no JSON"),
    "two objects": (raw("{}{}"), "header that is no JSON"),
    "deep nesting": (raw('{"a":' + DEEP), "deeply nested"),
    "a number of 9999 digits": (raw('{"a":' + "9" * 9999 + "}"), "cannot be read"),
    "a name twice": (raw('{"a":1,"b":2,"a":1}'), "it has 'a' twice"),
    "a field twice": (raw('{"a":{"dtype":"F32","dtype":"F64"}}'), "'dtype' twice"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_header_is_refused(case, tmp_path):
    content, message = UNREADABLE[case]
    text = refused(tmp_path, content)
    assert re.search(message, text), text


def entry(**changes):
    return {k: v for k, v in (tensor() | changes).items() if v is not ...}


ENTRIES = {
    "a number": (3, "entry 3"),
    "a list": ([1], r"entry \[1\]"),
    "nothing": (None, "entry None"),
    "no dtype": (entry(dtype=...), "one of dtype, shape, data_offsets"),
    "no shape": (entry(shape=...), "one of dtype, shape, data_offsets"),
    "no offsets": (entry(data_offsets=...), "one of dtype, shape, data_offsets"),
    "a field too many": (entry(other=1), "one of dtype, shape, data_offsets"),
    "an unknown dtype": (entry(dtype="F4"), "dtype 'F4', expected one of F64"),
    "a dtype in small letters": (entry(dtype="f32"), "dtype 'f32'"),
    "a number as dtype": (entry(dtype=32), "dtype 32"),
    "a list as dtype": (entry(dtype=["F32"]), r"dtype \['F32'\]"),
    "a number as shape": (entry(shape=2), "shape 2"),
    "a negative size": (entry(shape=[-1, -2]), r"shape \[-1, -2\]"),
    "a fraction": (entry(shape=[2.0]), r"shape \[2.0\]"),
    "a bool": (entry(shape=[True, 2]), r"shape \[True, 2\]"),
    "text": (entry(shape=["2"]), r"shape \['2'\]"),
    "not a number": (entry(shape=[float("nan")]), r"shape \[nan\]"),
    "a huge size": (entry(shape=[2**64]), r"shape \[18446744073709551616\]"),
    "huge, but empty": (
        entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0]),
        "that can be addressed",
    ),
    "many axes": (entry(shape=[1] * 33), "at most 32 sizes"),
    "one offset": (entry(data_offsets=[0]), r"data_offsets \[0\]"),
    "three offsets": (entry(data_offsets=[0, 8, 8]), r"data_offsets \[0, 8, 8\]"),
    "a negative offset": (entry(data_offsets=[-8, 0]), r"data_offsets \[-8, 0\]"),
    "offsets backwards": (entry(data_offsets=[8, 0]), r"data_offsets \[8, 0\]"),
    "bool offsets": (entry(data_offsets=[False, 8]), r"data_offsets \[False, 8\]"),
    "offsets as text": (entry(data_offsets="08"), "data_offsets '08'"),
    "too few bytes": (
        entry(data_offsets=[0, 7]),
        r"7 bytes, expected 8 for F32 \[2\]",
    ),
    "a wrong dtype": (entry(dtype="F64"), r"8 bytes, expected 16 for F64 \[2\]"),
    "beyond the file": (
        entry(shape=[2**40], data_offsets=[0, 2**42]),
        r"expected 4,398,046,\d+,?\d* bytes as its header says",
    ),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_impossible_entry_is_refused(case, tmp_path):
    found, message = ENTRIES[case]
    text = refused(tmp_path, file({"weight": found}, bytes(8)))
    assert re.search(message, text), text
    assert "'weight'" in text or "as its header says" in text


LAYOUTS = {
    "overlap": (
        [(0, 8), (4, 12)],
        "at byte 4, which overlaps 'a', expected byte 8",
    ),
    "twice the same": ([(0, 8), (0, 8)], "'b' at byte 0, which overlaps 'a'"),
    "a gap": ([(0, 8), (12, 20)], "'b' at byte 12, which leaves a gap after 'a'"),
    "a gap before": ([(8, 16), (16, 24)], "leaves a gap after the header"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_tensors_follow_one_another_without_gap_or_overlap(case, tmp_path):
    offsets, message = LAYOUTS[case]
    entries = dict(zip("ab", (tensor(offsets=o) for o in offsets), strict=True))
    text = refused(tmp_path, file(entries, bytes(offsets[-1][1])))
    assert message in text, text


METADATA = {
    "a list": ([1], "metadata [1]"),
    "a number in it": ({"a": "b", "c": 3}, "metadata whose 'c' is 3"),
    "an object in it": ({"a": {}}, "metadata whose 'a' is {}"),
    "half a character": ({"a": "\ud800"}, "metadata that is not UTF-8"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_is_text_by_key(case, tmp_path):
    found, message = METADATA[case]
    text = refused(tmp_path, file({"__metadata__": found}))
    assert message in text and "text by key" in text


def test_long_values_are_cut_in_messages(tmp_path):
    name = "weight" * 10_000
    assert len(refused(tmp_path, file({name: ["x" * 10_000] * 1000}))) < 400


def test_six_thousand_tensors_take_a_moment(tmp_path):
    path = sparse_files.write(tmp_path / "x.safetensors", "ltx-2-19b-dev-fp8")
    assert len(header(path).tensors) == 6404
    # 7 times as long as JSON alone takes; 20 times with our annotations checked.
    assert cpu_time.best(lambda: header(path)) < 60 * cpu_time.of_json(path)


def test_many_wrong_entries_are_refused_quickly(tmp_path):
    text = "{" + ",".join(f'"{n:x}":3' for n in range(200_000)) + ',"0":4}'
    start = time.process_time()
    assert "'0' twice" in refused(tmp_path, raw(text))
    assert time.process_time() - start < 6


@pytest.mark.parametrize("unit", ["[],", "{},", '"ab",', "-9,"])
def test_the_longest_header_takes_less_than_a_gigabyte(unit, tmp_path):
    path = tmp_path / "x.safetensors"
    text = '{"a":[' + unit * ((1 << 17) // len(unit)) + "0]}"
    path.write_bytes(raw(text))
    tracemalloc.start()
    with pytest.raises(ValueError, match="tensor 'a' with entry"):
        header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak * LONGEST / len(text) < 1e9

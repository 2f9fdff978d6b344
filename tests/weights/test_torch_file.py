"""Reading files of torch.save: right for tensors, inert for everything else."""

from __future__ import annotations

import pathlib
import struct
import time
import tracemalloc
import zipfile
from typing import Any

import jax
import numpy as np
import pt_files
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pt_files import BF16, Raw, View

from idlora_jax.weights import torch_file
from idlora_jax.weights.tensorfile import Spec

RNG = np.random.default_rng(0)
FLAT = RNG.normal(size=24).astype(np.float32)
EXAMPLE = {
    "latents": RNG.normal(size=(3, 2, 4)).astype(BF16),
    "mask": np.array([0, 1, 1]),
    "flags": np.array([True, False]),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 3), np.float16),
    "num_frames": 3,
    "fps": 23.976,
    "notes": ["a", ("é", None, True), {"deep": [-1, 2**70]}, b"\0\xff"],
}


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "clip.pt"


def same(got: Any, expected: Any) -> None:
    """Equal values, dtypes and structures."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b)
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape


@pytest.mark.parametrize("write", [pt_files.save, pt_files.save_old])
def test_tensors_numbers_texts_and_containers_come_back(path, write):
    same(torch_file.read_pt(write(path, EXAMPLE)), EXAMPLE)


@pytest.mark.parametrize("write", [pt_files.save, pt_files.save_old])
def test_views_are_cut_out_of_their_storage(path, write):
    views = {
        "slice": View(FLAT, 6, (2, 3), (3, 1)),
        "transposed": View(FLAT, 0, (4, 6), (1, 4)),
        "diagonal": View(FLAT, 0, (4,), (7,)),
        "repeated": View(FLAT, 5, (3, 2), (0, 1)),
    }
    got = torch_file.read_pt(write(path, views))
    np.testing.assert_array_equal(got["slice"], FLAT[6:12].reshape(2, 3))
    np.testing.assert_array_equal(got["transposed"], FLAT.reshape(6, 4).T)
    np.testing.assert_array_equal(got["diagonal"], FLAT[:22:7])
    np.testing.assert_array_equal(got["repeated"], [FLAT[5:7]] * 3)
    assert all(np.shares_memory(got["transposed"], a) for a in got.values())


def test_the_other_byte_order_is_turned(path):
    pt_files.save(path, {"a": FLAT, "b": EXAMPLE["latents"]}, order="big")
    same(torch_file.read_pt(path), {"a": FLAT, "b": EXAMPLE["latents"]})


def test_specs_are_read_without_storages(path):
    pt_files.save(path, {"a": EXAMPLE["latents"], "n": 3})
    data = path.read_bytes()
    at = data.index(EXAMPLE["latents"].tobytes())
    path.write_bytes(data[:at] + b"\0" * 48 + data[at + 48 :])
    specs = torch_file.specs(path)
    assert specs == {"a": Spec((3, 2, 4), np.dtype(BF16)), "n": 3}
    with pytest.raises(ValueError, match="CRC"):
        torch_file.read_pt(path)


def apply(name: str, *arguments: Any) -> Raw:
    module, _, function = name.rpartition(".")
    head = f"c{module}\n{function}\n".encode()
    return Raw(head + pt_files.emit(arguments, []) + b"R")


STORAGE = Raw(b"(" + pt_files.sequence(["storage", 1, "0", "cpu", 4], []) + b"tQ")
HARMFUL = {
    "a command": apply("os.system", "touch {canary}"),
    "evaluation": apply("builtins.eval", "open('{canary}', 'w')"),
    "execution": apply("builtins.exec", "open('{canary}', 'w')"),
    "an attribute": apply("builtins.getattr", "a", "__class__"),
    "an import": apply("builtins.__import__", "os"),
    "a partial": apply("functools.partial", Raw(b"cos\nsystem\n"), "touch {canary}"),
    "an attribute of an allowed module": apply("torch.load", "{canary}"),
    "a dotted name": Raw(
        pt_files.text("collections") + pt_files.text("OrderedDict.fromkeys") + b"\x93"
    ),
    "an instance": Raw(b"(" + pt_files.text("touch {canary}") + b"ios\nsystem\n"),
    "an object": Raw(b"(cos\nsystem\n" + pt_files.text("touch {canary}") + b"o"),
    "a new object": Raw(b"ctorch\nSize\n)\x81"),
    "an extension": Raw(b"\x82\x01"),
    "an unknown persistent id": Raw(pt_files.text("module") + b"Q"),
    "a persistent line": Raw(b"Pmodule\n"),
    "a storage of no class": STORAGE,
    "a class as a value": Raw(b"ctorch\nFloatStorage\n"),
    "a function as a value": Raw(b"ctorch._utils\n_rebuild_tensor_v2\n"),
    "a call of data": Raw(pt_files.text("os.system") + b")R"),
    "state for a list": Raw(b"]}b"),
    "a tensor of nothing": apply("torch._utils._rebuild_tensor_v2", 1, 2, (), ()),
    "too few arguments": apply("torch._utils._rebuild_tensor_v2"),
    "a mark as a value": Raw(b"("),
    "a pop below the bottom": Raw(b"uuuu"),
    "an unknown memo": Raw(b"h\7"),
    "a tuple as a key": Raw(b"}" + pt_files.emit((1,), []) + b"Ns"),
    "a buffer": Raw(b"\x97"),
}


@pytest.mark.parametrize("harm", HARMFUL)
@pytest.mark.parametrize("write", [pt_files.save, pt_files.save_old])
def test_harmful_pickles_raise_one_error_and_do_nothing(path, harm, write):
    canary = path.with_name("canary")
    shift = len(str(canary)) - len("{canary}")
    code = bytes(HARMFUL[harm]).replace(b"{canary}", str(canary).encode())
    for text in (b"touch {canary}", b"{canary}", b"open('{canary}', 'w')"):
        old, new = (b"X" + struct.pack("<I", len(text) + d) for d in (0, shift))
        code = code.replace(old, new)
    write(path, {"latents": FLAT, "harm": Raw(code)})
    with pytest.raises(ValueError, match=r"^read_pt: .*clip\.pt: got .*if you trust"):
        torch_file.read_pt(path)
    assert not canary.exists()


def repeated_list(levels: int) -> Raw:
    """A list holding twice a list holding twice ...: 2^levels leaves."""
    code = b"]q\0"
    for n in range(levels):
        code += b"](h" + bytes([n]) + b"h" + bytes([n]) + b"eq" + bytes([n + 1])
    return Raw(b"(" + code + b"t")


GREEDY = {
    "deep lists": b"](" * 5_000 + b"e" * 5_000,
    "deep tuples": b")" + b"\x85" * 20_000,
    "doubling": repeated_list(60),
    "a cycle": b"]q\0h\0a",
    "a long integer": b"\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000,
    "a text of terabytes": b"\x8d" + struct.pack("<Q", 1 << 44) + b"abc",
    "bytes of terabytes": b"\x8e" + struct.pack("<Q", 1 << 44) + b"abc",
    "a writable buffer": b"\x96" + struct.pack("<Q", 1 << 30),
    "decimal digits": b"I" + b"9" * 100_000 + b"\n",
    "a text encoded again and again": (
        b"](c_codecs\nencode\nq\0" + pt_files.emit(("a" * 100_000, "latin1"), [])
        + b"q\1R" + b"h\0h\1R" * 10_000 + b"e"
    ),
}  # fmt: skip


@pytest.mark.parametrize("greed", GREEDY)
def test_greedy_pickles_are_refused_soon_and_in_little_memory(path, greed):
    pt_files.save(path, None, pickle=b"\x80\x04" + GREEDY[greed] + b".")
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"^read_pt: "):
        torch_file.read_pt(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6
    assert time.process_time() - begun < 20


def test_a_far_memo_takes_no_memory(path):
    pt_files.save(path, None, pickle=b"\x80\2K\7r\xff\xff\xff\xff.")
    tracemalloc.start()
    assert torch_file.read_pt(path) == 7
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (View(FLAT, 0, (1 << 40,), (0,)), "expand to far more"),
        (View(FLAT, 0, (1 << 30, 1 << 30), (0, 0)), "expand to far more"),
        (View(FLAT, 0, (25,), (1,)), "reaches out of its storage"),
        (View(FLAT, 20, (2, 3), (3, 1)), "reaches out of its storage"),
        (View(FLAT, 0, (2,), (1 << 47,)), "reaches out of its storage"),
        (View(FLAT, -1, (2,), (1,)), "negative"),
        (View(FLAT, 0, (2,), (-1,)), "negative"),
        (View(FLAT, 0, (2, 2), (1,)), "number of strides"),
        (View(FLAT, 0, (2,), (1,), count=1 << 40), "96 bytes for a storage"),
        (View(FLAT, 0, (2,), (1,), count=23), "96 bytes for a storage of 92"),
        (View(FLAT, 0, (), (), count=-1), "without class, key or size"),
    ],
)
def test_views_are_checked_against_their_storage(path, view, said):
    with pytest.raises(ValueError, match=said):
        torch_file.read_pt(pt_files.save(path, [view]))


def test_many_expanded_views_are_refused_together(path):
    large = View(FLAT, 0, (1 << 22,), (0,))
    assert torch_file.read_pt(pt_files.save(path, [large]))[0].shape == (1 << 22,)
    with pytest.raises(ValueError, match="expand to far more"):
        torch_file.read_pt(pt_files.save(path, [large] * 5))


def test_compressed_entries_are_refused(path):
    pt_files.save(path, EXAMPLE, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed entries"):
        torch_file.read_pt(path)


def test_a_storage_that_is_not_there_is_named(path):
    storages: list[np.ndarray] = []
    pickle = pt_files.program({"a": FLAT}, storages)
    pt_files.save(path, None, pickle=pickle)
    with pytest.raises(ValueError, match="data/0"):
        torch_file.read_pt(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "starts with b'version "),
        (b"PK\3\4 and then nothing", "a truncated zip file"),
        (b"PK\5\6" + b"\0" * 18, "starts with"),
        (b"\x80\2", "pickle exhausted"),
        (b"\x80\2N.", "pickle exhausted"),
    ],
)
def test_other_files_are_named_for_what_they_are(path, data, said):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said):
        torch_file.read_pt(path)


def test_a_missing_file_is_said_to_be_missing(path):
    with pytest.raises(ValueError, match="no such file"):
        torch_file.read_pt(path)


@pytest.mark.parametrize("write", [pt_files.save, pt_files.save_old])
def test_truncated_files_are_refused(path, write):
    data = write(path, EXAMPLE).read_bytes()
    for length in range(0, len(data) - 1, 37):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"^read_pt: "):
            torch_file.read_pt(path)


SMALL = {"latents": FLAT.reshape(4, 6), "n": [3, 2.5, "a", b"b"], "t": (None, True)}
FRAGMENTS = [
    b"(", b".", b")", b"]", b"}", b"t", b"e", b"u", b"a", b"s", b"R", b"b", b"Q", b"N",
    b"\x85", b"\x87", b"\x94", b"q\0", b"h\0", b"r\xff\xff\xff\xff", b"K\7",
    b"\x8a\4\xff\xff\xff\x7f", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n",
    b"cos\nsystem\n", b"\x8c\3abc", b"\x93", b"\x81", b"i", b"o", b"\x82\1",
    pt_files.text("storage"), pt_files.tensor(View(FLAT, 0, (2,), (1,)), [FLAT]),
]  # fmt: skip


def mutated(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    out = bytearray(data)
    for place, value in changes:
        out[place % len(out)] = value
    return bytes(out)


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=6)


def copied(value: Any) -> None:
    """Copy every array, whatever the keys of dicts are."""
    if isinstance(value, np.ndarray):
        np.array(value)
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            copied(each)


def is_clean(path: pathlib.Path) -> None:
    """Reading gives a result or a ValueError, soon and in little memory."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        torch_file.specs(path)
        copied(torch_file.read_pt(path))
    except ValueError as error:
        assert str(error).startswith("read_pt: ")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < path.stat().st_size + 1e9
    assert time.process_time() - begun < 10


BOUNDED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@BOUNDED
@given(changes=CHANGES, cut=st.integers(0, 1 << 16), old=st.booleans())
def test_any_bytes_changed_anywhere_give_a_result_or_one_error(path, changes, cut, old):
    write = pt_files.save_old if old else pt_files.save
    data = mutated(write(path, SMALL).read_bytes(), changes)
    path.write_bytes(data[: len(data) - cut] if cut < len(data) // 2 else data)
    is_clean(path)


@BOUNDED
@given(changes=CHANGES, more=st.lists(st.sampled_from(FRAGMENTS), max_size=12),
       at=st.integers(0, 1 << 16))  # fmt: skip
def test_any_program_gives_a_result_or_one_error(path, changes, more, at):
    pickle = mutated(pt_files.program(SMALL, []), changes)
    at %= len(pickle)
    pt_files.save(path, SMALL, pickle=pickle[:at] + b"".join(more) + pickle[at:])
    is_clean(path)


@pytest.mark.parity
@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_torch_writes_are_read(path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    value = {
        "bf16": base.bfloat16(),
        "fp8": base.to(torch.float8_e4m3fn) if zipped else base,
        "u16": base.to(torch.uint16) if zipped else base,
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": base[:1].expand(3, 6),
        "parameter": torch.nn.Parameter(base),
        "scalar": torch.tensor(True),
        "nested": [(1, 2.5, "x"), {"b": b"\0\xff", "none": None}],
    }
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    got = torch_file.read_pt(path)
    assert got["nested"] == value["nested"]
    assert str(got["fp8"].dtype) == ("float8_e4m3fn" if zipped else "float32")
    for name in set(value) - {"nested"}:
        expected = value[name].detach().double().numpy()
        np.testing.assert_array_equal(got[name].astype(np.float64), expected)


@pytest.mark.parity
def test_a_state_dict_of_torch_is_read(path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(model.state_dict(), path)
    got = torch_file.read_pt(path)
    assert list(got) == list(model.state_dict())
    np.testing.assert_array_equal(got["0.weight"], model[0].weight.detach().numpy())


@pytest.mark.parity
def test_a_whole_module_of_torch_is_refused(path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(3, 2), path)
    with pytest.raises(ValueError, match=r"global 'torch\.nn\.modules"):
        torch_file.read_pt(path)

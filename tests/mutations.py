"""Damaged safetensors files, drawn by hypothesis from a whole one."""

import json
import math
from typing import NamedTuple

from hypothesis import strategies as st

NUMBERS = st.sampled_from(
    [
        -(2**63),
        -1,
        0,
        1,
        2,
        3,
        8,
        2**31,
        2**32 - 1,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
    ]
)
LEAVES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["F32", "BF16", "F4", "I64", "\ud800", "\0", "__metadata__"]),
)
JUNK = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
DTYPES = st.sampled_from(
    [
        "F64",
        "F32",
        "F16",
        "BF16",
        "F8_E4M3",
        "F8_E8M0",
        "I64",
        "U32",
        "U8",
        "BOOL",
        "F4",
    ]
)


class Whole(NamedTuple):
    """A valid file in its parts."""

    head: dict
    data: bytes

    @classmethod
    def of(cls, path):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        return cls(json.loads(raw[8 : 8 + length]), raw[8 + length :])

    def bytes(self, text=None):
        text = (json.dumps(self.head) if text is None else text).encode(
            "utf-8", "surrogatepass"
        )
        return len(text).to_bytes(8, "little") + text + self.data


@st.composite
def in_bytes(draw, whole):
    """Some bytes changed, cut out, repeated, or the end cut off or grown."""
    raw = bytearray(whole.bytes())
    place = st.integers(0, 400) | st.integers(0, len(raw) - 1)
    for _ in range(draw(st.integers(1, 3))):
        first = min(draw(place), len(raw))
        last = min(first + draw(st.integers(0, 40)), len(raw))
        how = draw(st.sampled_from(["set", "drop", "repeat", "cut", "grow"]))
        if how == "set":
            size = last - first
            raw[first:last] = draw(st.binary(min_size=size, max_size=size))
        elif how == "drop":
            del raw[first:last]
        elif how == "repeat":
            raw[first:first] = raw[first:last]
        elif how == "cut":
            del raw[first:]
        else:
            raw += draw(st.binary(min_size=1, max_size=9))
    return bytes(raw)


@st.composite
def in_length(draw, whole):
    """Another length of the header than it has."""
    raw = whole.bytes()
    right = int.from_bytes(raw[:8], "little")
    near = st.integers(-9, 9).map(lambda n: max(0, right + n))
    wrong = draw(
        near | NUMBERS.map(lambda n: abs(n) % 2**64) | st.integers(0, 2**64 - 1)
    )
    return wrong.to_bytes(8, "little") + raw[8:]


def _change(draw, head, name):
    """One change of a tensor's entry."""
    entry, names = head[name], [n for n in head if n != "__metadata__"]
    how = draw(
        st.sampled_from(["field", "dtype", "size", "offset", "swap", "name", "drop"])
    )
    if how == "field":
        entry[draw(st.sampled_from([*entry, "other"]))] = draw(JUNK)
    elif how == "dtype":
        entry["dtype"] = draw(DTYPES)
    elif how == "size":
        entry["shape"] = draw(st.permutations([*entry["shape"], 1]) | st.lists(NUMBERS))
    elif how == "offset":
        entry["data_offsets"] = [
            n + draw(st.integers(-8, 8)) for n in entry["data_offsets"]
        ]
    elif how == "swap":
        other = head[draw(st.sampled_from(names))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        entry[field], other[field] = other[field], entry[field]
    elif how == "name":
        head[draw(st.text(max_size=6) | st.sampled_from(names))] = head.pop(name)
    else:
        del head[name]


@st.composite
def in_header(draw, whole):
    """Entries and metadata changed, as JSON."""
    head = json.loads(json.dumps(whole.head))
    for _ in range(draw(st.integers(1, 2))):
        names = [n for n, e in head.items() if n != "__metadata__" and _is_whole(e)]
        if not names:
            break
        if draw(st.integers(0, 3)):
            _change(draw, head, draw(st.sampled_from(names)))
        else:
            key = draw(st.sampled_from([*whole.head["__metadata__"], "x"]))
            value = draw(JUNK | JUNK.map(json.dumps))
            head["__metadata__"] = draw(
                st.sampled_from([value, {**whole.head["__metadata__"], key: value}])
            )
    return Whole(head, whole.data).bytes()


def _is_whole(entry):
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("shape"), list)
        and isinstance(entry.get("data_offsets"), list)
        and all(isinstance(n, int) for n in entry["data_offsets"])
    )


@st.composite
def in_text(draw, whole):
    """What a JSON writer would not write: names twice, depth, odd numbers, spaces."""
    text = json.dumps(whole.head)
    name = draw(st.sampled_from([*whole.head]))
    value = json.dumps(whole.head[name])
    odd = draw(
        st.sampled_from(
            [
                f'"{name}": {value}',
                '"a": ' + "[" * 3000,
                '"a": NaN',
                '"a": 1e999',
                '"a"',
            ]
        )
    )
    pads = ["", " ", "\n", "\ufeff", "\0"]
    before, after = draw(st.sampled_from(pads)), draw(st.sampled_from(pads))
    return whole.bytes(f"{before}{text[:-1]}, {odd}}}{after}")


SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1, "BOOL": 1}
SHAPES = st.lists(st.integers(0, 9), max_size=4)
SUFFIXES = st.sampled_from([".weight", ".bias", "_scale", ".alpha", ".0", "/a", ""])


@st.composite
def in_tensors(draw, whole):
    """A valid file of other names, dtypes, shapes and values."""
    head = {n: e for n, e in whole.head.items() if n != "__metadata__"}
    specs = {n: (e["dtype"], e["shape"]) for n, e in head.items()}
    for name in draw(st.lists(st.sampled_from([*specs]), max_size=3, unique=True)):
        how = draw(st.sampled_from(["dtype", "shape", "turn", "drop", "name", "more"]))
        dtype, shape = specs[name]
        if how == "dtype":
            specs[name] = draw(st.sampled_from([*SIZES])), shape
        elif how == "shape":
            specs[name] = dtype, draw(SHAPES)
        elif how == "turn":
            specs[name] = dtype, shape[::-1]
        elif how == "drop":
            del specs[name]
        else:
            end = draw(SUFFIXES)
            other = name.replace("0", draw(st.sampled_from("0129"))) + end
            specs[other] = specs.pop(name) if how == "name" else specs[name]
    out, end = {"__metadata__": whole.head["__metadata__"]}, 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        out[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    data = draw(st.sampled_from([b"\0", b"\xff", whole.data])) * (end + 1)
    return Whole(out, data[:end]).bytes()


def damaged(whole):
    """Bytes of a file with some change; a few are still valid."""
    changes = (in_bytes, in_length, in_header, in_text, in_tensors)
    return st.one_of([change(whole) for change in changes])

"""Keys of a LoRA file -> pairs in their places, and a report of what fits nothing.

A key is <module>.<side>.weight or <module>.alpha; a side is called lora_A or lora_down
[R I], lora_B or lora_up [O R]. `match` needs shapes alone, so it serves a check of
headers as well as a load. What a base has no place for is reported; a file that is
broken in itself (half a pair, two spellings of one module, two ranks in a pair, a kind
of adapter that is not W + B A) is refused at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from idlora_jax.types import Tree
from idlora_jax.weights import lora_names
from idlora_jax.weights.header import Spec
from idlora_jax.weights.lora_generation import lora_generation
from idlora_jax.weights.lora_names import Format, Slot
from idlora_jax.weights.rules import KeyMismatchError

SHOWN = 6
DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)

_KEY = re.compile(
    r"(?P<name>.+?)\.(?:lora_(?P<half>A|B|up|down)(?:\.[\w-]+)?\.weight"
    r"|lora\.(?P<old>up|down)(?:\.[\w-]+)?\.weight|(?P<alpha>alpha))"
)
_SIDES = {"A": "a", "down": "a", "B": "b", "up": "b"}
_FOREIGN = {
    r"\.dora_scale|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.lora_mid\.": "LoRA of a convolution",
    r"\.diff(_b)?$": "full differences",
    r"\.lora_(B|up)(\.[\w-]+)?\.bias$": "LoRA with biases",
}
"""Keys of changes that are not W + B A."""


class Pair(NamedTuple):
    """The keys of one module's pair, and of its alpha where the file has one."""

    slot: Slot
    name: str
    a: str
    b: str
    alpha: str | None
    rank: int

    @property
    def keys(self) -> tuple[str, ...]:
        """All of them."""
        return (self.a, self.b) if self.alpha is None else (self.a, self.b, self.alpha)


class Report(NamedTuple):
    """What a file's keys are to a base.

    Attributes:
        pairs: of the modules that fit, in the file's order.
        formats: that the matched keys are of.
        unmatched: key -> why no module of the base is meant by it.
        wrong_shape: key -> the shapes got and expected.
        generation: that the modules or widths speak for, or "".
    """

    pairs: tuple[Pair, ...]
    formats: tuple[Format, ...]
    unmatched: dict[str, str]
    wrong_shape: dict[str, str]
    generation: str

    @property
    def matched(self) -> tuple[str, ...]:
        """Keys of the pairs that fit."""
        return tuple(key for pair in self.pairs for key in pair.keys)

    @property
    def bad(self) -> dict[str, str]:
        """Keys that fit nothing, with the reasons."""
        return self.wrong_shape | self.unmatched

    def __str__(self) -> str:
        counts = (len(self.matched), len(self.unmatched), len(self.wrong_shape))
        return "{} keys matched, {} unmatched, {} of a wrong shape".format(*counts)


def examples(bad: Mapping[str, str], limit: int = SHOWN) -> str:
    """The first of some keys with their reasons, a line each."""
    more = f"\n  ... and {len(bad) - limit} more" if len(bad) > limit else ""
    lines = (f"\n  {key}: {why}" for key, why in [*bad.items()][:limit])
    return "".join(lines) + more


def _parsed(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Name -> side -> key, and the keys that are of no such form."""
    parts: dict[str, dict[str, str]] = {}
    odd: list[str] = []
    twice: list[str] = []
    for key in keys:
        hit = _KEY.fullmatch(key)
        if hit is None:
            odd.append(key)
            continue
        side = "alpha" if hit["alpha"] else _SIDES[hit["half"] or hit["old"]]
        other = parts.setdefault(hit["name"], {}).setdefault(side, key)
        if other != key:
            twice.append(f"{other} and {key}")
    if twice:
        raise KeyMismatchError(f"{len(twice)} tensors are there twice: {twice[:SHOWN]}")
    for part, kind in _FOREIGN.items():
        found = [key for key in odd if re.search(part, key)]
        if found:
            raise KeyMismatchError(
                f"got {kind} ({len(found)} keys as {found[0]}), expected plain LoRA "
                "(lora_A and lora_B); convert it with the tool that made it"
            )
    return parts, odd


def _require_whole(parts: Mapping[str, Mapping[str, str]]) -> None:
    lonely = [name for name, sides in parts.items() if len({*sides} & {"a", "b"}) == 1]
    if lonely:
        raise KeyMismatchError(
            f"{len(lonely)} modules have only one of lora_A and lora_B: "
            f"{lonely[:SHOWN]}; the file is incomplete, export it again"
        )
    alone = [sides["alpha"] for sides in parts.values() if "a" not in sides]
    if alone:
        raise KeyMismatchError(
            f"{len(alone)} alphas stand without lora_A and lora_B: {alone[:SHOWN]}"
        )


def _require_once(found: Iterable[Pair]) -> None:
    """One pair a module, whatever its spelling."""
    seen: dict[Slot, str] = {}
    for pair in found:
        other = seen.setdefault(pair.slot, pair.name)
        if other != pair.name:
            raise KeyMismatchError(
                f"two spellings of one module: {other} and {pair.name}; keep one"
            )


def _rank(specs: Mapping[str, Any], sides: Mapping[str, str]) -> int:
    """The rank of a pair, of which nothing but the fit to a base is left to check."""
    a, b = (tuple(specs[sides[side]].shape) for side in "ab")
    shown = f"{sides['a']} {list(a)}, {sides['b']} {list(b)}"
    if len(a) != 2 or len(b) != 2:
        raise KeyMismatchError(f"got {shown}, expected two axes each")
    if 0 in (*a, *b):
        raise KeyMismatchError(f"got {shown}: a tensor of no size")
    if a[0] != b[1]:
        raise KeyMismatchError(
            f"does not fit the base, nor itself: rank {a[0]} of {sides['a']} is not "
            f"rank {b[1]} of {sides['b']} ({shown})"
        )
    return a[0]


def _require_numbers(specs: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    used = [key for sides in parts.values() for key in sides.values()]
    odd = {key: specs[key].dtype for key in used if specs[key].dtype not in DTYPES}
    odd = {k: d for k, d in odd.items() if not k.endswith(".alpha")}
    if odd:
        key, dtype = next(iter(odd.items()))
        raise KeyMismatchError(
            f"{len(odd)} tensors are of no floating-point type of 16 bits or more, as "
            f"{key} ({np.dtype(dtype).name}); use another form of the file"
        )
    wide = [k for k in used if k.endswith(".alpha") and np.prod(specs[k].shape) != 1]
    if wide:
        raise KeyMismatchError(
            f"{wide[0]}: got shape {list(specs[wide[0]].shape)}, expected one number"
        )


def match(specs: Mapping[str, Any], bases: Mapping[str, Tree]) -> Report:
    """Find the place of every key.

    Args:
        specs: key -> anything with a shape and a dtype.
        bases: parameters, or their shapes, by network name ("transformer",
            "text_connector"); keys of a network that is not here stay unmatched.

    Raises:
        KeyMismatchError: if the file is broken in itself; see the module's text.
    """
    if not specs:
        raise ValueError("adapter file holds no tensors; expected *.lora_A.weight keys")
    parts, odd = _parsed(specs)
    index = lora_names.index(lora_names.slots(bases))
    ours = {name: sides for name, sides in parts.items() if name in index}
    _require_whole(ours)
    _require_numbers(specs, ours)
    pairs = [_pair(specs, name, ours[name], index[name][1]) for name in ours]
    _require_once(pairs)
    wrong = {k: why for pair in pairs for k, why in _misfits(pair, specs).items()}
    unmatched = dict.fromkeys(odd, "no key of a LoRA file")
    foreign = [name for name in parts if name not in ours]
    for name, why in _reasons(foreign, index, bases).items():
        unmatched |= dict.fromkeys(parts[name].values(), why)
    return Report(
        pairs=tuple(pair for pair in pairs if pair.a not in wrong),
        formats=tuple(dict.fromkeys(index[name][0] for name in ours)),
        unmatched=unmatched,
        wrong_shape=wrong,
        generation=lora_generation(
            {key: Spec(tuple(x.shape), np.dtype(x.dtype)) for key, x in specs.items()}
        ),
    )


def _pair(
    specs: Mapping[str, Any], name: str, sides: Mapping[str, str], slot: Slot
) -> Pair:
    rank = _rank(specs, sides)
    return Pair(slot, name, sides["a"], sides["b"], sides.get("alpha"), rank)


def _misfits(pair: Pair, specs: Mapping[str, Any]) -> dict[str, str]:
    """Why a pair does not fit its place: all its keys, or none."""
    wanted = {pair.a: (pair.rank, pair.slot.wide), pair.b: (pair.slot.out, pair.rank)}
    out = {
        key: f"got {list(specs[key].shape)}, expected {list(shape)}"
        for key, shape in wanted.items()
        if tuple(specs[key].shape) != shape
    }
    rest = (key for key in pair.keys if key not in out)
    return out | dict.fromkeys(rest, "its partner has a wrong shape") if out else {}


def _reasons(
    names: list[str], index: Mapping[str, Any], bases: Mapping[str, Tree]
) -> dict[str, str]:
    """Why each name is no module's; the nearest name for the first ones."""
    out = {}
    for count, name in enumerate(names):
        hit = lora_names.known(name)
        if hit is None:
            near = _nearest(name, index) if count < SHOWN else None
            out[name] = f"no module has this name{near or ''}"
        elif hit[0].network not in bases:
            out[name] = f"a module of the {hit[0].network}, which was not asked for"
        else:
            out[name] = _absence(*hit, bases)
    return out


def _absence(
    module: lora_names.Module, layer: int | None, bases: Mapping[str, Tree]
) -> str:
    places = [s for s in lora_names.slots(bases) if s.module is module]
    if not places:
        return "the base has no such module"
    return f"layer {layer} of a base of {len(places)} layers"


def _nearest(name: str, index: Mapping[str, Any]) -> str:
    start = re.split(r"[._]", name, maxsplit=1)[0]
    likely = [other for other in index if other.startswith(start)] or [*index]
    near = difflib.get_close_matches(name, likely, 1, 0.0)
    return f"; the nearest is {near[0]}" if near else ""

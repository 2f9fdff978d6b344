"""Pickles read as data, by an interpreter that imports and calls nothing of theirs.

A pickle is a program for a stack machine. Of its opcodes only those are known here that
build numbers, texts, bytes, tuples, lists and dicts, and the two that name a global and
apply one. A name is looked up in a table given by the caller; what is not in the table,
like every other opcode, ends the reading. Nothing is imported, no object gets state,
and memory and time grow with the length of the pickle, not with what it asks for:
`pickletools` cuts it into opcodes and checks every length against the bytes that are
there.

Source: the opcode table of Python's own `pickletools`.
"""

from __future__ import annotations

import functools
import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

LONGEST = 1 << 22
"""Opcodes read at most; a checkpoint of 6,000 tensors has 250,000."""
_DEEPEST, _MOST_NODES, _LARGEST_INT = 64, 1 << 18, 1 << 127
_MARK = object()
_ATOMS = (str, bytes, bool, int, float, type(None))

Table = Mapping[str, Any]
"""What the globals of a pickle mean: "module name" -> a `Call`, or a value."""


@dataclass(frozen=True)
class Call:
    """The meaning of a global that may be applied to arguments."""

    function: Callable[..., Any]


class _Machine(NamedTuple):
    stack: list[Any]
    memo: dict[int, Any]
    table: Table
    persistent: Callable[[Any], Any]

    def above_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise ValueError("no mark on the stack")
        above = self.stack[at + 1 :]
        del self.stack[at:]
        return above

    def top(self, kind: type) -> Any:
        """The value on top, which must be of a kind."""
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"{type(self.stack[-1]).__name__}, not {kind.__name__}")
        return self.stack[-1]

    def put(self, value: Any) -> None:
        self.stack.append(value)


def _is_key(value: Any) -> bool:
    # Large integers can be chosen to have one hash, which makes filling quadratic.
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return isinstance(value, str | bytes | float)


def _fill(m: _Machine, pairs: list[Any]) -> None:
    target = m.top(dict)
    keys = pairs[::2]
    if len(pairs) % 2 or not all(map(_is_key, keys)):
        raise ValueError("a dict with keys other than texts and numbers of 64 bits")
    target.update(zip(keys, pairs[1::2], strict=True))


def _global(m: _Machine, name: str) -> None:
    if name not in m.table:
        raise ValueError(f"the global {name!r:.80}")
    m.put(m.table[name])


def _stack_global(m: _Machine, _: Any) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise ValueError("a global without a name")
    _global(m, f"{module} {name}")


def _reduce(m: _Machine, _: Any) -> None:
    arguments = m.top(tuple)
    m.stack.pop()
    call = m.top(Call)
    m.stack[-1] = call.function(*arguments)


def _build(m: _Machine, _: Any) -> None:
    """The state of an OrderedDict (notes that torch adds to it) says nothing here."""
    m.stack.pop()
    m.top(dict)


def _set_item(m: _Machine, _: Any) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _fill(m, [key, value])


def _append(m: _Machine, _: Any) -> None:
    value = m.stack.pop()
    m.top(list).append(value)


def _appends(m: _Machine, _: Any) -> None:
    values = m.above_mark()
    m.top(list).extend(values)


def _tuple_of(m: _Machine, _: Any, *, count: int) -> None:
    if len(m.stack) < count:
        raise ValueError("a stack that is too short")
    values = tuple(m.stack[len(m.stack) - count :])
    del m.stack[len(m.stack) - count :]
    m.put(values)


def _integer(m: _Machine, value: int) -> None:
    if abs(value) > _LARGEST_INT:
        raise ValueError("an integer of more than 128 bits")
    m.put(value)


def _remember(m: _Machine, at: int) -> None:
    m.memo[at] = m.stack[-1]


def _persistent(m: _Machine, _: Any) -> None:
    m.put(m.persistent(m.stack.pop()))


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.put(make())


_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.put(_MARK),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "TUPLE": lambda m, _: m.put(tuple(m.above_mark())),
    "SETITEM": _set_item,
    "SETITEMS": lambda m, _: _fill(m, m.above_mark()),
    "APPEND": _append,
    "APPENDS": _appends,
    "MEMOIZE": lambda m, _: _remember(m, len(m.memo)),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "BUILD": _build,
    "BINPERSID": _persistent,
    "PROTO": lambda m, _: None,
    "FRAME": lambda m, _: None,
    "BINFLOAT": _Machine.put,
}
_OPCODES |= {f"TUPLE{n}": functools.partial(_tuple_of, count=n) for n in (1, 2, 3)}  # pyright: ignore
_OPCODES |= dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _integer)
_OPCODES |= dict.fromkeys(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split(),
    _Machine.put,
)
_OPCODES |= dict.fromkeys(("BINPUT", "LONG_BINPUT"), _remember)
_OPCODES |= dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, at: m.put(m.memo[at]))


def _run(file: io.BytesIO, m: _Machine) -> Any:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "STOP":
            if len(m.stack) != 1:
                raise ValueError(f"{len(m.stack)} values instead of one")
            return m.stack[0]
        step = _OPCODES.get(opcode.name)
        if step is None:
            raise ValueError(f"the opcode {opcode.name}")
        if count >= LONGEST:
            raise ValueError(f"more than {LONGEST:,} opcodes")
        step(m, argument)


def _check(value: Any, leaves: tuple[type, ...]) -> None:
    """Refuse what a walk would not come to the end of: cycles, repeated doubling."""
    todo, nodes = [(value, 0)], 0
    while todo:
        value, depth = todo.pop()
        if isinstance(value, dict):
            inside = value.values()
        elif type(value) in (list, tuple):
            inside = value
        elif isinstance(value, (*_ATOMS, *leaves)):
            continue
        else:
            raise ValueError(f"a {type(value).__name__.strip('_')} as a value")
        nodes += len(inside)
        if depth > _DEEPEST or nodes > _MOST_NODES:
            raise ValueError(
                f"a cycle, more than {_DEEPEST} levels or {_MOST_NODES:,} values"
            )
        todo += [(each, depth + 1) for each in inside]


def load(
    file: io.BytesIO,
    table: Table,
    *,
    persistent: Callable[[Any], Any],
    leaves: tuple[type, ...],
) -> Any:
    """Read one pickle; the file is left behind its last byte.

    Args:
        file: in memory, so that a length beyond its end costs nothing.
        table: meaning of the globals that are allowed.
        persistent: meaning of persistent ids, given what stands for one.
        leaves: types made by these two that may stand in the result.

    Returns:
        Dicts, lists and tuples of texts, bytes, numbers, truth values, None and leaves;
        one of them may stand in several places.

    Raises:
        ValueError: for everything else, and for damaged pickles.
    """
    try:
        value = _run(file, _Machine([], {}, table, persistent))
        _check(value, leaves)
        return value
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"damage ({type(error).__name__}: {error})") from None

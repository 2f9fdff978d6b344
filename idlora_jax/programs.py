"""Compiled functions that also take shapes in place of arrays: `--precompile`.

    f = programs.jit(f, "sampler step", static_argnums=0)
    f(*arrays)         as of `jax.jit`
    f(*shapes)         compiles, runs nothing, and gives zeros

So the code that runs with weights runs without them, too: where it is given
`jax.ShapeDtypeStruct`s of weights, each large program is compiled, and small operations
between them work on zeros. What is compiled then is what a run compiles, which a
persistent cache then has.

`collected` gathers what was compiled.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding

from idlora_jax import hosted

GB = 1e9


class Compiled(NamedTuple):
    """One compiled program.

    Attributes:
        name: what it does.
        made: the shape of its first result.
        trace_s: seconds of tracing and lowering.
        compile_s: seconds of compiling, or of reading it from a persistent cache.
        arguments: bytes, of one device.
        temporary: bytes beside arguments and results.
        results: bytes.
    """

    name: str
    made: str
    trace_s: float
    compile_s: float
    arguments: int
    temporary: int
    results: int


_rows: contextvars.ContextVar[list[Compiled] | None]
_rows = contextvars.ContextVar("_rows", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[Compiled]]:
    """What is compiled from shapes in here, in that order."""
    rows: list[Compiled] = []
    token = _rows.set(rows)
    try:
        yield rows
    finally:
        _rows.reset(token)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, Shape)


def _signature(leaf: Any) -> Hashable:
    """What of an argument decides what is compiled."""
    if _is_shape(leaf) or isinstance(leaf, jax.Array | np.ndarray | np.generic):
        dtype = np.dtype(leaf.dtype) if _plain(leaf) else leaf.dtype
        return leaf.shape, dtype, hosted.is_host(leaf)
    return leaf if callable(leaf) or _is_hashable(leaf) else id(leaf)


def _plain(leaf: Any) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _is_hashable(leaf: Any) -> bool:
    try:
        hash(leaf)
    except TypeError:
        return False
    return True


def _is_held(leaf: Any) -> bool:
    """Whether an argument holds what is made of it to its devices."""
    if _is_shape(leaf):
        return leaf.sharding is not None
    traced = isinstance(leaf, Tracer)
    return isinstance(leaf, jax.Array) and not traced and leaf.committed


def beside(tree: Any, other: Any) -> Any:
    """A tree's arrays on the device that holds something of another tree, if one does.

    A loop's state is put there before its first step: what a step gives is there, and
    a second step would be compiled again for it.

    Args:
        tree: small arrays.
        other: arrays or shapes; those on several devices hold nothing here.
    """
    held = (x.sharding for x in jax.tree.leaves(other) if _is_held(x))
    place = next(held, None)
    if not isinstance(place, SingleDeviceSharding):
        return tree
    return jax.device_put(tree, next(iter(place.device_set)))


def _zeros(like: Any, place: Any, *, held: bool) -> Any:
    if not _plain(like):
        return jax.random.wrap_key_data(jnp.zeros((*like.shape, 2), jnp.uint32))
    return jax.device_put(np.zeros(like.shape, like.dtype), place if held else None)


def _lowered(leaves: Sequence[Any]) -> list[Any]:
    """Arguments to trace with: a shape does not tell a trace that it is on the host, as
    an array does. One of each kind stands for all."""
    made: dict[Hashable, Any] = {}

    def one(leaf: Any) -> Any:
        if not (_is_shape(leaf) and hosted.is_host(leaf)):
            return leaf
        key = leaf.shape, leaf.dtype, leaf.sharding
        if key not in made:
            made[key] = _zeros(leaf, leaf.sharding, held=True)
        return made[key]

    return [*map(one, leaves)]


class Program:
    """A jitted function; what it lacks here (`trace`, `lower`, ...) is that one's."""

    def __init__(self, f: Callable[..., Any], name: str, **options: Any) -> None:
        """Args are those of `jit`."""
        self._jitted: Any = jax.jit(f, **options)
        self._name = name
        self._done: dict[Hashable, tuple[Any, Any]] = {}
        self.__name__, self.__doc__ = name, f.__doc__

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The result; zeros if any of the arguments is a shape."""
        leaves = jax.tree.leaves((args, named))
        if not any(map(_is_shape, leaves)):
            return self._jitted(*args, **named)
        zeros = functools.partial(_zeros, held=any(map(_is_held, leaves)))
        return jax.tree.map(zeros, *self.compile(*args, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    def compile(self, *args: Any, **named: Any) -> tuple[Any, Any]:
        """Compile for such arguments, arrays or shapes; nothing is run.

        Returns:
            The results' shapes, and where each would lie.
        """
        leaves, structure = jax.tree.flatten((args, named))
        key = structure, tuple(map(_signature, leaves))
        if key not in self._done:
            clock = [time.perf_counter()]
            args, named = jax.tree.unflatten(structure, _lowered(leaves))
            lowered = self._jitted.lower(*args, **named)
            clock.append(time.perf_counter())
            made = lowered.compile()
            clock.append(time.perf_counter())
            self._done[key] = lowered.out_info, made.output_shardings
            self._note(made, lowered.out_info, clock)
        return self._done[key]

    def _note(self, made: Any, out: Any, clock: Sequence[float]) -> None:
        rows, sizes = _rows.get(), made.memory_analysis()
        if rows is None:
            return
        first = next(iter(jax.tree.leaves(out)), None)
        text = "" if first is None else f"{first.dtype}{[*first.shape]}"
        names = ("argument", "temp", "output")
        # Not every platform says it.
        found = [getattr(sizes, f"{n}_size_in_bytes", 0) for n in names]
        begun, traced, compiled = clock
        seconds = traced - begun, compiled - traced
        rows.append(Compiled(self._name, text, *seconds, *found))


def jit(f: Callable[..., Any], name: str, **options: Any) -> Program:
    """`jax.jit` of a function whose arguments may be shapes, too.

    Args:
        f: the function.
        name: what it does, for people.
        options: of `jax.jit`.
    """
    return Program(f, name, **options)


def table(rows: Sequence[Compiled]) -> str:
    """Lines for people: seconds, and GB (1e9 bytes) on one device."""
    heads = ("trace s", "compile s", "arguments", "temporary", "results")
    named = [f"{row.name} -> {row.made}" for row in rows]
    wide = max(map(len, [*named, "together"]), default=0)

    def line(name: str, cells: Sequence[str]) -> str:
        return f"{name:{wide}}" + "".join(f"{cell:>11}" for cell in cells)

    out = ["compiled programs; memory in GB", line("", heads)]
    for name, row in zip(named, rows, strict=True):
        times = (f"{row.trace_s:.2f}", f"{row.compile_s:.2f}")
        sizes = (f"{size / GB:.3g}" for size in row[4:])
        out.append(line(name, (*times, *sizes)))
    sums = (sum(row.trace_s for row in rows), sum(row.compile_s for row in rows))
    return "\n".join([*out, line("together", [f"{s:.2f}" for s in sums])])

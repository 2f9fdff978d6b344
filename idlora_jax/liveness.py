"""How much memory a traced function needs while it runs, without compiling it.

    temporary(jax.make_jaxpr(f)(*shapes)) -> bytes beyond its arguments

The operations are walked in their order, and what lives at the same time is added up,
with what XLA does to them in mind:

- Elementwise operations run inside of others where that keeps less: a value is stored
  only if it is not larger than what it is made of, or if something reads it that cannot
  take it in, such as a matrix product.
- Such an operation writes over an operand that nobody reads later.
- Products of many matrices (attention) read a copy of an operand whose axes lie in
  another order than they need; so do loops, of stacks that lie so.
- A loop holds what it carries and one round of its body. What is the same in all rounds
  is made before it and stays. What a round cuts out of whole stacks (the weights of a
  layer) may all be there at once. What is in int8 is widened in each round, one kernel
  at a time: XLA does not move out of a loop what grows.

Arguments count nothing: whoever calls the function holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend import core

from idlora_jax import hosted

VIEWS = frozenset(
    "reshape squeeze expand_dims transpose bitcast_convert_type name copy "
    "stop_gradient sharding_constraint".split()
)
"""The same numbers again, each result of its own operand."""
STORING = frozenset(
    "dot_general conv_general_dilated gather scatter scatter-add sort random_bits "
    "cumsum custom_call custom_partitioning device_put while".split()
)
"""Operations that read memory and write memory, whatever stands around them."""
REDUCING = ("reduce_", "arg")
"""How the names of those begin that write memory, but take in what they read."""
JOINING = frozenset(("concatenate", "pad"))
"""These make larger arrays, in memory unless all of it is made from nothing."""
END = 1 << 62
_PLACED = (jax.Array, jax.ShapeDtypeStruct, ShapedArray)


@dataclass
class _Value:
    """What an operation gives: something stored, or to be made from what is.

    Attributes:
        size: bytes if it is stored.
        sources: the buffers that must live as long as it is used.
        stored: whether it lies in memory as it is.
        fixed: whether it is the same in every round of the loop around it.
        again: whether it is made in every round even so.
        turned: whether it lies in memory in another order of axes.
    """

    size: int
    sources: frozenset[int] = frozenset()
    stored: bool = True
    fixed: bool = False
    again: bool = False
    turned: bool = False


@dataclass
class _Moment:
    """What one operation does to memory.

    Attributes:
        reads: buffers that must be there.
        makes: buffers that are there from now on.
        extra: bytes that it alone needs.
        over: whether it may write over what it reads.
    """

    reads: frozenset[int]
    makes: list[int]
    extra: int = 0
    over: bool = False


def nbytes(aval: Any) -> int:
    """Bytes of an array of this shape and dtype on the device; 0 on the host."""
    if isinstance(aval, _PLACED) and hosted.is_host(aval):
        return 0
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    return 0 if shape is None or dtype is None else math.prod(shape) * dtype.itemsize


def _turned(eqn: Any, values: Sequence[_Value]) -> Iterator[_Value]:
    """Operands of a product by samples and heads that XLA turns before it multiplies.

    It takes those as they are whose first axes are samples and heads, with what is
    summed over next to them or last.
    """
    sums, batches = eqn.params["dimension_numbers"]
    for value, own, batch, atom in zip(values, sums, batches, eqn.invars, strict=True):
        first, last = len(batch), atom.aval.ndim - len(own)
        begins = [tuple(range(n, n + len(own))) for n in (first, last)]
        ordered = tuple(batch) == tuple(range(first)) and tuple(own) in begins
        if value.turned or not ordered:
            yield value


def _is_int8(atom: Any) -> bool:
    return getattr(atom.aval, "dtype", None) == np.int8


def _called(eqn: Any) -> Any:
    """The jaxpr that an operation merely calls, or None."""
    found = (eqn.params.get(n) for n in ("jaxpr", "call_jaxpr", "fun_jaxpr"))
    inner = next((f for f in found if f is not None), None)
    return getattr(inner, "jaxpr", inner)


def _carried(eqn: Any, body: Any) -> tuple[int, int]:
    """The operands of a scan that it carries: from which on, and to which.

    Told by their axes, since parameters of a scan differ between versions of jax: of
    what it goes through and stacks, its body sees one axis less.
    """
    through = zip(eqn.invars, body.invars, strict=True)
    made = zip(eqn.outvars, body.outvars, strict=True)
    slices = sum(a.aval.ndim != b.aval.ndim for a, b in through)
    carry = sum(a.aval.ndim == b.aval.ndim for a, b in made)
    last = len(body.invars) - slices
    return last - carry, last


@dataclass
class _Walk:
    """The operations of a function, or of a loop's body, in their order.

    Attributes:
        looped: whether it is a loop's body.
        sizes: bytes by buffer.
        moments: what happened so far.
        kept: bytes that are there all the time.
    """

    looped: bool = False
    sizes: list[int] = field(default_factory=list)
    moments: list[_Moment] = field(default_factory=list)
    kept: int = 0

    def new(self, size: int) -> _Value:
        """A value in a buffer of its own."""
        self.sizes.append(size)
        return _Value(size, frozenset([len(self.sizes) - 1]))

    def total(self, buffers: Iterable[int]) -> int:
        return sum(self.sizes[n] for n in buffers)

    def run(self, jaxpr: Any, inputs: Sequence[_Value]) -> list[_Value]:
        """Walk a function; what it returns."""
        env: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> _Value:
            constant = isinstance(atom, core.Literal) or atom not in env
            return _Value(0, fixed=True) if constant else env[atom]

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            env.update(zip(eqn.outvars, self._step(eqn, values), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        name, sizes = eqn.primitive.name, [nbytes(v.aval) for v in eqn.outvars]
        if name == "optimization_barrier":  # nothing passes it alone
            fixed = all(v.fixed for v in values)
            return [_Value(v.size, v.sources, v.stored, fixed) for v in values]
        if name in VIEWS:
            pairs = zip(values, sizes, strict=False)
            turns = name == "transpose"
            return [
                _Value(n, v.sources, v.stored, v.fixed, turned=turns or v.turned)
                for v, n in pairs
            ]
        if name == "scan":
            return self._loop(eqn, values)
        if name == "cond":
            return self._choice(eqn, values)
        inner = None if name == "while" else _called(eqn)
        if inner is not None and len(inner.invars) == len(values):
            return self.run(inner, values)
        sources = frozenset().union(*(v.sources for v in values))
        fixed = self.looped and all(v.fixed for v in values)
        storing = name in STORING or "attention" in name
        taken_in = not storing and not name.startswith(REDUCING)
        taken_in = taken_in and not (name in JOINING and sources)
        if taken_in and self.total(sources) < sum(sizes):
            again = name == "convert_element_type" and _is_int8(eqn.invars[0])
            if again:
                self._store(values)
            fixed = fixed and not again
            return [_Value(n, sources, False, fixed, again) for n in sizes]
        extra = self._store(values, fixed) if storing else 0
        if name == "dot_general" and eqn.params["dimension_numbers"][1][0]:
            extra += max((v.size for v in _turned(eqn, values)), default=0)
        if fixed:
            self.kept += sum(sizes)
            return [_Value(n, fixed=True) for n in sizes]
        return self._made(sizes, sources, extra, over=taken_in)

    def _made(
        self, sizes: Sequence[int], reads: frozenset[int], extra: int, *, over: bool
    ) -> list[_Value]:
        """Results that are stored from now on."""
        outs = [self.new(n) for n in sizes]
        made = [n for v in outs for n in v.sources]
        self.moments.append(_Moment(reads, made, extra, over))
        return outs

    def _store(self, values: Iterable[_Value], fixed: bool = False) -> int:
        """Bytes for operands that were not stored yet; lasting ones are kept."""
        extra = 0
        for v in values:
            if v.stored:
                continue
            lasting = self.looped and not v.sources and not v.again
            if lasting or (v.fixed and not fixed):
                self.kept += v.size
                v.stored = True
            else:
                extra += v.size
        return extra

    def _choice(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        extra = self._store(values)
        for branch in eqn.params["branches"]:
            walk = _Walk()
            done = walk.run(branch.jaxpr, [_Value(v.size) for v in values[1:]])
            extra = max(extra, walk.most(done))
        reads = frozenset().union(*(v.sources for v in values))
        return self._made(
            [nbytes(v.aval) for v in eqn.outvars], reads, extra, over=False
        )

    def _loop(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        body, rounds = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
        first, last = _carried(eqn, body)
        sizes = [nbytes(v.aval) for v in body.invars]
        if rounds == 1:  # XLA has no loop there, but what is around it may be one.
            pairs = zip(values[last:], sizes[last:], strict=True)
            xs = [_Value(n, x.sources, x.stored, x.fixed) for x, n in pairs]
            return self.run(body, [*values[:last], *xs])
        # Of what a loop takes apart, it reads parts that lie together.
        copied = sum(v.size for v in values[last:] if v.stored and v.turned)
        extra = self._store(values) + copied
        walk = _Walk(looped=True)
        same = [_Value(n, fixed=True) for n in sizes[:first]]
        carry = [walk.new(n) for n in sizes[first:last]]
        parts = [_Value(n, stored=False) for n in sizes[last:]]
        done = walk.run(body, [*same, *carry, *parts])
        inside = walk.most(done, [n for v in carry for n in v.sources]) + walk.kept
        reads = frozenset().union(*(v.sources for v in values))
        # The carry is counted inside, and lies where the loop's operands lay.
        extra += inside - sum(sizes[first:last])
        outs = [nbytes(v.aval) for v in eqn.outvars]
        return self._made(outs, reads, extra, over=True)

    def most(self, results: Sequence[_Value], given: Sequence[int] = ()) -> int:
        """The most bytes that live at once, `given` ones from the beginning."""
        last: dict[int, int] = {}
        for at, moment in enumerate(self.moments):
            last.update(dict.fromkeys([*moment.reads, *moment.makes], at))
        for value in results:
            last.update(dict.fromkeys(value.sources, END))
        live = most = self.total(n for n in given if n in last)
        for at, moment in enumerate(self.moments):
            made = self.total(moment.makes)
            gone = self.total(n for n in moment.reads if last[n] == at)
            unused = self.total(n for n in moment.makes if last[n] == at)
            shared = min(made, gone) if moment.over else 0
            most = max(most, live + made - shared + moment.extra)
            live += made - gone - unused
        return most


def temporary(traced: core.ClosedJaxpr, *, donated: int = 0) -> int:
    """Bytes that a function needs beyond its arguments, its results included.

    Args:
        traced: from `jax.make_jaxpr`.
        donated: how many arrays, the first of its arguments, it may write over.
    """
    walk = _Walk()
    sizes = [nbytes(v.aval) for v in traced.jaxpr.invars]
    over = [walk.new(n) for n in sizes[:donated]]
    done = walk.run(traced.jaxpr, [*over, *map(_Value, sizes[donated:])])
    given = [n for v in over for n in v.sources]
    return walk.most(done, given) + walk.kept - walk.total(given)

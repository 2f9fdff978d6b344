"""Compiling functions of jax, and what XLA says of them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from benchmarks.works import Facts, Timed, timed
from idlora_jax import flops


class Call(NamedTuple):
    """A function and its arguments, which may be shapes."""

    f: Callable[..., Any]
    args: tuple[Any, ...]


class Program(NamedTuple):
    """A compiled function.

    Attributes:
        call: runs it on arrays of the shapes it was compiled for.
        facts: of it.
    """

    call: Callable[..., Any]
    facts: Facts


def block_bodies(jaxpr: Any) -> float:
    """How many transformer blocks a traced function holds, each scan's body once.

    Compiling costs as much as there are of them. Counted are the feed-forward networks
    that blocks name for the backward pass, two in each.
    """
    own = sum(
        eqn.primitive.name == "name" and eqn.params.get("name") == "ff"
        for eqn in jaxpr.eqns
    )
    inside = (block_bodies(inner) for eqn in jaxpr.eqns for inner in _inner(eqn))
    return own / 2 + sum(inside)


def _inner(eqn: Any) -> Iterator[Any]:
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
        closed = getattr(value, "jaxpr", value)
        if hasattr(closed, "eqns"):
            yield closed


def facts_of(compiled: Any, traced: Any, took: Timed) -> Facts:
    """What XLA says of a compiled function, and the FLOPs of what was traced."""
    memory = compiled.memory_analysis()
    known: dict[str, Any] = {}
    if memory is not None:
        known = {
            "temp_bytes": int(memory.temp_size_in_bytes),
            "arg_bytes": int(memory.argument_size_in_bytes),
            "out_bytes": int(memory.output_size_in_bytes),
        }
    count = flops.count(traced.jaxpr)
    known["blocks"] = block_bodies(traced.jaxpr.jaxpr)
    return Facts(count, took.wall, took.cpu, **known)


def _jitted(f: Callable[..., Any]) -> Any:
    return f if hasattr(f, "trace") else jax.jit(f)


def build(f: Callable[..., Any], args: tuple[Any, ...]) -> Program:
    """Compile a function for its arguments (arrays or shapes).

    Args:
        f: of jax; one that is jitted already is taken as it is.
        args: all of its arguments.
    """

    def compiled() -> tuple[Any, Any, Any]:
        traced = _jitted(f).trace(*args)
        lowered = traced.lower()
        return traced, lowered, lowered.compile()

    (traced, lowered, made), took = timed(compiled)
    facts = facts_of(made, traced, took)
    return Program(made, replace(facts, hlo_bytes=len(lowered.as_text())))


def traced(f: Callable[..., Any], args: tuple[Any, ...]) -> Facts:
    """What can be said of a function without compiling it: FLOPs and blocks."""
    jaxpr = _jitted(f).trace(*args).jaxpr
    return Facts(flops.count(jaxpr), blocks=block_bodies(jaxpr.jaxpr))


def together(*programs: Program) -> Facts:
    """Facts of programs that run one after the other."""
    return functools.reduce(operator.add, (p.facts for p in programs))

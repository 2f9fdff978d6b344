"""Weights in host memory: layer by layer they come to the device while a scan runs.

    params = networks.load(base, names, weights_in="host")   kernels of blocks: pinned
    carry = scan(step, fetch, carry, own, shared, stacks, range(layers))

A scan's carry holds the weights of the next layer already, so that they are copied
while the layer before computes: the device has two layers of them instead of all. The
backward pass goes through the layers from the last to the first, fetches them again,
also one ahead, and computes a layer again from the states before it (which is what
rematerialisation in full does). Weights in host memory are frozen: they have no
gradients.

Arrays know where they are, also while a function is traced; nothing else has to be
told. Small parameters (biases, norms, tables, scales of int8) stay on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax import ShapeDtypeStruct as Shape
from jax.core import ShapedArray
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from idlora_jax.types import Tree

Where = Literal["device", "host"]
"""Where the kernels of the transformer's blocks are."""
KIND = "pinned_host"
"""What JAX calls host memory that devices read from by themselves."""
_ENDS = ("/kernel", "/kernel/values")
Placement = Callable[[str, tuple[int, ...]], Sharding]
Step = Callable[[Any, Any, Any, Any], Any]
"""(weights of a layer, carry, what else the layer has, what all share) -> carry."""
Fetch = Callable[[Any, Any], Any]
"""(stacks, a layer's number) -> that layer's weights, on the device."""


def chosen(path: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of the transformer, or a part of one in 8 bits, is moved.

    Args:
        path: without the network's name.
        shape: its own.
    """
    return path.startswith("blocks/") and path.endswith(_ENDS) and len(shape) == 3


def on_host(sharding: Any) -> Any:
    """The same division over devices, in host memory."""
    return sharding.with_memory_kind(KIND)


def placement(inner: Placement | None) -> Placement:
    """Where parameters of the transformer go: as before, but chosen ones on the host.

    Args:
        inner: see `parallel.placement`; None: all on the first device.
    """

    def where(path: str, shape: tuple[int, ...]) -> Sharding:
        own = SingleDeviceSharding(jax.devices()[0])
        found = own if inner is None else inner(path, shape)
        return on_host(found) if chosen(path, shape) else found

    return where


def like(path: str, shape: Shape) -> Shape:
    """The shape of a parameter of the transformer that says where it is."""
    return shape.update(sharding=placement(None)(path, shape.shape))


def is_host(x: Any) -> bool:
    """Whether an array, its shape, or what stands for it in a trace, is on the host."""
    if isinstance(x, Shape):
        found = x.sharding
        marked = isinstance(found, SingleDeviceSharding | NamedSharding)
        return marked and found.memory_kind == KIND
    aval = x if isinstance(x, ShapedArray) else jax.typeof(x)
    return getattr(aval, "memory_space", None) is jax.memory.Space.Host


def any_in(tree: Tree) -> bool:
    """Whether something of a tree is on the host."""
    return any(map(is_host, jax.tree.leaves(tree)))


def nbytes(tree: Any) -> int:
    """Bytes of the arrays or shapes that are on the host."""
    leaves = [x for x in jax.tree.leaves(tree) if is_host(x)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def traceable(tree: Any) -> Any:
    """Shapes as tracing takes them without forgetting which are on the host."""

    def one(x: Any) -> Any:
        if not (isinstance(x, Shape) and is_host(x)):
            return x
        space = jax.memory.Space.Host
        return ShapedArray(x.shape, x.dtype, memory_space=space)

    return jax.tree.map(one, tree)


def fetched(x: Any) -> Any:
    """An array on the device; one that is there already is given back."""
    return jax.device_put(x, jax.memory.Space.Device) if is_host(x) else x


def _float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _parted(tree: Any, chosen: Callable[[Any], bool]) -> tuple[Any, Any]:
    """The chosen leaves and the others, each with None in place of the other."""
    return (
        jax.tree.map(lambda x: x if chosen(x) else None, tree),
        jax.tree.map(lambda x: None if chosen(x) else x, tree),
    )


def _joined(one: Any, other: Any) -> Any:
    """The inverse of `_parted`."""
    pick = lambda a, b: b if a is None else a
    return jax.tree.map(pick, one, other, is_leaf=lambda x: x is None)


def scan(
    step: Step,
    fetch: Fetch,
    carry: Any,
    own: Any,
    shared: Any,
    stacks: Any,
    layers: range,
) -> Any:
    """`carry = step(fetch(stacks, l), carry, own[l], shared)` for each layer l.

    Gradients go to carry, and to what is asked for of own and shared; states between
    layers are kept for them.

    Args:
        step: one layer; it closes over nothing that is traced.
        fetch: brings one layer to the device.
        carry: floating-point arrays.
        own: arrays [n ...], one row for each layer.
        shared: arrays.
        stacks: weights, all or some of them on the host.
        layers: from which to which, n in all.
    """
    (rows, rows_rest), (common, common_rest) = (
        _parted(own, _float),
        _parted(shared, _float),
    )
    fixed = stacks, rows_rest, common_rest
    return _swept(step, fetch, layers, carry, rows, common, fixed)


def _after(layer: int, carry: Any) -> tuple[Any, Any]:
    """A layer's number that is known no sooner than the carry.

    A loop around the scan (the steps of a sample) would otherwise have the first layer
    on the device all the time, once for each scan in it.
    """
    return jax.lax.optimization_barrier((jnp.asarray(layer), carry))


def _forward(
    step: Step,
    fetch: Fetch,
    layers: range,
    carry: Any,
    rows: Any,
    common: Any,
    fixed: Any,
    keep: bool = False,
) -> tuple[Any, Any]:
    """The last carry, and with `keep` the ones before each layer, stacked."""
    stacks, rows_rest, common_rest = fixed
    shared, last = _joined(common, common_rest), layers[-1]

    def body(state: Any, at: Any) -> tuple[Any, Any]:
        (x, weights), (layer, row, rest) = state, at
        ahead = fetch(stacks, jnp.minimum(layer + 1, last))
        done = step(weights, x, _joined(row, rest), shared)
        return (done, ahead), x if keep else None

    first, carry = _after(layers[0], carry)
    start = carry, fetch(stacks, first)
    at = jnp.arange(layers.start, layers.stop), rows, rows_rest
    (done, _), kept = jax.lax.scan(body, start, at)
    return done, kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _swept(step: Step, fetch: Fetch, layers: range, *args: Any) -> Any:
    return _forward(step, fetch, layers, *args)[0]


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.value, tree)


def _kept(
    step: Step, fetch: Fetch, layers: range, carry: Any, *args: Any
) -> tuple[Any, Any]:
    """Forwards; what no gradient is asked for is treated as what can have none."""
    rows, common, (stacks, *rests) = args
    done, kept = _forward(step, fetch, layers, *_values((carry, *args)), keep=True)
    split = [_parted(tree, lambda x: x.perturbed) for tree in (rows, common)]
    asked, others = zip(*_values(split), strict=True)
    fixed = _values(stacks), *map(_joined, others, _values(rests))
    return done, (kept, *asked, fixed)


def _instantiated(slope: Any) -> Array:
    if not isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return slope
    aval: Any = slope
    return jnp.zeros(aval.shape, aval.dtype)


def _backward(
    step: Step, fetch: Fetch, layers: range, saved: Any, slope: Any
) -> tuple[Any, Any, Any, None]:
    kept, rows, common, fixed = saved
    stacks, rows_rest, common_rest = fixed
    slope = jax.tree.map(_instantiated, slope)

    def body(state: Any, at: Any) -> tuple[Any, Any]:
        (slope, total, weights), (layer, x, row, rest) = state, at
        ahead = fetch(stacks, jnp.maximum(layer - 1, layers[0]))

        def run(x: Any, row: Any, common: Any) -> Any:
            shared = _joined(common, common_rest)
            return step(weights, x, _joined(row, rest), shared)

        before, own, more = jax.vjp(run, x, row, common)[1](slope)
        return (before, jax.tree.map(jnp.add, total, more), ahead), own

    zeros = jax.tree.map(jnp.zeros_like, common)
    last, slope = _after(layers[-1], slope)
    start = slope, zeros, fetch(stacks, last)
    at = jnp.arange(layers.start, layers.stop), kept, rows, rows_rest
    (before, total, _), own = jax.lax.scan(body, start, at, reverse=True)
    return before, own, total, None


_swept.defvjp(_kept, _backward, symbolic_zeros=True)

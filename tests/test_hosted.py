"""Weights in host memory: the same numbers, in the device memory of two layers."""

from __future__ import annotations

import functools
import math
from typing import Any

import eight_bits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile
import small_transformer as small
from small_transformer import LAYERS, TARGETS, levels, pair, prompt

from idlora_jax import adapters, hosted, liveness, memory, quantized
from idlora_jax.config import TransformerConfig, transformer_config
from idlora_jax.model import transformer
from idlora_jax.quantized import Int8
from idlora_jax.types import Branch, Skip, Tree
from idlora_jax.weights import int8, networks

SKIP = (Skip(), Skip(video_self=True))
BRANCHES = (Branch(), Branch(use_ref=False), Branch(skip=SKIP))
"""Two spans: the last one differs from the first only in the second layer."""


def in_int8(base: Tree) -> Tree:
    """The blocks' kernels in int8."""

    def one(keys: Any, stack: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not (path.startswith("blocks/") and path.endswith("/kernel")):
            return stack
        made = (int8.rounded(path, layer) for layer in np.asarray(stack))
        parts = map(jnp.asarray, map(np.stack, zip(*made, strict=True)))
        return Int8(*parts, jnp.zeros(0, stack.dtype))

    return jax.tree.map_with_path(one, base)


def moved(base: Tree) -> Tree:
    """What loading with `weights_in="host"` gives of parameters in memory."""
    where = hosted.placement(None)

    def one(keys: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return jax.device_put(leaf, where(path, leaf.shape))

    return jax.tree.map_with_path(one, base)


@functools.cache
def base(kind: str) -> Tree:
    plain = small.base("2.3")
    return {
        "plain": lambda: plain,
        "int8": lambda: in_int8(plain),
        "fp8": lambda: eight_bits.in_memory(plain, (1,)),
    }[kind]()


@functools.cache
def lora(seed: int = 3) -> Tree:
    params = base("plain")
    like = jax.eval_shape(lambda k: adapters.init(k, params, 2), jax.random.key(0))
    return small.random_like(like, seed)


def forward(cfg: TransformerConfig, variables: Tree, **options: Any) -> Any:
    """Velocities of fixed streams, of every branch."""
    prepared = transformer.prepare(cfg, variables, pair(), (prompt("2.3"),))
    args = (cfg, variables, prepared, pair(), levels())
    return transformer.apply(*args, targets=TARGETS, **options)


def velocities(base: Tree, **options: Any) -> Any:
    run = jax.jit(lambda v: forward(small.config("2.3"), v, **options))
    given = {"params": base, "lora": lora()}
    return run.lower(given).compile(compiler_options=quick_compile.OPTIONS)(given)


def slopes(base: Tree, **options: Any) -> Any:
    """Velocities, and the gradient of their squares by the adapter."""

    def loss(lora: Tree, base: Tree) -> Any:
        variables = {"params": base, "lora": lora}
        out = forward(small.config("2.3"), variables, **options)
        return sum(jnp.mean(x**2) for pair in out for x in pair), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    args = lora(), base
    return run.lower(*args).compile(compiler_options=quick_compile.OPTIONS)(*args)


def equal(got: Any, want: Any, rtol: float = 1e-6) -> None:
    """Relative to the largest value of each array."""
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(abs(b).max()))


def test_velocities_are_those_of_weights_on_the_device():
    equal(velocities(moved(base("fp8"))), velocities(base("fp8")))


@pytest.mark.slow
def test_so_are_gradients():
    equal(slopes(moved(base("plain"))), slopes(base("plain")))


@pytest.mark.slow
def test_so_are_those_of_several_branches_and_spans_in_int8():
    options: Any = {"branches": BRANCHES, "scanned": ()}
    equal(slopes(moved(base("int8")), **options), slopes(base("int8"), **options))


@functools.cache
def wide() -> tuple[TransformerConfig, Tree, Tree]:
    """A wider and deeper transformer: config, shapes of base and adapter."""
    cfg = transformer_config({"transformer": small.COMMON | small.WIDE})
    shapes = jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))
    make = lambda k: adapters.init(k, shapes, 1, ("blocks/audio/ff/*",))
    return cfg, shapes, jax.eval_shape(make, jax.random.key(0))


def as_int8(shapes: Tree) -> Tree:
    def one(keys: Any, s: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        if not (path.startswith("blocks/") and path.endswith("/kernel")):
            return s
        scales = jax.ShapeDtypeStruct((s.shape[0], 1, s.shape[2]), jnp.float32)
        values = jax.ShapeDtypeStruct(s.shape, jnp.int8)
        return Int8(values, scales, jax.ShapeDtypeStruct((0,), s.dtype))

    return jax.tree.map_with_path(one, shapes)


def marked(shapes: Tree) -> Tree:
    def one(keys: Any, s: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return hosted.like(path, s)

    return jax.tree.map_with_path(one, shapes)


def traced(shapes: Tree, *, train: bool) -> Any:
    cfg, _, like = wide()

    def loss(adapter: Tree, base: Tree) -> Any:
        (out,) = forward_20(cfg, {"params": base, "lora": adapter})
        return jnp.mean(out.audio**2)

    run = jax.grad(loss) if train else loss
    return jax.jit(run).trace(like, hosted.traceable(shapes))


def forward_20(cfg: TransformerConfig, variables: Tree) -> Any:
    prepared = transformer.prepare(cfg, variables, pair(), (prompt("2.0"),))
    args = (cfg, variables, prepared, pair(), levels())
    return transformer.apply(*args, targets=TARGETS)


def kernels(shapes: Tree) -> int:
    """Bytes of the blocks' kernels in all layers."""
    flat = jax.tree_util.tree_leaves_with_path(shapes["blocks"])
    return sum(
        math.prod(s.shape) * s.dtype.itemsize for _, s in flat if len(s.shape) == 3
    )


@pytest.mark.parametrize("train", [False, True])
def test_the_device_holds_two_layers_by_the_plan(train: bool):
    cfg, shapes, _ = wide()
    host = marked(shapes)
    layer = kernels(shapes) / cfg.layers
    moved_bytes = hosted.nbytes(host)
    assert memory.size(host) + moved_bytes == memory.size(shapes)
    assert memory.size(host, where="host") == moved_bytes > 0.9 * kernels(shapes)
    on, off = (liveness.temporary(traced(s, train=train).jaxpr) for s in (host, shapes))
    assert 1.5 * layer < on < 2.5 * layer and off < on


def temporaries(shapes: Tree) -> int:
    """Bytes beside the arguments of a training step, by XLA's plan."""
    lowered = traced(shapes, train=True).lower()
    found: Any = lowered.compile(
        compiler_options=quick_compile.OPTIONS
    ).memory_analysis()
    return found.temp_size_in_bytes


@pytest.mark.slow
def test_no_stack_is_a_temporary():
    """Not of what is in int8, nor of what is on the host, which on CPU is the device:
    what is fetched from there is a temporary."""
    cfg, shapes, _ = wide()
    layer, plain = kernels(shapes) / cfg.layers, temporaries(shapes)
    assert temporaries(as_int8(shapes)) < plain + layer
    assert temporaries(marked(shapes)) < 0.35 * kernels(shapes)


def test_the_next_layer_is_fetched_while_one_computes():
    """Each scan carries a layer's weights, and its body fetches others."""
    _, shapes, _ = wide()
    found = 0
    for scan in _scans(traced(marked(shapes), train=True).jaxpr.jaxpr):
        body = scan.params["jaxpr"].jaxpr
        carried = _unstacked(scan.outvars, body.outvars)
        consts = _unstacked(scan.invars, body.invars) - carried
        fetches = [e for e in body.eqns if e.primitive.name == "device_put"]
        ahead = {v for e in fetches for v in e.outvars}
        found += bool(ahead)
        assert ahead <= set(body.outvars[:carried])
        used = {v for e in body.eqns if e not in fetches for v in e.invars if _var(v)}
        assert not ahead & used
        sizes = [v.aval.shape for v in body.invars[consts : consts + carried]]
        assert all(sizes.count(v.aval.shape) for v in ahead)
    assert found == 2  # forwards and backwards


def _unstacked(outside: Any, inside: Any) -> int:
    """How many values a body has whole, not one row of them at a time."""
    pairs = zip(outside, inside, strict=True)
    return sum(a.aval.shape == b.aval.shape for a, b in pairs)


def _var(atom: Any) -> bool:
    return not hasattr(atom, "val")


def _scans(jaxpr: Any) -> Any:
    """All scans, also inside of calls."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None and hasattr(inner, "eqns"):
                yield from _scans(inner)


@pytest.mark.parametrize("remat", ["none", "selective"])
def test_another_policy_than_full_is_refused(remat: Any):
    run = lambda v: forward(small.config("2.3"), v, remat=remat)
    with pytest.raises(ValueError, match=f"remat '{remat}'.*expected 'full'"):
        jax.eval_shape(run, {"params": moved(base("plain"))})


def test_only_kernels_of_blocks_are_moved():
    tree = moved(base("int8"))
    kind = lambda x: x.sharding.memory_kind
    flat = jax.tree_util.tree_leaves_with_path(tree)
    for keys, leaf in flat:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        there = kind(leaf) == hosted.KIND
        assert there == (path.startswith("blocks/") and path.endswith("/values")), path
    fp8 = moved(base("fp8"))["blocks"]["video"]["ff"]["up"]["kernel"]
    assert hosted.is_host(fp8.values) and not hosted.is_host(fp8.wide)
    assert quantized.any_in(tree) and hosted.any_in(tree)
    assert LAYERS == fp8.shape[0]


@pytest.mark.parametrize("weights", ["upcast", "int8"])
def test_what_is_loaded_says_in_a_trace_where_it_is(weights: Any, tiny_model: Any):
    options: Any = {"weights": weights, "weights_in": "host"}
    _, params = networks.load(tiny_model[0], ("transformer",), **options)
    flat = jax.tree_util.tree_leaves_with_path(params["transformer"])
    there: list[bool] = []
    look = lambda leaves: there.extend(map(hosted.is_host, leaves))
    jax.jit(look).trace([leaf for _, leaf in flat])
    end = "/kernel" if weights == "upcast" else "/kernel/values"
    paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in flat]
    want = [path.startswith("blocks/") and path.endswith(end) for path in paths]
    assert there == want and any(want)

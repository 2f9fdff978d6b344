"""Running the layers for all branches of a step: one sweep over the stacked weights.

For each layer, for each branch alive there. The scan goes over the layer index; the
layer's weights are cut out inside the checkpointed body (slicing the stack outside
would copy it, and so would saving the slices for the backward pass).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array

from idlora_jax import hosted, parallel, quantized
from idlora_jax.model.attention import KeysValues
from idlora_jax.model.block import AVBlock, Modality, Off, Work
from idlora_jax.model.conditions import (
    Call,
    Inputs,
    Rows,
    in_layer,
    keys_values,
    masks,
    of_kind,
    texts,
)
from idlora_jax.model.spans import Kind, Span, spans
from idlora_jax.types import AV, Prompt, Tree, each

Remat = Literal["none", "selective", "full"]
_POLICIES = jax.checkpoint_policies
_CUTTING = ("dynamic_slice", "squeeze", "reshape", "convert_element_type")


def _activations(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Save everything but the weights of a layer: that would copy the stack.

    Weights pass these primitives between the stack and a matrix product. Activations
    pass them too, and are cheaply made again from what is saved before them. Weights
    kept in 8 bits are also multiplied and selected: a layer's weights have two axes at
    most, its states [B T D] more.
    """
    of_weights = all(len(a.shape) <= 2 for a in operands)
    cutting = of_weights or primitive.name in _CUTTING
    return not cutting and params.get("name") != "weights"


POLICIES = {
    "none": _activations,
    "selective": _POLICIES.save_only_these_names("attention", "ff"),
    "full": _POLICIES.nothing_saveable,
}


def _one(
    call: Call, kind: Kind, layer: Mapping[str, Tree], inputs: Inputs, x: AV, rows: Rows
) -> AV:
    """One layer on states [B T D] with rows [B ...]."""
    branch = kind.branch
    sees = (branch.video_sees_ref, branch.ref_sees_text, branch.frozen)
    work = Work(kind.skip, call.targets, *sees, branch.reads)
    text = rows.text
    if "text_kv" in call.without:
        text = keys_values(call.block, layer, text, inputs.cond)

    def with_rows(
        m: Modality, text: KeysValues, bias: Array | None, length: Array | None
    ) -> Modality:
        return m._replace(text=text, text_bias=bias, length=length)

    cond = each(with_rows, inputs.cond, text, rows.text_bias, rows.length)
    args = (layer, x, cond, work, inputs.bias, rows.off)
    return call.block.apply(*args)  # pyright: ignore


def _side_by_side(
    run: Any, inputs: Inputs, states: AV, size: int, mesh: Mesh | None
) -> AV:
    """`size` groups at a time as rows of one batch."""
    groups = jax.tree.leaves(states)[0].shape[0]
    done = []
    for start in range(0, groups, size):
        n = min(size, groups - start)

        def merge(a: Array, start: int = start, n: int = n) -> Array:
            return parallel.side_by_side(a[start : start + n], mesh)

        def tile(a: Array, n: int = n) -> Array:
            same = jnp.broadcast_to(a[None], (n, *a.shape))
            return parallel.side_by_side(same, mesh)

        def part(a: Array, n: int = n) -> Array:
            return parallel.apart(a, n, mesh)

        x, rows = jax.tree.map(merge, (states, inputs.rows))
        cond, bias = jax.tree.map(tile, (inputs.cond, inputs.bias))
        done.append(jax.tree.map(part, run(Inputs(cond, bias, rows), x, rows)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *done)


def _run_kind(
    call: Call, kind: Kind, layer: Mapping[str, Tree], inputs: Inputs, states: AV
) -> AV:
    """One layer for all groups of a kind: [g B T D] -> [g B T D]."""

    def run(given: Inputs, x: AV, rows: Rows) -> AV:
        return _one(call, kind, layer, given, x, rows)

    groups = len(kind.groups)
    if call.mode == "sweep" and groups > 1:
        return jax.lax.map(lambda a: run(inputs, *a), (states, inputs.rows))
    size = groups if call.mode == "batch" else min(groups, 2)
    return _side_by_side(run, inputs, states, size, call.mesh)


def _layer_of(variables: Mapping[str, Tree], index: Array) -> dict[str, Tree]:
    """Cut out one layer of some collections; what is kept in 8 bits is widened."""
    cut = lambda stack: quantized.layer(stack, index)
    return jax.tree.map(cut, dict(variables), is_leaf=quantized.is_quantized)


def _named(layer: Mapping[str, Tree]) -> Mapping[str, Tree]:
    """Name a layer's variables, so that every remat policy can refuse to save them."""
    return jax.tree.map(lambda w: checkpoint_name(w, "weights"), layer)


def _filled(call: Call, span: Span) -> Span:
    """Groups of a batch repeated, so that each device has as many as the others."""
    if call.mesh is None or call.mode != "batch":
        return span
    parts = call.mesh.shape["guidance"]

    def filled(kind: Kind) -> Kind:
        short = -len(kind.groups) % parts
        return replace(kind, groups=kind.groups + kind.groups[-1:] * short)

    return replace(span, kinds=tuple(map(filled, span.kinds)))


def _divided(call: Call, states: Any) -> Any:
    """States [g B T D] divided over the mesh, whole in their width."""
    groups = "guidance" if call.mode == "batch" else None
    put = lambda x: parallel.constrain(x, call.mesh, groups, parallel.BATCH)
    return jax.tree.map(put, states)


class _Own(NamedTuple):
    """What is one layer's: its number, what it leaves out, weights given as data."""

    index: Array
    off: list[Off]
    data: dict[str, Tree]


def _layer(
    call: Call,
    span: Span,
    layer: Mapping[str, Tree],
    own: _Own,
    inputs: list[Inputs],
    states: tuple[AV, ...],
) -> tuple[AV, ...]:
    """One layer of a span, given its weights, on the states of each kind."""
    layer = _named({**layer, **own.data})
    read = texts(call, span, layer, own.index)
    done = []
    for kind, given, off, state in zip(
        span.kinds, inputs, own.off, states, strict=True
    ):
        given = in_layer(call, kind, given, read, off)
        done.append(_run_kind(call, kind, layer, given, state))
    return _divided(call, tuple(done))


def _streamed(
    call: Call,
    span: Span,
    states: tuple[AV, ...],
    blocks: Mapping[str, Tree],
    own: _Own,
    inputs: list[Inputs],
) -> tuple[AV, ...]:
    """The span's layers, their weights fetched from host memory one ahead."""
    stacks = {c: t for c, t in blocks.items() if hosted.any_in(t)}
    rest = {c: t for c, t in blocks.items() if c not in stacks}
    rest = jax.tree.map(lambda stack: stack[span.start : span.stop], rest)
    static = call._replace(variables={})
    traced = call.cond, call.prompts, call.text_kv

    def step(weights: Any, states: Any, own: _Own, shared: Any) -> tuple[AV, ...]:
        inputs, (cond, prompts, text_kv) = shared
        given = static._replace(cond=cond, prompts=prompts, text_kv=text_kv)
        return _layer(given, span, weights, own, inputs, states)

    own, shared = own._replace(data=rest), (inputs, traced)
    layers = range(span.start, span.stop)
    return hosted.scan(step, _layer_of, states, own, shared, stacks, layers)


def _run_span(
    call: Call,
    span: Span,
    states: tuple[AV, ...],
    remat: Remat,
    scanned: tuple[str, ...],
) -> tuple[AV, ...]:
    """Scan the span's layers over the kinds' stacked states."""
    inputs = [of_kind(call, kind) for kind in span.kinds]
    off = [masks(call, span, kind) for kind in span.kinds]
    blocks = {c: t["blocks"] for c, t in call.variables.items() if "blocks" in t}
    # A slice of a stack would be a copy, so only a whole stack is scanned as data.
    whole = span.stop - span.start == call.cfg.layers
    data = {c: t for c, t in blocks.items() if whole and c in scanned}
    rest = {c: t for c, t in blocks.items() if c not in data}
    states = _divided(call, states)
    own = _Own(jnp.arange(span.start, span.stop), off, data)
    if hosted.any_in(blocks):
        return _streamed(call, span, states, blocks, own, inputs)

    def body(carry: tuple[AV, ...], own: _Own) -> tuple[tuple[AV, ...], None]:
        layer = _layer_of(rest, own.index)
        return _layer(call, span, layer, own, inputs, carry), None

    body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, states, own)[0]


@functools.partial(jax.jit, static_argnums=0)
def text_keys_values(
    block: AVBlock, variables: Mapping[str, Tree], prompts: tuple[Prompt, ...]
) -> tuple[AV, ...]:
    """What all layers attend to of projected prompts: `KeysValues` of [L B S N K].

    Args:
        block: one layer, whose text is not modulated by the noise level.
        variables: collections with stacked "blocks".
        prompts: from `transformer.prepare`.
    """
    blocks = {c: t["blocks"] for c, t in variables.items() if "blocks" in t}
    texts = [AV(prompt.video, prompt.audio) for prompt in prompts]

    def body(carry: None, index: Array) -> tuple[None, tuple[AV, ...]]:
        layer = _layer_of(blocks, index)
        made = (keys_values(block, layer, text, AV(None, None)) for text in texts)
        return carry, tuple(made)

    return jax.lax.scan(body, None, jnp.arange(block.cfg.layers))[1]


def run_layers(call: Call, x: AV, remat: Remat, scanned: tuple[str, ...]) -> list[AV]:
    """States of every branch after all layers; equal branches share one object.

    Args:
        call: what the layers share.
        x: states before the first layer, [B T D] each.
        remat: what the backward pass keeps.
        scanned: collections given to a single span's scan as data.

    Raises:
        ValueError: if one of these has layers kept in 8 bits, which cannot be scanned;
            or for weights in host memory with another policy than "full".
    """
    if any(quantized.any_in(call.variables.get(name, {})) for name in scanned):
        raise ValueError(
            f"transformer: got weights kept in 8 bits among {scanned}, expected them "
            "up-cast; read the base with weights='upcast' to train it"
        )
    if remat != "full" and hosted.any_in(call.variables):
        raise ValueError(
            f"transformer: got remat {remat!r} with weights in host memory, expected "
            "'full': the backward pass fetches and computes each layer again"
        )
    per_branch = [x] * len(call.branches)
    for span in spans(call.branches, call.cfg.layers, call.mode, call.without):
        span = _filled(call, span)
        states = []
        for kind in span.kinds:
            group = [per_branch[g] for g in kind.groups]
            if not kind.branch.use_ref:
                group = [each(lambda h, n: h[:, :n], s, call.targets) for s in group]
            states.append(jax.tree.map(lambda *a: jnp.stack(a), *group))
        done = _run_span(call, span, tuple(states), remat, scanned)
        by_group: dict[int, AV] = {}
        for kind, state in zip(span.kinds, done, strict=True):
            for row, g in enumerate(kind.groups):
                by_group[g] = jax.tree.map(lambda a, row=row: a[row], state)
        per_branch = [by_group[g] for g in span.source]
    return per_branch

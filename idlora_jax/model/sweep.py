"""Running the layers for all branches of a step: one sweep over the stacked weights.

For each layer, for each branch alive there. The scan goes over the layer index; the
layer's weights are cut out inside the checkpointed body (slicing the stack outside
would copy it, and so would saving the slices for the backward pass).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array

from idlora_jax import hosted, parallel, quantized
from idlora_jax.config import TransformerConfig
from idlora_jax.model.block import AVBlock, Modality, Work
from idlora_jax.model.spans import Kind, Mode, Span, spans
from idlora_jax.types import AV, Bias, Branch, Prompt, Tree, each

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


class Call(NamedTuple):
    """What the layers of one forward pass share.

    Attributes:
        cfg: the transformer.
        block: one layer.
        variables: collections with stacked "blocks".
        cond: `AV[Modality]` without text.
        prompts: projected prompts.
        branches: from `spans.checked`.
        targets: numbers of target tokens.
        bias: additive biases.
        mode: how branches are grouped.
        mesh: that the rows are divided over, or None.
    """

    cfg: TransformerConfig
    block: AVBlock
    variables: Mapping[str, Tree]
    cond: AV
    prompts: tuple[Prompt, ...]
    branches: tuple[Branch, ...]
    targets: AV
    bias: Bias
    mode: Mode
    mesh: Mesh | None = None


class Rows(NamedTuple):
    """What differs between groups of one kind, stacked [g B ...]: AV each."""

    text: AV
    text_bias: AV
    length: AV


class Inputs(NamedTuple):
    """Conditions and biases of a kind, and the `Rows` of its groups."""

    cond: AV
    bias: Bias
    rows: Rows


def _first(m: Modality, n: int) -> Modality:
    """The conditions of the first n tokens."""
    rows = slice(n)
    return m._replace(
        denoise=m.denoise[:, rows],
        rope=m.rope.of(rows),
        cross_rope=None if m.cross_rope is None else m.cross_rope.of(rows),
        length=None,
    )


def _first_bias(bias: Bias, n: AV) -> Bias:
    """The biases between the first n tokens of each modality."""
    v, a, every = slice(n.video), slice(n.audio), slice(None)
    cuts = Bias((v, v), (a, a), (v, every), (a, every), (v, a), (a, v))
    pairs = zip(bias, cuts, strict=True)
    return Bias(*(None if b is None else b[:, r, c] for b, (r, c) in pairs))


def _text_bias(prompt: Prompt, tokens: int, given: Array | None) -> Array | None:
    """[B T S]: the given bias, or that of the prompt's padding."""
    if given is not None or prompt.mask is None:
        return given
    floor = jnp.finfo(jnp.float32).min
    row = jnp.where(prompt.mask, 0.0, floor)[:, None]
    return jnp.broadcast_to(row, (row.shape[0], tokens, row.shape[2]))


def _ordered(m: Modality, targets: int) -> Modality:
    """With the order of keys in which padding of the targets comes last."""
    tokens = m.denoise.shape[1]
    if m.targets is None or tokens == targets:
        return m
    at, valid, refs = jnp.arange(tokens)[None], m.targets[:, None], tokens - targets
    behind = jnp.where(at < valid + refs, at + targets - valid, at - refs)
    return m._replace(order=jnp.where(at < valid, at, behind))


def _lengths(m: Modality, targets: int, uses: list[bool]) -> Array | None:
    """[g B] valid keys of groups of one kind, which may differ in using the reference;
    padding of the targets lies behind them (`_ordered`)."""
    batch, tokens = m.denoise.shape
    full = m.length
    if m.targets is not None:
        full = m.targets + ((tokens if full is None else full) - targets)
    if all(uses):
        return None if full is None else jnp.stack([full] * len(uses))
    full = jnp.full(batch, tokens) if full is None else full
    alone = jnp.full(batch, targets) if m.targets is None else m.targets
    return jnp.stack([full if use else alone for use in uses])


def _stacked(arrays: list[Array | None]) -> Array | None:
    return None if any(a is None for a in arrays) else jnp.stack(arrays)  # pyright: ignore


def _with_masks(prompts: list[Prompt]) -> list[Prompt]:
    """Where one prompt has a mask, all get one."""
    if all(p.mask is None for p in prompts):
        return prompts
    full = [
        jnp.ones((p.video if p.audio is None else p.audio).shape[:2], bool)
        for p in prompts
    ]
    return [
        p._replace(mask=f) if p.mask is None else p
        for p, f in zip(prompts, full, strict=True)
    ]


def _inputs(call: Call, kind: Kind) -> Inputs:
    cond, bias = call.cond, call.bias
    if not kind.branch.use_ref:
        cond, bias = each(_first, cond, call.targets), _first_bias(bias, call.targets)
    cond = each(_ordered, cond, call.targets)
    prompts = _with_masks([call.prompts[call.branches[g].prompt] for g in kind.groups])
    uses = [call.branches[g].use_ref or not kind.branch.use_ref for g in kind.groups]

    def rows(m: Modality, name: str, targets: int) -> tuple[Array | None, ...]:
        given, tokens = getattr(bias, f"{name}_text"), m.denoise.shape[1]
        texts = jnp.stack([getattr(p, name) for p in prompts])
        biases = _stacked([_text_bias(p, tokens, given) for p in prompts])
        return texts, biases, _lengths(m, targets, uses)

    made = each(rows, cond, AV("video", "audio"), call.targets)
    return Inputs(
        cond, bias, Rows(*(each(lambda r, n=n: r[n], made) for n in range(3)))
    )


def _one(
    call: Call, kind: Kind, layer: Mapping[str, Tree], inputs: Inputs, x: AV, rows: Rows
) -> AV:
    """One layer on states [B T D] with rows [B ...]."""
    branch = kind.branch
    sees = (branch.video_sees_ref, branch.ref_sees_text, branch.frozen)
    work = Work(kind.skip, call.targets, *sees)

    def with_rows(
        m: Modality, text: Array, bias: Array | None, length: Array | None
    ) -> Modality:
        return m._replace(text=text, text_bias=bias, length=length)

    cond = each(with_rows, inputs.cond, *rows)
    return call.block.apply(layer, x, cond, work, inputs.bias)  # pyright: ignore


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


def _streamed(
    step: hosted.Step,
    blocks: Mapping[str, Tree],
    inputs: list[Inputs],
    states: tuple[AV, ...],
    span: Span,
) -> tuple[AV, ...]:
    """The span's layers, their weights fetched from host memory one ahead."""
    layers = range(span.start, span.stop)
    stacks = {c: t for c, t in blocks.items() if hosted.any_in(t)}
    own = {c: t for c, t in blocks.items() if c not in stacks}
    own = jax.tree.map(lambda stack: stack[span.start : span.stop], own)
    return hosted.scan(step, _layer_of, states, own, inputs, stacks, layers)


def _run_span(
    call: Call,
    span: Span,
    states: tuple[AV, ...],
    remat: Remat,
    scanned: tuple[str, ...],
) -> tuple[AV, ...]:
    """Scan the span's layers over the kinds' stacked states."""
    inputs = [_inputs(call, kind) for kind in span.kinds]
    blocks = {c: t["blocks"] for c, t in call.variables.items() if "blocks" in t}
    # A slice of a stack would be a copy, so only a whole stack is scanned as data.
    whole = span.stop - span.start == call.cfg.layers
    data = {c: t for c, t in blocks.items() if whole and c in scanned}
    rest = {c: t for c, t in blocks.items() if c not in data}

    def step(
        shared: Mapping[str, Tree],
        carry: tuple[AV, ...],
        own: Mapping[str, Tree],
        inputs: list[Inputs],
    ) -> tuple[AV, ...]:
        layer = _named({**shared, **own})
        zipped = zip(span.kinds, inputs, carry, strict=True)
        done = tuple(_run_kind(call, k, layer, i, s) for k, i, s in zipped)
        return _divided(call, done)

    if hosted.any_in(blocks):
        return _streamed(step, blocks, inputs, _divided(call, states), span)

    def body(
        carry: tuple[AV, ...], at: tuple[Array, dict[str, Tree]]
    ) -> tuple[tuple[AV, ...], None]:
        index, own = at
        return step(_layer_of(rest, index), carry, own, inputs), None

    body = jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False)
    layers = jnp.arange(span.start, span.stop)
    return jax.lax.scan(body, _divided(call, states), (layers, data))[0]


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
    for span in spans(call.branches, call.cfg.layers, call.mode):
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

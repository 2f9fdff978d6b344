"""What the layers of one step are given: conditions per kind, rows per group.

A kind's groups share the conditions of their tokens; prompts, numbers of valid keys and
what they leave out differ, and are stacked. Keys and values of a prompt are made once a
layer for all groups that read it, or, where the noise level does not modulate text
(2.0), once for all steps (`transformer.prepare`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from idlora_jax.config import TransformerConfig
from idlora_jax.model.block import AVBlock, Modality, Off
from idlora_jax.model.spans import Kind, Mode, Span
from idlora_jax.savings import Saving
from idlora_jax.types import AV, Bias, Branch, Prompt, Tree, each


class Call(NamedTuple):
    """What the layers of one forward pass share.

    Attributes:
        cfg: the transformer.
        block: one layer.
        variables: collections with stacked "blocks".
        cond: `AV[Modality]` without text.
        prompts: projected prompts.
        text_kv: their keys and values in all layers, [L B S N K] each, or None.
        branches: from `spans.checked`.
        targets: numbers of target tokens.
        bias: additive biases.
        mode: how branches are grouped.
        mesh: that the rows are divided over, or None.
        without: savings that are switched off.
    """

    cfg: TransformerConfig
    block: AVBlock
    variables: Mapping[str, Tree]
    cond: AV
    prompts: tuple[Prompt, ...]
    text_kv: tuple[AV, ...] | None
    branches: tuple[Branch, ...]
    targets: AV
    bias: Bias
    mode: Mode
    mesh: Mesh | None = None
    without: tuple[Saving, ...] = ()


class Rows(NamedTuple):
    """What differs between groups of one kind, stacked [g B ...].

    Attributes:
        text: `AV` of `KeysValues` in one layer, or of projected prompts.
        text_bias: `AV`.
        length: `AV`.
        off: what one layer computes and leaves out.
    """

    text: AV
    text_bias: AV
    length: AV
    off: Off = Off()


class Inputs(NamedTuple):
    """Conditions and biases of a kind, and the `Rows` of its groups (without what
    differs between layers)."""

    cond: AV
    bias: Bias
    rows: Rows


def first_tokens(values: Array, n: int, denoise: Array | None) -> Array:
    """Of the first n tokens, where values [B M ...] are given for each (`Modality`)."""
    return values[:, :n] if denoise is None else values


def _first(m: Modality, n: int) -> Modality:
    """The conditions of the first n tokens."""
    rows = slice(n)

    def cut(values: Array | None) -> Array | None:
        return None if values is None else first_tokens(values, n, m.denoise)

    return m._replace(
        ada=cut(m.ada),
        cross_ada=cut(m.cross_ada),
        cross_gate=cut(m.cross_gate),
        denoise=None if m.denoise is None else m.denoise[:, rows],
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
    tokens = m.tokens
    if m.targets is None or tokens == targets:
        return m
    at, valid, refs = jnp.arange(tokens)[None], m.targets[:, None], tokens - targets
    behind = jnp.where(at < valid + refs, at + targets - valid, at - refs)
    return m._replace(order=jnp.where(at < valid, at, behind))


def _lengths(m: Modality, targets: int, uses: list[bool]) -> Array | None:
    """[g B] valid keys of groups of one kind, which may differ in using the reference;
    padding of the targets lies behind them (`_ordered`)."""
    batch, tokens = m.ada.shape[0], m.tokens
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


def of_kind(call: Call, kind: Kind) -> Inputs:
    """What does not differ between layers; `Rows.text` is that of `in_layer`."""
    cond, bias = call.cond, call.bias
    if not kind.branch.use_ref:
        cond, bias = each(_first, cond, call.targets), _first_bias(bias, call.targets)
    cond = each(_ordered, cond, call.targets)
    prompts = _with_masks([call.prompts[call.branches[g].prompt] for g in kind.groups])
    uses = [call.branches[g].use_ref or not kind.branch.use_ref for g in kind.groups]

    def rows(m: Modality, name: str, targets: int) -> tuple[Array | None, ...]:
        given = getattr(bias, f"{name}_text")
        biases = _stacked([_text_bias(p, m.tokens, given) for p in prompts])
        return biases, _lengths(m, targets, uses)

    made = each(rows, cond, AV("video", "audio"), call.targets)
    biases, lengths = (each(lambda r, n=n: r[n], made) for n in range(2))
    return Inputs(cond, bias, Rows(AV(None, None), biases, lengths))


def masks(call: Call, span: Span, kind: Kind) -> Off:
    """What each layer of a span computes and leaves out: [layers g B] bool, or None."""
    (batch, *_), *_ = (m.ada.shape for m in call.cond if m is not None)

    def one(name: str) -> Any:
        rows = [
            [getattr(call.branches[g].skip[layer], name) for g in kind.groups]
            for layer in range(span.start, span.stop)
        ]
        off = np.array(rows) & (not getattr(kind.skip, name))
        return np.repeat(off[..., None], batch, axis=-1) if off.any() else None

    return Off(*map(one, Off._fields))


def texts(call: Call, span: Span, layer: Mapping[str, Tree], index: Array) -> Any:
    """What a layer attends to of each prompt that is read there, by its number."""
    groups = (g for kind in span.kinds for g in kind.groups)
    found = {}
    for n in dict.fromkeys(call.branches[g].prompt for g in groups):
        text = each(lambda _, t: t, call.cond, AV(*call.prompts[n][:2]))
        if "text_kv" in call.without:
            found[n] = text
        elif call.text_kv is not None:
            cut = lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False)
            found[n] = jax.tree.map(cut, call.text_kv[n])
        else:
            found[n] = keys_values(call.block, layer, text, call.cond)
    return found


def keys_values(block: AVBlock, layer: Mapping[str, Tree], text: AV, cond: AV) -> Any:
    """`AV` of `KeysValues` that one layer makes of a projected prompt."""
    ada = each(lambda m: m.prompt_ada, cond)
    return block.apply(layer, text, ada, method="text_keys_values")  # pyright: ignore


def in_layer(call: Call, kind: Kind, inputs: Inputs, texts: Any, off: Off) -> Inputs:
    """With what one layer attends to of each group's prompt, and what it leaves out."""
    own = [texts[call.branches[g].prompt] for g in kind.groups]
    text: Any = jax.tree.map(lambda *a: jnp.stack(a), *own)
    return inputs._replace(rows=inputs.rows._replace(text=text, off=off))

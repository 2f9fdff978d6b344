"""LTX-2 as a function from two token streams to two velocities.

    base = init(cfg, key)                                    one plain nested dict
    prepared = prepare(cfg, variables, streams, prompts)     once per shape and prompt
    velocities = apply(cfg, variables, prepared, streams, sigma, branches)

`variables` is {"params": base} or {"params": base, "lora": adapter}. Layers are stacked
on a leading axis; a `lax.scan` over the layer index cuts one layer out inside the
checkpointed body, so neither the forward nor the backward pass copies the stack.

Source: ltx_core/model/transformer/model.py: LTXModel; model_configurator.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from idlora_jax import parallel
from idlora_jax.config import TransformerConfig
from idlora_jax.model import rope
from idlora_jax.model.attention import Backend
from idlora_jax.model.block import AVBlock, Modality, Work
from idlora_jax.model.conditions import Call, first_tokens
from idlora_jax.model.ends import Ends, timestep_frequencies
from idlora_jax.model.prepared import (
    Prepared,
    both_ends,
    call_ends,
    modality_conditions,
    prepare,
    tables,
)
from idlora_jax.model.spans import Mode, checked
from idlora_jax.model.sweep import Remat, run_layers
from idlora_jax.savings import Saving
from idlora_jax.types import (
    AV,
    Bias,
    Branch,
    Numerics,
    Skip,
    Stream,
    Tree,
    each,
)

__all__ = ["Prepared", "apply", "bind", "init", "prepare"]


def _dummy(cfg: TransformerConfig, name: str) -> tuple[Array, Array, Modality]:
    own = getattr(cfg, name)
    zeros, d = jnp.zeros, own.width
    half = d // own.heads // 2
    table = rope.Rope(*(zeros((1, 1, own.heads, half)) for _ in range(2)))
    half = cfg.cross_width // own.heads // 2
    cross = rope.Rope(*(zeros((1, 1, own.heads, half)) for _ in range(2)))
    rows = 9 if cfg.text_adaln else 6
    prompt_ada = zeros((1, 1, 2, d)) if cfg.text_adaln else None
    m = Modality(
        ada=zeros((1, 2, rows, d)),
        cross_ada=zeros((1, 1, 4, d)),
        cross_gate=zeros((1, 1, 1, d)),
        prompt_ada=prompt_ada,
        denoise=zeros((1, 1), bool),
        rope=table,
        cross_rope=cross,
        text=None,
        text_bias=None,
        length=None,
    )
    return zeros((1, 1, d)), zeros((1, 1, own.text_width)), m


def init(cfg: TransformerConfig, key: Array) -> dict[str, Any]:
    """Random base parameters: {"video", "audio", "blocks"}, blocks stacked [L ...]."""
    keys = jax.random.split(key, 3)
    freqs = jnp.asarray(timestep_frequencies())
    base: dict[str, Any] = {}
    for name, ends, k in zip(AV._fields, both_ends(cfg), keys, strict=False):
        own = getattr(cfg, name)
        width = cfg.caption_channels if cfg.caption_projection else own.text_width
        shapes = (1, 1, own.in_channels), (1, 1, width)
        base[name] = ends.init(k, *map(jnp.zeros, shapes), freqs)["params"]
    dummies = zip(*(_dummy(cfg, n) for n in AV._fields), strict=True)
    x, text, cond = (AV(*pair) for pair in dummies)
    work = Work(Skip(), AV(1, 1), True, True, frozenset())
    block = AVBlock(cfg)

    def one(k: Array) -> Tree:
        return block.init(k, x, text, cond, work, method="touch")["params"]

    base["blocks"] = jax.vmap(one)(jax.random.split(keys[2], cfg.layers))
    return base


def _padded(h: Array, tokens: int) -> Array:
    return jnp.pad(h, ((0, 0), (0, tokens - h.shape[1]), (0, 0)))


def _counts(streams: AV, targets: AV | None) -> AV:
    """Numbers of target tokens; all tokens where not given."""
    targets = targets or AV(None, None)
    return AV(
        *(
            (s.x.shape[1] if n is None else n) if s is not None else None
            for s, n in zip(streams, targets, strict=True)
        )
    )


def _only(names: frozenset[str], x: AV) -> AV:
    return AV(*(part if n in names else None for n, part in x._asdict().items()))


def apply(
    cfg: TransformerConfig,
    variables: Mapping[str, Tree],
    prepared: Prepared,
    streams: AV,
    sigma: AV,
    branches: tuple[Branch, ...] = (Branch(),),
    *,
    targets: AV | None = None,
    bias: Bias | None = None,
    mode: Mode = "sweep",
    remat: Remat = "full",
    scanned: tuple[str, ...] = ("lora",),
    backend: Backend = "auto",
    mesh: Mesh | None = None,
    numerics: Numerics = "exact",
    without: tuple[Saving, ...] = (),
) -> tuple[AV, ...]:
    """Velocities of every branch.

    Args:
        cfg: the transformer.
        variables: {"params": base} and optionally {"lora": adapter}.
        prepared: from `prepare`, for the same positions.
        streams: `AV[Stream]`; either modality may be None.
        sigma: [B] per modality, in [0, 1]; a token's timestep is `denoise * sigma`.
        branches: what each pass does.
        targets: static numbers of target tokens; behind them stand references. The
            default takes all tokens as targets.
        bias: additive attention biases, for research.
        mode: `sweep` runs all branches layer by layer, one at a time; `pair` and
            `batch` put branches that do the same work side by side as batch rows. The
            results are equal.
        remat: what the backward pass keeps: everything but weights, attention outputs
            and feed-forward pre-activations, or layer inputs only.
        scanned: collections that a single span scans as data, so that their gradients
            stack instead of scattering: the adapter, or the base when it is trained.
        backend: see `attention.attend`.
        mesh: devices that samples and, in mode "batch", branches are divided over; the
            weights are, as they are placed (`parallel`).
        numerics: as of `prepare`, for rope tables that are not from there.
        without: savings that are switched off, to find a fault.

    Returns:
        One AV of [B T C] per branch, None where it is not read. Rows of references that
        a branch drops are 0.

    Raises:
        ValueError: if a branch's skips do not fit the depth.

    Source: ltx_core/model/transformer/model.py: LTXModel.forward.
    """
    counts = _counts(streams, targets)
    pairs = zip(streams, counts, strict=True)
    any_ref = any(s is not None and s.x.shape[1] > n for s, n in pairs)
    tidy = checked(branches, cfg.layers, any_ref=any_ref)
    if "rope_tables" in without:
        own, cross = tables(cfg, streams, numerics)
        prepared = prepared._replace(rope=own, cross_rope=cross)
    per_token = "two_timesteps" in without
    conditions = modality_conditions(
        cfg, variables, prepared, streams, sigma, per_token=per_token
    )
    cond, embedded = jax.tree.map(
        lambda a: parallel.constrain(a, mesh, parallel.BATCH), conditions
    )
    names, ends = AV("video", "audio"), both_ends(cfg)
    x = each(
        lambda s, e, n: call_ends(e, variables, n, "tokens", s.x), streams, ends, names
    )
    call = Call(
        cfg,
        AVBlock(cfg, backend, "chunked_attention" not in without),
        variables,
        cond,
        prepared.prompts,
        prepared.text_kv,
        tidy,
        counts,
        bias or Bias(),
        mode,
        mesh,
        without,
    )
    states = run_layers(call, x, remat, scanned)

    def velocity(h: Array, e: Ends, n: str, emb: Array, s: Stream) -> Array:
        denoise = None if per_token else s.denoise[:, : h.shape[1]]
        args = (h, first_tokens(emb, h.shape[1], denoise), denoise)
        out = call_ends(e, variables, n, "velocity", *args)
        return _padded(out, s.x.shape[1])

    done: dict[int, AV] = {}
    out = []
    for state, branch, asked in zip(states, tidy, branches, strict=True):
        if id(state) not in done:
            read = _only(branch.reads, state)
            done[id(state)] = each(velocity, read, ends, names, embedded, streams)
        out.append(_only(asked.reads, done[id(state)]))
    return tuple(out)


def bind(cfg: TransformerConfig, **options: Any) -> functools.partial:
    """`apply` with the configuration and options fixed, as other modules take it."""
    return functools.partial(apply, cfg, **options)

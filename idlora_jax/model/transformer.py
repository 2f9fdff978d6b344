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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from idlora_jax import parallel
from idlora_jax.config import TransformerConfig
from idlora_jax.model import rope
from idlora_jax.model.attention import Backend
from idlora_jax.model.block import AVBlock, Modality, Work
from idlora_jax.model.ends import Ends, timestep_frequencies
from idlora_jax.model.spans import Mode, checked
from idlora_jax.model.sweep import Call, Remat, run_layers
from idlora_jax.quantized import plain
from idlora_jax.types import (
    AV,
    Bias,
    Branch,
    Numerics,
    Prompt,
    Skip,
    Stream,
    Tree,
    each,
)


class Prepared(NamedTuple):
    """What is constant over the steps of one sample.

    Attributes:
        rope: tables per modality.
        cross_rope: tables of the cross-modal attention per modality.
        prompts: projected prompts.
        freqs: timestep frequencies.
    """

    rope: AV
    cross_rope: AV
    prompts: tuple[Prompt, ...]
    freqs: Array


def _ends(cfg: TransformerConfig) -> AV:
    return AV(Ends(cfg, cfg.video), Ends(cfg, cfg.audio))


def _at(variables: Mapping[str, Tree], name: str) -> dict[str, Tree]:
    return {c: plain(tree[name]) for c, tree in variables.items() if name in tree}


def _call(
    ends: Ends, variables: Mapping[str, Tree], name: str, method: str, *args: Any
) -> Any:
    """A method of one modality's `Ends`, with its parameters and adapters."""
    return ends.apply(_at(variables, name), *args, method=method)


def _dummy_modality(cfg: TransformerConfig, name: str) -> tuple[Array, Modality]:
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
        text=zeros((1, 1, own.text_width)),
        text_bias=None,
        length=None,
    )
    return zeros((1, 1, d)), m


def init(cfg: TransformerConfig, key: Array) -> dict[str, Any]:
    """Random base parameters: {"video", "audio", "blocks"}, blocks stacked [L ...]."""
    keys = jax.random.split(key, 3)
    freqs = jnp.asarray(timestep_frequencies())
    base: dict[str, Any] = {}
    for name, ends, k in zip(AV._fields, _ends(cfg), keys, strict=False):
        own = getattr(cfg, name)
        width = cfg.caption_channels if cfg.caption_projection else own.text_width
        x, text = jnp.zeros((1, 1, own.in_channels)), jnp.zeros((1, 1, width))
        base[name] = ends.init(k, x, text, freqs)["params"]
    (xv, mv), (xa, ma) = (_dummy_modality(cfg, n) for n in AV._fields)
    work = Work(Skip(), AV(1, 1), True, True, frozenset())
    block = AVBlock(cfg)

    def one(k: Array) -> Tree:
        return block.init(k, AV(xv, xa), AV(mv, ma), work, Bias())["params"]

    base["blocks"] = jax.vmap(one)(jax.random.split(keys[2], cfg.layers))
    return base


def prepare(
    cfg: TransformerConfig,
    variables: Mapping[str, Tree],
    streams: AV,
    prompts: tuple[Prompt, ...],
    *,
    numerics: Numerics = "exact",
) -> Prepared:
    """Rope tables of the streams' positions and the projected prompts.

    Args:
        cfg: the transformer.
        variables: {"params": base} and optionally {"lora": adapter}.
        streams: `AV[Stream]`; only positions are read.
        prompts: text features after the connectors; `Branch.prompt` indexes them.
        numerics: "exact" or the reference's float32 operation order.
    """
    common = {
        "theta": cfg.rope_theta,
        "float64": cfg.rope_float64,
        "numerics": numerics,
    }
    cross_max = (max(cfg.video.max_pos[0], cfg.audio.max_pos[0]),)
    own = AV(cfg.video, cfg.audio)
    width = cfg.cross_width
    tables = each(
        lambda s, m: rope.tables(
            s.pos, m.max_pos, width=m.width, heads=m.heads, **common
        ),
        streams,
        own,
    )
    cross = each(
        lambda s, m: rope.tables(
            s.pos[:, :1], cross_max, width=width, heads=m.heads, **common
        ),
        streams,
        own,
    )
    projected = tuple(_project_prompt(cfg, variables, prompt) for prompt in prompts)
    freqs = jnp.asarray(timestep_frequencies())
    return Prepared(tables, cross, projected, freqs)


def _project_prompt(
    cfg: TransformerConfig, variables: Mapping[str, Tree], prompt: Prompt
) -> Prompt:
    def one(text: Array, ends: Ends, name: str) -> Array:
        return _call(ends, variables, name, "text", text)

    pair = AV(prompt.video, prompt.audio)
    return Prompt(*each(one, pair, _ends(cfg), AV("video", "audio")), prompt.mask)


def _modality_conditions(
    cfg: TransformerConfig,
    variables: Mapping[str, Tree],
    prepared: Prepared,
    streams: AV,
    sigma: AV,
) -> tuple[AV, AV]:
    """`AV[Modality]` without text, and the embedded timesteps for the output."""
    both = streams.video is not None and streams.audio is not None
    others = AV(sigma.audio, sigma.video) if both else AV(None, None)

    def one(
        s: Stream,
        ends: Ends,
        name: str,
        own: Array,
        other: Array | None,
        table: rope.Rope,
        cross: rope.Rope,
    ) -> tuple[Modality, Array]:
        args = (own, other, prepared.freqs, s.x.dtype)
        out = _call(ends, variables, name, "modulations", *args)
        ada, embedded, prompt_ada, cross_ada, cross_gate = out
        m = Modality(
            ada=ada,
            cross_ada=cross_ada,
            cross_gate=cross_gate,
            prompt_ada=prompt_ada,
            denoise=s.denoise,
            rope=table,
            cross_rope=cross,
            text=None,
            text_bias=None,
            length=s.length,
            targets=s.target_length,
        )
        return m, embedded

    names = AV("video", "audio")
    args = (_ends(cfg), names, sigma, others, prepared.rope, prepared.cross_rope)
    pairs = each(one, streams, *args)
    return each(lambda p: p[0], pairs), each(lambda p: p[1], pairs)


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

    Returns:
        One AV of [B T C] per branch. Rows of references that a branch drops are 0.

    Raises:
        ValueError: if a branch's skips do not fit the depth.

    Source: ltx_core/model/transformer/model.py: LTXModel.forward.
    """
    counts = _counts(streams, targets)
    pairs = zip(streams, counts, strict=True)
    any_ref = any(s is not None and s.x.shape[1] > n for s, n in pairs)
    tidy = checked(branches, cfg.layers, any_ref=any_ref)
    bias = bias or Bias()
    conditions = _modality_conditions(cfg, variables, prepared, streams, sigma)
    cond, embedded = jax.tree.map(
        lambda a: parallel.constrain(a, mesh, parallel.BATCH), conditions
    )
    names = AV("video", "audio")
    ends = _ends(cfg)
    x = each(
        lambda s, e, n: _call(e, variables, n, "tokens", s.x),
        streams,
        ends,
        names,
    )
    block = AVBlock(cfg, backend)
    prompts = prepared.prompts
    call = Call(cfg, block, variables, cond, prompts, tidy, counts, bias, mode, mesh)
    states = run_layers(call, x, remat, scanned)

    def velocity(h: Array, e: Ends, n: str, emb: Array, s: Stream) -> Array:
        rows = h.shape[1]
        args = (h, emb, s.denoise[:, :rows])
        out = _call(e, variables, n, "velocity", *args)
        return _padded(out, s.x.shape[1])

    done: dict[int, AV] = {}
    out = []
    for state in states:
        if id(state) not in done:
            done[id(state)] = each(velocity, state, ends, names, embedded, streams)
        out.append(done[id(state)])
    return tuple(out)


def bind(cfg: TransformerConfig, **options: Any) -> functools.partial:
    """`apply` with the configuration and options fixed, as other modules take it."""
    return functools.partial(apply, cfg, **options)

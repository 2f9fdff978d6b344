"""What is made before the layers: once per sample, and once per step.

Once per shape and prompt: rope tables, projected prompts, and where the noise level
does not touch text, its keys and values in all layers. Once per step: AdaLN values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from idlora_jax.config import TransformerConfig
from idlora_jax.model import rope
from idlora_jax.model.block import AVBlock, Modality
from idlora_jax.model.ends import Ends, timestep_frequencies
from idlora_jax.model.sweep import text_keys_values
from idlora_jax.quantized import plain
from idlora_jax.types import AV, Numerics, Prompt, Stream, Tree, each


class Prepared(NamedTuple):
    """What is constant over the steps of one sample.

    Attributes:
        rope: tables per modality.
        cross_rope: tables of the cross-modal attention per modality.
        prompts: projected prompts.
        freqs: timestep frequencies.
        text_kv: keys and values of the prompts in all layers, or None; see `prepare`.
    """

    rope: AV
    cross_rope: AV
    prompts: tuple[Prompt, ...]
    freqs: Array
    text_kv: tuple[AV, ...] | None = None


def both_ends(cfg: TransformerConfig) -> AV:
    """`Ends` of video and audio."""
    return AV(Ends(cfg, cfg.video), Ends(cfg, cfg.audio))


def _at(variables: Mapping[str, Tree], name: str) -> dict[str, Tree]:
    return {c: plain(tree[name]) for c, tree in variables.items() if name in tree}


def call_ends(
    ends: Ends, variables: Mapping[str, Tree], name: str, method: str, *args: Any
) -> Any:
    """A method of one modality's `Ends`, with its parameters and adapters."""
    return ends.apply(_at(variables, name), *args, method=method)


def prepare(
    cfg: TransformerConfig,
    variables: Mapping[str, Tree],
    streams: AV,
    prompts: tuple[Prompt, ...],
    *,
    numerics: Numerics = "exact",
    text_kv: bool = False,
) -> Prepared:
    """Rope tables of the streams' positions and the projected prompts.

    Args:
        cfg: the transformer.
        variables: {"params": base} and optionally {"lora": adapter}.
        streams: `AV[Stream]`; only positions are read.
        prompts: text features after the connectors; `Branch.prompt` indexes them.
        numerics: "exact" or the reference's float32 operation order.
        text_kv: whether to make each prompt's keys and values in all layers here, once
            for all steps (2 L S D values of each modality: 1.2 GB at full size).

    Raises:
        ValueError: for `text_kv` where the noise level modulates text (2.3).
    """
    own, cross = tables(cfg, streams, numerics)
    projected = tuple(_project_prompt(cfg, variables, prompt) for prompt in prompts)
    freqs = jnp.asarray(timestep_frequencies())
    if not text_kv:
        return Prepared(own, cross, projected, freqs)
    if cfg.text_adaln:
        raise ValueError(
            "prepare: got text_kv=True, but this transformer modulates text by the "
            "noise level, so that keys and values differ in every step; leave it out"
        )
    made = text_keys_values(AVBlock(cfg), variables, projected)
    return Prepared(own, cross, projected, freqs, made)


def tables(cfg: TransformerConfig, streams: AV, numerics: Numerics) -> tuple[AV, AV]:
    """Rope tables of the self-attention and of the cross-modal one, per modality."""
    common = {
        "theta": cfg.rope_theta,
        "float64": cfg.rope_float64,
        "numerics": numerics,
    }
    cross_max = (max(cfg.video.max_pos[0], cfg.audio.max_pos[0]),)
    own = AV(cfg.video, cfg.audio)
    width = cfg.cross_width
    found = each(
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
    return found, cross


def _project_prompt(
    cfg: TransformerConfig, variables: Mapping[str, Tree], prompt: Prompt
) -> Prompt:
    def one(text: Array, ends: Ends, name: str) -> Array:
        return call_ends(ends, variables, name, "text", text)

    pair = AV(prompt.video, prompt.audio)
    return Prompt(*each(one, pair, both_ends(cfg), AV("video", "audio")), prompt.mask)


def modality_conditions(
    cfg: TransformerConfig,
    variables: Mapping[str, Tree],
    prepared: Prepared,
    streams: AV,
    sigma: AV,
    *,
    per_token: bool = False,
) -> tuple[AV, AV]:
    """`AV[Modality]` without text, and the embedded timesteps for the output.

    Args:
        cfg: the transformer.
        variables: as of `prepare`.
        prepared: from it.
        streams: `AV[Stream]`.
        sigma: [B] per modality.
        per_token: whether AdaLN runs on the timestep of every token, not on two.
    """
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
        denoise = s.denoise if per_token else None
        args = (own, other, prepared.freqs, s.x.dtype, denoise)
        out = call_ends(ends, variables, name, "modulations", *args)
        ada, embedded, prompt_ada, cross_ada, cross_gate = out
        m = Modality(
            ada=ada,
            cross_ada=cross_ada,
            cross_gate=cross_gate,
            prompt_ada=prompt_ada,
            denoise=None if per_token else s.denoise,
            rope=table,
            cross_rope=cross,
            text=None,
            text_bias=None,
            length=s.length,
            targets=s.target_length,
        )
        return m, embedded

    names = AV("video", "audio")
    args = (both_ends(cfg), names, sigma, others, prepared.rope, prepared.cross_rope)
    pairs = each(one, streams, *args)
    return each(lambda p: p[0], pairs), each(lambda p: p[1], pairs)

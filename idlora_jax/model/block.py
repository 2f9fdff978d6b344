"""One layer of the transformer: self, text, cross-modal attention and feed-forward.

Each modality's residual stream x passes, with m = AdaLN values of its tokens,

    x += gate1 * self(norm(x) (1 + scale1) + shift1)
    x += text(norm(x), prompt)                       (2.3: modulated and gated too)
    x += gate_c * cross(norm(x) (1 + s) + t, norm(y) (1 + s') + t')
    x += gate2 * ff(norm(x) (1 + scale2) + shift2)

where y is the other modality before either cross attention. Video and audio share this
one body; only widths differ. A timestep is 0 or sigma, so AdaLN runs on these two and
each token picks its row. What a layer attends to of a prompt is given to it, since
several passes share it.

Source: ltx_core/model/transformer/transformer.py: BasicAVTransformerBlock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from idlora_jax.config import ModalityConfig, TransformerConfig
from idlora_jax.model.attention import Attention, Backend, KeysValues
from idlora_jax.model.layers import FeedForward, rms_norm
from idlora_jax.model.rope import Rope
from idlora_jax.types import AV, BOTH, Bias, Skip, each


class Modality(NamedTuple):
    """What one modality's layers are conditioned on, equal in all layers.

    Attributes:
        ada: [B M k D], AdaLN values at timesteps (0, sigma): M = 2; or of each token.
        cross_ada: [B M 4 D], as `ada`, or M = 1 (the other's sigma).
        cross_gate: [B M 1 D].
        prompt_ada: [B 1 2 D] or None.
        denoise: [B T] bool, which of the two timesteps a token has; None where values
            are of each token.
        rope: tables of the self-attention.
        cross_rope: tables of the cross-modal attention (time only).
        text: `KeysValues` of the prompt in this layer, [B S N K] each.
        text_bias: [B T S] additive bias or None.
        length: [B] valid keys or None.
        targets: [B] valid target tokens, where these are padded.
        order: [B T] tokens with the valid ones first, or None where they lie so.
    """

    ada: Array
    cross_ada: Array | None
    cross_gate: Array | None
    prompt_ada: Array | None
    denoise: Array | None
    rope: Rope
    cross_rope: Rope | None
    text: KeysValues | None
    text_bias: Array | None
    length: Array | None
    targets: Array | None = None
    order: Array | None = None

    @property
    def tokens(self) -> int:
        """T."""
        return self.rope.cos.shape[1]

    @property
    def valid(self) -> dict[str, Any]:
        """Which tokens are seen as keys."""
        return {"length": self.length, "order": self.order}


class Work(NamedTuple):
    """What a layer does (static).

    `targets` counts the target tokens of (video, audio): audio keys behind it are
    hidden from video where `video_sees_ref` is False, and text from reference rows
    where `ref_sees_text` is False. Nothing but `reads` is read of the result.
    """

    skip: Skip
    targets: AV
    video_sees_ref: bool
    ref_sees_text: bool
    frozen: frozenset[str]
    reads: frozenset[str] = BOTH

    def updates(self, name: str) -> bool:
        """Whether a modality's states change in this layer, and are read of it."""
        return name in self.reads and name not in self.frozen


class Off(NamedTuple):
    """What samples leave out though it is computed, [B] bool each (None: of none).

    Fields are those of `Skip`.
    """

    video_self: Array | None = None
    audio_self: Array | None = None
    a2v: Array | None = None
    v2a: Array | None = None


def pick(table: Array, values: Array, denoise: Array | None) -> tuple[Array, ...]:
    """Rows of `table` [k D] plus `values` [B M k D], chosen per token: k of [B T D]."""
    rows = table.astype(values.dtype)[None, None] + values
    if denoise is None or rows.shape[1] == 1:
        return tuple(rows[:, :, n] for n in range(rows.shape[2]))
    which = denoise[..., None]
    return tuple(
        jnp.where(which, rows[:, 1:, n], rows[:, :1, n]) for n in range(rows.shape[2])
    )


def keep(x: Array, new: Array, off: Array | None) -> Array:
    """`new`, but `x` in the samples that are `off` [B]."""
    return new if off is None else jnp.where(off[:, None, None], x, new)


def modulate(x: Array, scale: Array, shift: Array, eps: float) -> Array:
    """norm(x) (1 + scale) + shift."""
    return rms_norm(x, eps) * (1 + scale) + shift


class Half(nn.Module):
    """One modality's part of a layer; `cross` reads the other modality.

    Attributes:
        cfg: the transformer.
        own: this modality.
        other: the other one (width of the cross-attention's context).
        backend: see `attention.attend`.
        chunks: see `attention.attend`.
    """

    cfg: TransformerConfig
    own: ModalityConfig
    other: ModalityConfig
    backend: Backend = "auto"
    chunks: bool = True

    def setup(self) -> None:
        """Create the attentions, the feed-forward and the AdaLN tables."""
        cfg, own = self.cfg, self.own
        shared = {
            "gated": cfg.gated_attention,
            "rope": cfg.rope,
            "eps": cfg.norm_eps,
            "backend": self.backend,
            "chunks": self.chunks,
            "out_width": own.width,
        }
        self.self_attn = Attention(own.heads, own.head_dim, **shared)
        self.text_attn = Attention(own.heads, own.head_dim, **shared)
        audio = cfg.audio
        self.cross_attn = Attention(audio.heads, audio.head_dim, **shared)
        self.ff = FeedForward()
        init = nn.initializers.normal(own.width**-0.5)
        rows = 9 if cfg.text_adaln else 6
        self.table = self.param("table", init, (rows, own.width))
        self.cross_table = self.param("cross_table", init, (5, own.width))
        if cfg.text_adaln:
            self.prompt_table = self.param("prompt_table", init, (2, own.width))

    def attend_self(
        self, x: Array, m: Modality, skip: bool, bias: Array | None, off: Array | None
    ) -> Array:
        """Add self-attention; a skipped one is dropped (2.0) or passes values (2.3).

        Where `skip` is not known for all samples, `off` [B] says it of each.
        """
        drops = self.cfg.skipped_self_attention == "drop"
        if skip and drops:
            return x
        shift, scale, gate = pick(self.table[:3], m.ada[:, :, :3], m.denoise)
        h = modulate(x, scale, shift, self.cfg.norm_eps)
        if skip:
            return x + self.self_attn.values_only(h) * gate
        passes = None if drops else off
        seen = self.self_attn(h, rope=m.rope, bias=bias, passes=passes, **m.valid)
        return keep(x, x + seen * gate, off if drops else None)

    def attend_text(self, x: Array, m: Modality, blind_from: int | None) -> Array:
        """Add attention to the prompt."""
        kwargs = {
            "bias": m.text_bias,
            "blind_from": blind_from,
            "blind_gradient": self.cfg.blind_gradient,
        }
        assert m.text is not None
        if not self.cfg.text_adaln:
            return x + self.text_attn(rms_norm(x, self.cfg.norm_eps), m.text, **kwargs)
        shift, scale, gate = pick(self.table[6:9], m.ada[:, :, 6:9], m.denoise)
        h = modulate(x, scale, shift, self.cfg.norm_eps)
        return x + self.text_attn(h, m.text, **kwargs) * gate

    def text_keys_values(self, text: Array, prompt_ada: Array | None) -> KeysValues:
        """What this layer attends to of a projected prompt [B S E].

        In 2.3 text is modulated by the noise level, with `prompt_ada` [B 1 2 D].
        """
        if self.cfg.text_adaln:
            assert prompt_ada is not None
            shift, scale = pick(self.prompt_table, prompt_ada, None)
            text = text * (1 + scale) + shift
        return self.text_attn.keys_values(text)

    def cross_side(self, h: Array, m: Modality, reads_audio: bool) -> Array:
        """Modulate normalised states `h` for audio-to-video or video-to-audio."""
        assert m.cross_ada is not None
        rows = slice(0, 2) if reads_audio else slice(2, 4)
        scale, shift = pick(self.cross_table[rows], m.cross_ada[:, :, rows], m.denoise)
        return h * (1 + scale) + shift

    def cross_update(
        self,
        q: Array,
        kv: Array,
        m: Modality,
        rope: Rope | None,
        bias: Array | None,
        valid: Mapping[str, Any],
    ) -> Array:
        """What attention to the other modality adds."""
        assert m.cross_gate is not None
        (gate,) = pick(self.cross_table[4:], m.cross_gate, m.denoise)
        seen = self.cross_attn.keys_values(kv, rope)
        out = self.cross_attn(q, seen, rope=m.cross_rope, bias=bias, **valid)
        return out * gate

    def feed_forward(self, x: Array, m: Modality) -> Array:
        """Add the feed-forward network."""
        shift, scale, gate = pick(self.table[3:6], m.ada[:, :, 3:6], m.denoise)
        return x + self.ff(modulate(x, scale, shift, self.cfg.norm_eps)) * gate


class AVBlock(nn.Module):
    """One layer over both modalities; either may be None.

    Attributes:
        cfg: the transformer.
        backend: see `attention.attend`.
        chunks: see `attention.attend`.
    """

    cfg: TransformerConfig
    backend: Backend = "auto"
    chunks: bool = True

    def setup(self) -> None:
        """Create the two halves."""
        video, audio = self.cfg.video, self.cfg.audio
        self.video = Half(self.cfg, video, audio, self.backend, self.chunks)
        self.audio = Half(self.cfg, audio, video, self.backend, self.chunks)

    def text_keys_values(self, text: AV, prompt_ada: AV) -> AV:
        """`KeysValues` of a projected prompt in this layer, of each modality."""
        halves = AV(self.video, self.audio)
        return each(
            lambda t, h, ada: h.text_keys_values(t, ada), text, halves, prompt_ada
        )

    def _crosses(self, x: AV, work: Work) -> AV:
        """Whether each modality takes something from the other."""
        both = x.video is not None and x.audio is not None
        skips = AV(work.skip.a2v, work.skip.v2a)
        return AV(
            *(
                both and work.updates(name) and not skip
                for name, skip in skips._asdict().items()
            )
        )

    def _cross(self, x: AV, cond: AV, work: Work, bias: Bias, off: Off) -> AV:
        """Audio-to-video and video-to-audio attention, both from the old states."""
        halves, takes = AV(self.video, self.audio), self._crosses(x, work)
        if not any(takes):
            return x
        normed = AV(*(rms_norm(h, self.cfg.norm_eps) for h in x))
        video, audio = x
        if takes.video:
            keys = slice(None if work.video_sees_ref else work.targets.audio)
            alone = {"length": cond.audio.targets}
            valid = cond.audio.valid if work.video_sees_ref else alone
            q = halves.video.cross_side(normed.video, cond.video, True)
            kv = halves.audio.cross_side(normed.audio, cond.audio, True)
            rope, a2v = cond.audio.cross_rope.of(keys), bias.a2v
            update = halves.video.cross_update(
                q, kv[:, keys], cond.video, rope, a2v, valid
            )
            video = keep(video, video + update, off.a2v)
        if takes.audio:
            q = halves.audio.cross_side(normed.audio, cond.audio, False)
            kv = halves.video.cross_side(normed.video, cond.video, False)
            rope, valid = cond.video.cross_rope, cond.video.valid
            update = halves.audio.cross_update(q, kv, cond.audio, rope, bias.v2a, valid)
            audio = keep(audio, audio + update, off.v2a)
        return AV(video, audio)

    def __call__(
        self, x: AV, cond: AV, work: Work, bias: Bias, off: Off | None = None
    ) -> AV:
        """Run the layer.

        Args:
            x: states, [B T D] each.
            cond: `Modality` each.
            work: what to do (static).
            bias: additive attention biases.
            off: what samples leave out of it.
        """
        off = off or Off()
        new: dict[str, Array | None] = x._asdict()
        present = [n for n in AV._fields if new[n] is not None]
        takes = self._crosses(x, work)
        read = AV(takes.audio, takes.video)
        for name in present:
            dead = name not in work.reads and not getattr(read, name)
            if dead or name in work.frozen:
                continue
            half, m, own = getattr(self, name), getattr(cond, name), f"{name}_self"
            skip, without = getattr(work.skip, own), getattr(off, own)
            h = half.attend_self(new[name], m, skip, getattr(bias, own), without)
            hides = name == "audio" and not work.ref_sees_text
            new[name] = half.attend_text(h, m, work.targets.audio if hides else None)
        new = self._cross(AV(**new), cond, work, bias, off)._asdict()
        for name in filter(work.updates, present):
            half, m = getattr(self, name), getattr(cond, name)
            new[name] = half.feed_forward(new[name], m)
        return AV(**new)

    def touch(self, x: AV, text: AV, cond: AV, work: Work) -> AV:
        """Use every parameter once (used by `init` only)."""
        seen = self.text_keys_values(text, each(lambda m: m.prompt_ada, cond))
        cond = each(lambda m, t: m._replace(text=t), cond, seen)
        return self(x, cond, work, Bias())

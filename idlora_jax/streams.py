"""Building the token streams the model sees, the same way in training and sampling.

A stream starts as the target's tokens, all to be denoised. Fixing the first frame or
appending a reference marks tokens as given: `denoise` False, `x` and `clean` both the
given value. `noise` then mixes noise into the rest. The order does not matter, except
that the reference comes last.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idlora_jax import geometry
from idlora_jax.types import AudioGrid, Numerics, Stream, VideoGrid, stream


def target(
    clean: Float[Array, "B T C"] | None,
    grid: VideoGrid | AudioGrid,
    *,
    batch: int = 1,
    channels: int = geometry.VIDEO_CHANNELS,
    start_s: geometry.Real = 0.0,
    numerics: Numerics = "exact",
    rounding: geometry.Rounding | None = None,
) -> Stream:
    """The tokens to generate: every token is denoised.

    Args:
        clean: the known tokens (training, second stage); None: zeros of `batch` and
            `channels`.
        grid: the size, which sets number and positions of the tokens.
        batch: B where `clean` is None.
        channels: C where `clean` is None.
        start_s: seconds added to the time axis of the positions.
        numerics: see `geometry.positions`.
        rounding: see `geometry.positions`.

    Raises:
        ValueError: if `clean` has not the grid's number of tokens.
    """
    count = geometry.tokens(grid)
    x = jnp.zeros((batch, count, channels)) if clean is None else clean
    if x.shape[1] != count:
        raise ValueError(f"target: {x.shape[1]} tokens, expected {count} for {grid}")
    pos = geometry.positions(
        grid, start_s=start_s, numerics=numerics, rounding=rounding
    )
    pos = jnp.broadcast_to(pos, (len(x), *pos.shape[1:]))
    return stream(x, x, jnp.ones(x.shape[:2], bool), pos)


def fix_first_frame(
    s: Stream,
    frame: Float[Array, "B HW C"],
    where: Bool[Array, " B"] | None = None,
) -> Stream:
    """Give the first tokens: those of the first latent frame, or of several.

    Args:
        s: a stream without reference.
        frame: the tokens.
        where: samples to do it for (default: all).

    Raises:
        ValueError: if there are more than the stream has.
    """
    count, total = frame.shape[1], s.x.shape[1]
    if count > total:
        raise ValueError(
            f"fix_first_frame: the frame has {count} tokens, the stream {total}; "
            "encode the image at the clip's size"
        )
    chosen = jnp.ones(len(frame), bool) if where is None else where
    fixed = chosen[:, None] & (jnp.arange(total) < count)[None]
    frame = jnp.pad(frame.astype(s.x.dtype), ((0, 0), (0, total - count), (0, 0)))
    return s._replace(
        x=jnp.where(fixed[..., None], frame, s.x),
        clean=jnp.where(fixed[..., None], frame, s.clean),
        denoise=s.denoise & ~fixed,
    )


def add_reference(
    s: Stream,
    ref: Float[Array, "B Tr C"],
    pos: Float[Any, "_ A Tr 2"],
    length: Int[Array, " B"] | None = None,
) -> Stream:
    """Append given tokens the target may attend to.

    Args:
        s: the stream so far; its targets may be padded on the right (`target_length`).
        ref: the reference's tokens.
        pos: their positions, [B A Tr 2] or [1 A Tr 2] (`geometry.reference_positions`).
        length: valid reference tokens per sample, where `ref` is padded on the right.

    Raises:
        ValueError: if `s` already ends in a padded reference.
    """
    if s.length is not None:
        raise ValueError(
            "add_reference: the stream already ends in a padded reference; join the "
            "references into one before padding"
        )
    pos = jnp.broadcast_to(jnp.asarray(pos), (len(ref), *pos.shape[1:]))
    ref = ref.astype(s.x.dtype)
    given = jnp.zeros(ref.shape[:2], bool)
    return stream(
        x=jnp.concatenate([s.x, ref], 1),
        clean=jnp.concatenate([s.clean, ref], 1),
        denoise=jnp.concatenate([s.denoise, given], 1),
        pos=jnp.concatenate([s.pos, pos], 2),
        is_ref=jnp.concatenate([s.is_ref, ~given], 1),
        length=None if length is None else s.x.shape[1] + length,
        target_length=s.target_length,
    )


def hide_reference(s: Stream, targets: int, where: Bool[Array, " B"]) -> Stream:
    """Hide the reference of some samples: their keys end with the target's tokens.

    To the target this is the same as dropping those tokens.

    Args:
        s: a stream with a reference.
        targets: its static number of target tokens.
        where: samples to do it for.
    """
    shown = s.x.shape[1] if s.length is None else s.length
    return s._replace(length=jnp.where(where, targets, shown))


def noise(s: Stream, noise: Float[Array, "B T C"], sigma: Float[Array, " B"]) -> Stream:
    """Set x to `(1 - sigma) clean + sigma noise` where tokens are denoised.

    Fixed tokens become `clean`, whatever the noise holds there.

    Source: ltx_core/components/noisers.py: GaussianNoiser.
    """
    level = sigma.astype(s.clean.dtype)[:, None, None]
    mixed = (1 - level) * s.clean + level * noise.astype(s.clean.dtype)
    return s._replace(x=jnp.where(s.denoise[..., None], mixed, s.clean))


def split(s: Stream, n_target: int) -> tuple[Stream, Stream]:
    """The first `n_target` tokens and the rest (the reference).

    Source: scripts/inference_one_stage.py (dropping the reference after the loop).
    """

    def part(cut: slice, **lengths: Any) -> Stream:
        return stream(
            x=s.x[:, cut],
            clean=s.clean[:, cut],
            denoise=s.denoise[:, cut],
            pos=s.pos[:, :, cut],
            is_ref=s.is_ref[:, cut],
            **lengths,
        )

    rest = None if s.length is None else s.length - n_target
    target = part(slice(None, n_target), target_length=s.target_length)
    return target, part(slice(n_target, None), length=rest)


def freeze(s: Stream) -> Stream:
    """Fix every token at `clean` (audio in the second stage)."""
    return s._replace(x=s.clean, denoise=jnp.zeros_like(s.denoise))

"""The arrays and static facts every other module speaks in.

Letters (one letter, one meaning): B batch, T tokens, S text tokens, C latent channels,
D width, N heads, K head width, A position axes (3 video, 1 audio), L layers, R rank,
G guidance branches, F H W frames, height, width. Latents are channel-last.

Arrays live in NamedTuples, static facts in frozen dataclasses, never both in one type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Numerics = Literal["exact", "reference"]
Tree = Mapping[str, Any]
Adapter = Tree
"""Nested dict shaped like the parameters; each adapted kernel is `{a, b}`.

`a` is [L I R] (or [I R] outside the block stack), `b` is [L R O]; the change of the
kernel is `a @ b`. Unscaled while trained; `adapters.scale` folds alpha/rank into `b`.
"""


class AV(NamedTuple):
    """A pair of anything: one value for video, one for audio; either may be None."""

    video: Any
    audio: Any


def each(f: Callable[..., Any], *pairs: AV) -> AV:
    """Apply `f` to the video parts and to the audio parts.

    A modality whose part in the first pair is None stays None.
    """
    return AV(*(None if xs[0] is None else f(*xs) for xs in zip(*pairs, strict=True)))


class Stream(NamedTuple):
    """One modality's tokens: targets first, references last. Build it with `stream`."""

    x: Any
    clean: Any
    denoise: Any
    pos: Any
    is_ref: Any
    length: Any
    target_length: Any = None


def stream(
    x: Float[Array, "B T C"],
    clean: Float[Array, "B T C"],
    denoise: Bool[Array, "B T"],
    pos: Float[Array, "B A T 2"],
    is_ref: Bool[Array, "B T"] | None = None,
    length: Int[Array, " B"] | None = None,
    target_length: Int[Array, " B"] | None = None,
) -> Stream:
    """Build a checked `Stream`.

    Args:
        x: the current (noisy) tokens.
        clean: what fixed tokens are reset to, and the training target's clean part.
        denoise: True where noise is removed, False where `clean` is kept. A token's
            timestep is always `denoise * sigma`.
        pos: [start, end) of each token: seconds on the first axis, pixels after it.
        is_ref: True for reference tokens (default: none).
        length: tokens per sample up to the end of the reference, for padded references.
        target_length: valid target tokens per sample, for padded targets. Those from
            there on, up to the reference, are seen by nothing.
    """
    is_ref = jnp.zeros(denoise.shape, bool) if is_ref is None else is_ref
    return Stream(x, clean, denoise, pos, is_ref, length, target_length)


class Prompt(NamedTuple):
    """Text features after the connectors: video [B S D], audio [B S Da], mask [B S].

    S is fixed, so that a prompt never recompiles a stage. `mask` is True for valid
    tokens, None when all are valid (always so after the connectors' registers).
    """

    video: Any
    audio: Any
    mask: Any = None


class Bias(NamedTuple):
    """Additive attention biases, [B Tq Tk] each, for research; None = no bias."""

    video_self: Any = None
    audio_self: Any = None
    video_text: Any = None
    audio_text: Any = None
    a2v: Any = None
    v2a: Any = None


class Skip(NamedTuple):
    """What one layer leaves out (static)."""

    video_self: bool = False
    audio_self: bool = False
    a2v: bool = False
    v2a: bool = False


BOTH = frozenset({"video", "audio"})
"""Names of the two modalities."""


@dataclass(frozen=True)
class Branch:
    """What one forward pass does. Static and hashable; a plain call is `Branch()`.

    Attributes:
        prompt: index into the prepared prompts.
        skip: one `Skip` per layer; the empty tuple skips nothing.
        use_ref: False drops the reference tokens.
        video_sees_ref: False hides the audio reference from audio-to-video attention.
        ref_sees_text: False gives reference rows the mean of the text values.
        frozen: modalities attended to but not updated ("video", "audio").
        reads: modalities whose velocities are read; there are none of the others.
    """

    prompt: int = 0
    skip: tuple[Skip, ...] = ()
    use_ref: bool = True
    video_sees_ref: bool = True
    ref_sees_text: bool = True
    frozen: frozenset[str] = frozenset()
    reads: frozenset[str] = BOTH


@jax.tree_util.register_static
@dataclass(frozen=True)
class Rate:
    """Frames per second, in trees of arrays: static there, so that another one retraces
    (positions are made on the host)."""

    fps: float


@dataclass(frozen=True)
class VideoGrid:
    """Pixel size of a clip: frames (8k+1), height and width (multiples of 32), fps."""

    frames: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True)
class AudioGrid:
    """Number of audio latent frames (25 per second).

    Attributes:
        frames: all of them.
        before: how many of them lie before time 0; they are made and cut off again.
    """

    frames: int
    before: int = 0


@dataclass(frozen=True)
class Layout:
    """The grids of the tokens being generated; either modality may be absent."""

    video: VideoGrid | None
    audio: AudioGrid | None

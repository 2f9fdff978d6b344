"""Requests, the streams that a stage starts from, and the latents it ends with.

    request --start--> streams of a first stage, still without noise
    request, latents --refine--> streams of a refining stage, at twice the size
    streams --finish--> latents, references dropped

A refining stage denoises the enlarged video again from its first noise level; the sound
is given: its tokens have `denoise` False and come out bit by bit as they went in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from idlora_jax import geometry, keys, streams
from idlora_jax import references as refs
from idlora_jax.keys import Keys
from idlora_jax.references import USUAL, Placing
from idlora_jax.types import AV, Layout, Numerics, Stream, VideoGrid, each

LARGER = 2
"""How much a refining stage's sides exceed those of the stage before."""


class Request(NamedTuple):
    """What B samples are made from.

    Attributes:
        prompts: `Prompt`s after the connectors: positive, then negative (which only
            text guidance reads).
        reference: audio latents [B Tr M C] of the voice to take, or a tuple of several,
            each in its own stretch of negative time, the first nearest to zero; None:
            no reference.
        first_frame: video latents [B f H W C] the clip begins with, one of a picture or
            several of the end of another clip; or a tuple, one per stage, encoded at
            its size; None: free.
        first_audio: audio latents [B t M C] the clip begins with; None: free.
        video_reference: video latents [B f h w C] of another clip at the same frame
            rate, for adapters trained with one; its sides are the clip's, or those
            divided by one whole number; None: no such reference.
        noise: `AV` of standard normal [B T C] in the streams' order (targets, then
            reference rows, which are not used), or one per stage; None: drawn from
            the key.
    """

    prompts: Any
    reference: Any = None
    first_frame: Any = None
    noise: Any = None
    first_audio: Any = None
    video_reference: Any = None


def of_stage(request: Request, stage: int) -> Request:
    """The request with what one stage takes of it.

    Args:
        request: see `Request`.
        stage: its number; only the first takes the references.

    Raises:
        ValueError: if a first frame or noise for this stage is missing.
    """
    frame, noise = request.first_frame, request.noise
    several = isinstance(noise, tuple) and not isinstance(noise, AV)
    if frame is not None and (stage or isinstance(frame, tuple)):
        frame = _nth(frame, stage, "first_frame")
    if noise is not None and several:
        noise = _nth(noise, stage, "noise")
    elif stage:
        noise = None
    if stage:
        return Request(request.prompts, None, frame, noise)
    return request._replace(first_frame=frame, noise=noise)


def _nth(values: Any, stage: int, name: str) -> Any:
    if not isinstance(values, tuple) or stage >= len(values):
        got = len(values) if isinstance(values, tuple) else 1
        raise ValueError(
            f"request: got {name} for {got} stages, but the plan has stage "
            f"{stage + 1}; give a tuple of one per stage, encoded at its size"
        )
    return values[stage]


def clip(
    frames: geometry.Real,
    height: geometry.Real,
    width: geometry.Real,
    fps: geometry.Real = 25.0,
    *,
    pre_roll: geometry.Real = 0.0,
) -> Layout:
    """A video and the sound of its length.

    Args:
        frames: 8k+1.
        height: pixels, a multiple of 32.
        width: pixels, a multiple of 32.
        fps: frames per second.
        pre_roll: seconds of sound that are made before the video begins, and cut off
            after decoding; voices glitch most in their first half second.

    Raises:
        ValueError: naming the nearest valid value.
    """
    video = geometry.video_grid(frames, height, width, fps)
    audio = geometry.audio_grid(video.frames, video.fps, pre_roll=pre_roll)
    return Layout(video, audio)


def larger(layout: Layout) -> Layout:
    """The layout of a refining stage: twice the sides, the same time."""
    video = layout.video
    if video is None:
        raise ValueError("larger: the layout has no video, and only video is refined")
    sides = LARGER * video.height, LARGER * video.width
    return Layout(geometry.video_grid(video.frames, *sides, video.fps), layout.audio)


def target_counts(layout: Layout) -> AV:
    """Number of target tokens of each modality."""
    return each(geometry.tokens, AV(layout.video, layout.audio))


def start(
    request: Request,
    layout: Layout,
    *,
    numerics: Numerics = "exact",
    placing: Placing = USUAL,
) -> AV:
    """The streams of a request, still without noise.

    Args:
        request: see `Request`.
        layout: the clip; a modality may be absent.
        numerics: how positions are made.
        placing: where references lie.

    Raises:
        ValueError: if first frame or reference do not fit the layout.

    Source: scripts/inference_one_stage.py: _create_video_state, _create_audio_state.
    """
    text = request.prompts[0]
    batch = len(text.video if text.audio is None else text.audio)

    def target(grid: Any) -> Stream:
        return streams.target(None, grid, batch=batch, **placing.how(numerics))

    video, audio = each(target, AV(layout.video, layout.audio))
    if request.first_frame is not None:
        video = _with_first_frame(video, request.first_frame, layout)
    if request.first_audio is not None:
        audio = _with_first_audio(audio, request.first_audio, layout)
    where = {"placing": placing, "numerics": numerics}
    if request.video_reference is not None:
        video = _with_video_reference(video, request.video_reference, layout, **where)
    if request.reference is not None:
        audio = _with_references(audio, references(request), layout, **where)
    return AV(video, audio)


def references(request: Request) -> tuple[Any, ...]:
    """The reference's segments, the one nearest to zero first; () without any."""
    found = request.reference
    if found is None:
        return ()
    return found if isinstance(found, tuple) else (found,)


def _with_first_frame(s: Stream | None, frame: Array, layout: Layout) -> Stream:
    if s is None or layout.video is None:
        raise ValueError("start: a first frame was given, but the layout has no video")
    frames, *sides = geometry.latent_shape(layout.video)
    want = (*sides, s.x.shape[-1])
    if frame.shape[2:] != want or not 1 <= frame.shape[1] <= frames:
        raise ValueError(
            f"start: first_frame has shape {[*frame.shape]}, expected [B, 1 to "
            f"{frames}, {', '.join(map(str, want))}]; encode it at the clip's size"
        )
    return streams.fix_first_frame(s, geometry.patchify(frame))


def _with_first_audio(s: Stream | None, sound: Array, layout: Layout) -> Stream:
    if s is None or layout.audio is None:
        raise ValueError("start: first_audio was given, but the layout has no audio")
    if layout.audio.before or sound.shape[1] > layout.audio.frames:
        raise ValueError(
            f"start: first_audio has {sound.shape[1]} latents, the clip "
            f"{layout.audio.frames}, {layout.audio.before} of them before time 0; "
            "expected no more than the clip has, and no pre-roll"
        )
    return streams.fix_first_frame(s, geometry.patchify_audio(sound))


def _with_references(
    s: Stream | None,
    segments: tuple[Any, ...],
    layout: Layout,
    *,
    placing: Placing,
    numerics: Numerics,
) -> Stream:
    if s is None or layout.audio is None:
        raise ValueError("start: a reference was given, but the layout has no audio")
    if len(segments) > 1 and not placing.audio_before:
        raise ValueError(
            f"start: got {len(segments)} references, expected one where references do "
            "not lie before zero, one before the other; join them"
        )
    counts = [segment.shape[1] for segment in segments]
    begin = -layout.audio.before / geometry.AUDIO_LATENTS_PER_S
    ends = geometry.reference_ends(counts, gap_s=placing.gap_s, end_s=begin)
    for segment, end in zip(segments, ends, strict=True):
        s = refs.add_audio(s, segment, placing, end_s=end, numerics=numerics)
    return s


def _with_video_reference(
    s: Stream | None,
    ref: Array,
    layout: Layout,
    *,
    placing: Placing,
    numerics: Numerics,
) -> Stream:
    if s is None or layout.video is None:
        raise ValueError(
            "start: a video reference was given, but the layout has no video"
        )
    return refs.add_video(s, ref, layout.video, placing, numerics=numerics)


def draw_noise(key: Keys, s: AV) -> AV:
    """Standard normal noise [B T C] for every token, fixed ones included.

    Args:
        key: one for all samples, or one for each.
        s: `AV[Stream]`.
    """
    pair = AV(*keys.split(key, 2))
    return each(lambda s, k: keys.normal(k, s.x.shape), s, pair)


def add_noise(s: AV, noise: AV, sigma: float | np.floating | Array) -> AV:
    """The streams at noise level `sigma`; see `streams.noise`."""

    def one(s: Stream, n: Array) -> Stream:
        return streams.noise(s, jnp.asarray(n), jnp.full(len(s.x), sigma, jnp.float32))

    return each(one, s, noise)


def refine(
    request: Request, latents: AV, layout: Layout, *, numerics: Numerics = "exact"
) -> AV:
    """The streams of a refining stage, still without noise.

    Args:
        request: see `Request`; `first_frame` is that of this stage.
        latents: enlarged video [B F H W C] and audio [B T M C].
        layout: the enlarged clip.
        numerics: how positions are made.

    Raises:
        ValueError: if latents or first frame do not fit the layout.

    Source: scripts/inference_two_stage.py (stage 2).
    """
    if layout.video is None:
        raise ValueError("refine: the layout has no video, and only video is refined")
    video = geometry.patchify(latents.video)
    video = streams.target(video, layout.video, numerics=numerics)
    if request.first_frame is not None:
        video = _with_first_frame(video, request.first_frame, layout)
    if latents.audio is None or layout.audio is None:
        return AV(video, None)
    audio = geometry.patchify_audio(latents.audio)
    audio = streams.target(audio, layout.audio, numerics=numerics)
    return AV(video, streams.freeze(audio))


def finish(s: AV, layout: Layout) -> AV:
    """Latents [B F H W C] and [B T M C] of the targets, references dropped."""
    grids = AV(layout.video, layout.audio)
    target = each(lambda s, n: streams.split(s, n)[0].x, s, target_counts(layout))

    def shaped(x: Array, grid: Any) -> Array:
        if isinstance(grid, VideoGrid):
            return geometry.unpatchify(x, grid)
        return geometry.unpatchify_audio(x)

    return each(shaped, target, grids)

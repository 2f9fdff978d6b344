"""Training samples: what is drawn at random, and the streams it makes of a clip.

A training mode is a `Strategy` (plain settings) read by two functions:

    draws  = draw(key, batch, spec)          first-frame coins, noise levels, noise
    inputs = prepare(draws, batch, spec)     noisy streams, velocities, loss masks

`prepare` builds tokens, positions and references with the functions that sampling uses,
and what attention hides is a `Branch`, as at sampling. Draws are values: recorded ones
take the same path. With clean tokens c and noise n the input is (1 - sigma) c + sigma n
and the velocity to predict is n - c.

    text_to_video       video, first frame given at times; audio if the batch has it
    audio_ref_only_ic   the same, and a reference before the audio's first second
    video_to_video      video with a video reference; no audio
    audio_video_ic      video with a video reference, audio with an audio reference

Which of these a mode has is a row of `MODES`.

Source: ltx_trainer/training_strategies/: text_to_video.py, audio_ref_only_ic.py,
    video_to_video.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from idlora_jax import geometry, losses, references, streams
from idlora_jax.experiment import Strategy, StrategyName
from idlora_jax.references import Placing
from idlora_jax.types import (
    AV,
    AudioGrid,
    Branch,
    Layout,
    Numerics,
    Prompt,
    Rate,
    Stream,
    VideoGrid,
    each,
)

Real = float | int


@dataclass(frozen=True)
class Mode:
    """What a training mode reads of a clip beside its video and prompt.

    Attributes:
        audio: its own sound.
        reference: another recording of its speaker; not without `audio`.
        video_reference: another video.
    """

    audio: bool = True
    reference: bool = False
    video_reference: bool = False

    @property
    def in_context(self) -> bool:
        """Whether there is any reference."""
        return self.reference or self.video_reference


MODES: Mapping[StrategyName, Mode] = {
    "text_to_video": Mode(),
    "audio_ref_only_ic": Mode(reference=True),
    "video_to_video": Mode(audio=False, video_reference=True),
    "audio_video_ic": Mode(reference=True, video_reference=True),
}


def mode(spec: Strategy) -> Mode:
    """The row of a strategy; `text_to_video` may leave the sound away."""
    row = MODES[spec.name]
    silent = spec.name == "text_to_video" and not spec.with_audio
    return replace(row, audio=False) if silent else row


class Batch(NamedTuple):
    """Clips of one size as latents, and their prompts after the connectors.

    Attributes:
        video: [B F H W C].
        audio: [B T M C] or None.
        reference: [B Tr M C] or None, another recording of the same speaker.
        prompt: [B S D] and [B S Da].
        audio_length: [B] valid frames where `audio` is padded on the right, or None.
        reference_length: [B], the same for `reference`.
        video_reference: [B f h w C] or None, at the clip's frame rate; its sides are
            the clip's, or those divided by one whole number.
        rate: of the clips, where it is known.
    """

    video: Float[Any, "B F H W C"]
    audio: Float[Any, "B T M C"] | None
    reference: Float[Any, "B Tr M C"] | None
    prompt: Prompt
    audio_length: Int[Any, " B"] | None = None
    reference_length: Int[Any, " B"] | None = None
    video_reference: Float[Any, "B f h w C"] | None = None
    rate: Rate | None = None


class Draws(NamedTuple):
    """What is random in a training sample.

    Attributes:
        first_frame: [B] whether the first latent frame is given.
        sigma: AV of [B], the noise levels.
        noise: AV of [B T C], for the target tokens.
        drop_ref: [B] whether the sample is trained without its references, or None
            where all have them.
    """

    first_frame: Bool[Array, " B"]
    sigma: AV
    noise: AV
    drop_ref: Bool[Array, " B"] | None = None


class TrainInputs(NamedTuple):
    """What the transformer sees and what it should answer.

    Attributes:
        streams: AV of `Stream`: targets first, references last.
        sigma: AV of [B].
        velocity: AV of [B T C] over the target tokens.
        mask: AV of [B T], target tokens that count in the loss.
        prompt: as in the batch.
    """

    streams: AV
    sigma: AV
    velocity: AV
    mask: AV
    prompt: Prompt


def layout(batch: Batch, fps: Real = 25.0) -> Layout:
    """The grids of a batch's target tokens."""
    _, frames, height, width, _ = batch.video.shape
    pixels = geometry.PIXELS_PER_LATENT
    video = VideoGrid(
        (frames - 1) * geometry.FRAMES_PER_LATENT + 1,
        height * pixels,
        width * pixels,
        float(fps),
    )
    audio = None if batch.audio is None else AudioGrid(batch.audio.shape[1])
    return Layout(video, audio)


def branch(spec: Strategy) -> Branch:
    """What the forward pass does, as the sampler says it."""
    if not mode(spec).reference:
        return Branch()
    return Branch(video_sees_ref=spec.video_sees_ref, ref_sees_text=spec.ref_sees_text)


def placing(spec: Strategy, rounding: geometry.Rounding | None = None) -> Placing:
    """Where references lie, as the sampler says it.

    Args:
        spec: the training mode.
        rounding: of all positions, see `geometry.positions`.
    """
    before = spec.negative_positions, spec.negative_video
    return Placing(spec.gap_s, *before, rounding)


def used(batch: Batch, spec: Strategy) -> Batch:
    """The batch without what the mode does not read.

    Raises:
        ValueError: if it lacks something that the mode needs.
    """
    row = mode(spec)
    needs = {
        "audio": (row.reference, "audio_latents"),
        "reference": (row.reference, "reference_audio_latents"),
        "video_reference": (row.video_reference, "reference_latents"),
    }
    for name, (needed, folder) in needs.items():
        if needed and getattr(batch, name) is None:
            raise ValueError(
                f"{spec.name} needs {name.replace('_', ' ')}, the batch has none; add "
                f"the folder {folder}/, or choose another strategy.name"
            )
    return batch._replace(
        audio=batch.audio if row.audio else None,
        audio_length=batch.audio_length if row.audio else None,
        reference=batch.reference if row.reference else None,
        reference_length=batch.reference_length if row.reference else None,
        video_reference=batch.video_reference if row.video_reference else None,
    )


def check_trained(spec: Strategy, modules: Sequence[str]) -> None:
    """Refuse an adapter none of whose modules a mode without sound passes.

    Args:
        spec: the training mode.
        modules: paths of what is trained (`adapters.select`).

    Raises:
        ValueError: naming modules that would be trained.
    """
    of_video = (p for p in modules if "video" in p and "/cross_attn/" not in p)
    if mode(spec).audio or any(of_video):
        return
    parts = (f"blocks/video/{part}/*" for part in ("self_attn", "text_attn", "ff"))
    raise ValueError(
        f"lora.targets: {spec.name} reads no sound, and all of the targets are parts "
        f"that only sound passes; expected some of {', '.join(parts)}"
    )


def _level(
    key: PRNGKeyArray, batch: int, tokens: int, spec: Strategy
) -> Float[Array, " B"]:
    draws = losses.sigma_draws(key, batch)
    if spec.sigma is None:
        raise ValueError(
            "strategy.sigma: got None, expected the generation's sampler of noise "
            "levels; see experiment.of_generation, or name it"
        )
    if spec.sigma == "uniform":
        return losses.uniform(draws)
    return losses.shifted_logit_normal(draws, tokens, spec.sigma)


def draw(key: PRNGKeyArray, batch: Batch, spec: Strategy) -> Draws:
    """Draw what one training step needs.

    Args:
        key: random key; `fold_in(key, step)` in training.
        batch: only its shapes are read. Noise levels are shifted by the number of
            the clip's video tokens, for audio too.
        spec: the training mode.

    Raises:
        ValueError: if the batch lacks what the mode needs.
    """
    batch = used(batch, spec)
    coin, *levels, video, audio = jax.random.split(key, 5)
    size = batch.video.shape[0]
    grids = layout(batch)
    assert grids.video is not None
    count = geometry.tokens(grids.video)
    toss = jax.random.uniform(coin, (size if spec.coin == "sample" else 1,))
    sigma = _level(levels[0], size, count, spec)
    other = sigma if spec.shared_sigma else _level(levels[1], size, count, spec)
    noise = jax.random.normal(video, (size, count, batch.video.shape[-1]))
    sound = None
    if batch.audio is not None:
        _, frames, bins, channels = batch.audio.shape
        sound = jax.random.normal(audio, (size, frames, bins * channels))
    drop, share = None, spec.reference_p_drop
    if mode(spec).in_context and share > 0:
        drop = jax.random.uniform(jax.random.fold_in(coin, 1), (size,)) < share
    return Draws(
        first_frame=jnp.broadcast_to(toss < spec.first_frame_p, (size,)),
        sigma=AV(sigma, None if sound is None else other),
        noise=AV(noise, sound),
        drop_ref=drop,
    )


def _video(draws: Draws, batch: Batch, grid: VideoGrid, how: dict) -> Stream:
    clean = geometry.patchify(batch.video.astype(jnp.float32))
    s = streams.target(clean, grid, **how)
    frames, height, width = geometry.latent_shape(grid)
    if frames == 1:  # a still has nothing else to learn from
        return s
    frame = clean[:, : height * width]
    return streams.fix_first_frame(s, frame, where=draws.first_frame)


def _audio(batch: Batch, grid: AudioGrid | None, how: dict) -> Stream | None:
    if grid is None or batch.audio is None:
        return None
    clean = geometry.patchify_audio(batch.audio.astype(jnp.float32))
    s = streams.target(clean, grid, **how)
    return s._replace(target_length=batch.audio_length)


def _with_references(
    noisy: AV, batch: Batch, grid: VideoGrid, where: Placing, numerics: Numerics
) -> AV:
    """The streams with the batch's references behind the targets."""
    video, audio = noisy
    if batch.video_reference is not None:
        ref = batch.video_reference.astype(jnp.float32)
        video = references.add_video(video, ref, grid, where, numerics=numerics)
    if batch.reference is not None:
        ref = batch.reference.astype(jnp.float32)
        length = {"length": batch.reference_length, "numerics": numerics}
        audio = references.add_audio(audio, ref, where, **length)
    return AV(video, audio)


def _without(s: Stream, target: Stream, where: Bool[Array, " B"]) -> Stream:
    """The stream with its reference hidden, if it has one."""
    tokens = target.x.shape[1]
    if s.x.shape[1] == tokens:
        return s
    return streams.hide_reference(s, tokens, where)


def _counted(s: Stream) -> Bool[Array, "B T"]:
    """Denoised tokens that are no padding."""
    if s.target_length is None:
        return s.denoise
    at = jnp.arange(s.denoise.shape[1])[None]
    return s.denoise & (at < s.target_length[:, None])


def prepare(
    draws: Draws,
    batch: Batch,
    spec: Strategy,
    *,
    fps: Real = 25.0,
    numerics: Numerics = "exact",
    rounding: geometry.Rounding | None = None,
) -> TrainInputs:
    """Build the noisy streams, their velocities and the loss masks.

    Args:
        draws: from `draw`, or recorded.
        batch: the clips.
        spec: the training mode.
        fps: frames per second of the clips.
        numerics: see `geometry.positions`.
        rounding: of all positions, see there.

    Returns:
        Float32 arrays.

    Raises:
        ValueError: if the batch lacks what the mode needs.
    """
    batch = jax.tree.map(jnp.asarray, used(batch, spec))  # it may lie on the host
    where = placing(spec, rounding)
    grids, how = layout(batch, fps), where.how(numerics)
    assert grids.video is not None
    clean = AV(_video(draws, batch, grids.video, how), _audio(batch, grids.audio, how))
    noisy = each(streams.noise, clean, draws.noise, draws.sigma)
    velocity = each(lambda s, noise: noise - s.clean, clean, draws.noise)
    mask = each(_counted, clean)
    seen = _with_references(noisy, batch, grids.video, where, numerics)
    drop = draws.drop_ref
    if drop is not None:
        seen = each(lambda s, t: _without(s, t, drop), seen, clean)
    sigma = each(lambda _, level: level, clean, draws.sigma)
    return TrainInputs(seen, sigma, velocity, mask, batch.prompt)


def targets(inputs: TrainInputs) -> AV:
    """Static numbers of target tokens."""
    return each(lambda v: v.shape[1], inputs.velocity)

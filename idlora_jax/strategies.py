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

Source: ltx_trainer/training_strategies/: text_to_video.py, audio_ref_only_ic.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from idlora_jax import geometry, losses, streams
from idlora_jax.experiment import Strategy
from idlora_jax.types import (
    AV,
    AudioGrid,
    Branch,
    Layout,
    Numerics,
    Prompt,
    Stream,
    VideoGrid,
    each,
)

Real = float | int


class Batch(NamedTuple):
    """Clips of one size as latents, and their prompts after the connectors.

    Attributes:
        video: [B F H W C].
        audio: [B T M C] or None.
        reference: [B Tr M C] or None, another recording of the same speaker.
        prompt: [B S D] and [B S Da].
        audio_length: [B] valid frames where `audio` is padded on the right, or None.
        reference_length: [B], the same for `reference`.
    """

    video: Float[Array, "B F H W C"]
    audio: Float[Array, "B T M C"] | None
    reference: Float[Array, "B Tr M C"] | None
    prompt: Prompt
    audio_length: Int[Array, " B"] | None = None
    reference_length: Int[Array, " B"] | None = None


class Draws(NamedTuple):
    """What is random in a training sample.

    Attributes:
        first_frame: [B] whether the first latent frame is given.
        sigma: AV of [B], the noise levels.
        noise: AV of [B T C], for the target tokens.
    """

    first_frame: Bool[Array, " B"]
    sigma: AV
    noise: AV


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
    if spec.name == "text_to_video":
        return Branch()
    return Branch(video_sees_ref=spec.video_sees_ref, ref_sees_text=spec.ref_sees_text)


def _level(
    key: PRNGKeyArray, batch: int, tokens: int, spec: Strategy
) -> Float[Array, " B"]:
    draws = losses.sigma_draws(key, batch)
    if spec.sigma == "uniform":
        return losses.uniform(draws)
    return losses.shifted_logit_normal(draws, tokens, spec.sigma)


def draw(key: PRNGKeyArray, batch: Batch, spec: Strategy) -> Draws:
    """Draw what one training step needs.

    Args:
        key: random key; `fold_in(key, step)` in training.
        batch: only its shapes are read. Noise levels are shifted by the number of
            video tokens, for audio too.
        spec: the training mode.
    """
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
    return Draws(
        first_frame=jnp.broadcast_to(toss < spec.first_frame_p, (size,)),
        sigma=AV(sigma, None if sound is None else other),
        noise=AV(noise, sound),
    )


def _reference_positions(
    frames: int, length: Int[Array, " B"] | None, spec: Strategy, numerics: Numerics
) -> Float[Array, "_ 1 Tr 2"]:
    """Positions of a reference, [1 1 Tr 2], or [B 1 Tr 2] for padded ones."""
    if not spec.negative_positions:
        return jnp.asarray(geometry.positions(AudioGrid(frames), numerics=numerics))

    def of(n: int) -> np.ndarray:
        return geometry.reference_positions(n, gap_s=spec.gap_s, numerics=numerics)

    if length is None:
        return jnp.asarray(of(frames))
    # The end of each reference, not of its padding, lies `gap_s` before zero.
    table = np.zeros((frames + 1, 1, frames, 2), np.float32)
    for n in range(1, frames + 1):
        table[n, :, :n] = of(n)[0]
    return jnp.asarray(table)[length]


def _add_reference(
    audio: Stream, batch: Batch, spec: Strategy, numerics: Numerics
) -> Stream:
    if batch.reference is None:
        raise ValueError(
            "audio_ref_only_ic needs reference audio, the batch has none; add "
            "reference_audio_latents/ or set strategy.name to text_to_video"
        )
    if batch.audio_length is not None:
        raise ValueError(
            "audio_ref_only_ic: the clips' own audio differs in length within a "
            "batch, but the reference follows it directly; cut the clips to one length"
        )
    ref = geometry.patchify_audio(batch.reference.astype(jnp.float32))
    length = batch.reference_length
    pos = _reference_positions(ref.shape[1], length, spec, numerics)
    return streams.add_reference(audio, ref, pos, length)


def _video(draws: Draws, batch: Batch, grid: VideoGrid, numerics: Numerics) -> Stream:
    clean = geometry.patchify(batch.video.astype(jnp.float32))
    s = streams.target(clean, grid, numerics=numerics)
    frames, height, width = geometry.latent_shape(grid)
    if frames == 1:  # a still has nothing else to learn from
        return s
    frame = clean[:, : height * width]
    return streams.fix_first_frame(s, frame, where=draws.first_frame)


def _audio(batch: Batch, grid: AudioGrid | None, numerics: Numerics) -> Stream | None:
    if grid is None or batch.audio is None:
        return None
    clean = geometry.patchify_audio(batch.audio.astype(jnp.float32))
    s = streams.target(clean, grid, numerics=numerics)
    return s._replace(length=batch.audio_length)


def _counted(s: Stream) -> Bool[Array, "B T"]:
    """Denoised tokens that are no padding."""
    if s.length is None:
        return s.denoise
    return s.denoise & (jnp.arange(s.denoise.shape[1])[None] < s.length[:, None])


def prepare(
    draws: Draws,
    batch: Batch,
    spec: Strategy,
    *,
    fps: Real = 25.0,
    numerics: Numerics = "exact",
) -> TrainInputs:
    """Build the noisy streams, their velocities and the loss masks.

    Args:
        draws: from `draw`, or recorded.
        batch: the clips.
        spec: the training mode.
        fps: frames per second of the clips.
        numerics: see `geometry.positions`.

    Returns:
        Float32 arrays.

    Raises:
        ValueError: if the batch lacks what the mode needs.
    """
    grids = layout(batch, fps)
    assert grids.video is not None
    clean = AV(
        _video(draws, batch, grids.video, numerics),
        _audio(batch, grids.audio, numerics),
    )
    noisy = each(streams.noise, clean, draws.noise, draws.sigma)
    velocity = each(lambda s, noise: noise - s.clean, clean, draws.noise)
    mask = each(_counted, clean)
    if spec.name == "audio_ref_only_ic":
        if noisy.audio is None:
            raise ValueError("audio_ref_only_ic needs audio, the batch has none")
        noisy = noisy._replace(audio=_add_reference(noisy.audio, batch, spec, numerics))
    return TrainInputs(noisy, draws.sigma, velocity, mask, batch.prompt)


def targets(inputs: TrainInputs) -> AV:
    """Static numbers of target tokens."""
    return each(lambda v: v.shape[1], inputs.velocity)

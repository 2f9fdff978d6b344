"""From a request to media: build streams, sample each stage of a plan, decode.

    request --start--> streams --denoise.sample--> streams --finish--> latents
    latents --video VAE--> video u8 [B F H W 3]
    latents --audio VAE--> log-mel --vocoder--> wave f32 [B 2 N]

`run` is only these functions in turn; each can be used alone. A stage is compiled once
per layout and static part (terms, solver, mode): another prompt, seed, scale, number of
steps' values or adapter strength reuses it. Randomness comes from one key, split for
each draw, or enters as values in the same place (`Request.noise`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from idlora_jax import adapters as lora
from idlora_jax import codecs, denoise, geometry, plans, streams
from idlora_jax.config import TransformerConfig
from idlora_jax.model import transformer
from idlora_jax.model.attention import Backend
from idlora_jax.plans import Plan, Stage
from idlora_jax.types import (
    AV,
    Adapter,
    Layout,
    Numerics,
    Prompt,
    Stream,
    Tree,
    VideoGrid,
    each,
)
from idlora_jax.weights.networks import Networks

Progress = Callable[[int, int], Any]
"""(steps done, steps in all)."""


class Request(NamedTuple):
    """What B samples are made from.

    Attributes:
        prompts: `Prompt`s after the connectors: positive, then negative (which only
            text guidance reads).
        reference: audio latents [B Tr M C] of the voice to take; None: no reference.
        first_frame: video latent [B 1 H W C] to start from; None: free.
        noise: `AV` of standard normal [B T C] in the streams' order (targets, then
            reference rows, which are not used); None: drawn from the key.
    """

    prompts: Any
    reference: Any = None
    first_frame: Any = None
    noise: Any = None


class Media(NamedTuple):
    """What B samples are.

    Attributes:
        video: uint8 [B F H W 3], or None.
        wave: float32 [B 2 N] in [-1, 1] at the vocoder's rate, or None.
        latents: `AV` of [B F H W C] and [B T M C].
    """

    video: Any
    wave: Any
    latents: Any


def clip(
    frames: geometry.Real,
    height: geometry.Real,
    width: geometry.Real,
    fps: geometry.Real = 25.0,
) -> Layout:
    """A video and the sound of its length.

    Args:
        frames: 8k+1.
        height: pixels, a multiple of 32.
        width: pixels, a multiple of 32.
        fps: frames per second.

    Raises:
        ValueError: naming the nearest valid value.
    """
    video = geometry.video_grid(frames, height, width, fps)
    return Layout(video, geometry.audio_grid(video.frames, video.fps))


def target_counts(layout: Layout) -> AV:
    """Number of target tokens of each modality."""
    return each(geometry.tokens, AV(layout.video, layout.audio))


def start(request: Request, layout: Layout, *, numerics: Numerics = "exact") -> AV:
    """The streams of a request, still without noise.

    Args:
        request: see `Request`.
        layout: the clip; a modality may be absent.
        numerics: how positions are made.

    Raises:
        ValueError: if first frame or reference do not fit the layout.

    Source: scripts/inference_one_stage.py: _create_video_state, _create_audio_state.
    """
    text = request.prompts[0]
    batch = len(text.video if text.audio is None else text.audio)

    def target(grid: Any) -> Stream:
        return streams.target(None, grid, batch=batch, numerics=numerics)

    video, audio = each(target, AV(layout.video, layout.audio))
    if request.first_frame is not None:
        video = _with_first_frame(video, request.first_frame, layout)
    if request.reference is not None:
        audio = _with_reference(audio, request.reference, numerics)
    return AV(video, audio)


def _with_first_frame(s: Stream | None, frame: Array, layout: Layout) -> Stream:
    if s is None or layout.video is None:
        raise ValueError("start: a first frame was given, but the layout has no video")
    want = (1, *geometry.latent_shape(layout.video)[1:], s.x.shape[-1])
    if frame.shape[1:] != want:
        raise ValueError(
            f"start: first_frame has shape {[*frame.shape]}, expected [B, "
            f"{', '.join(map(str, want))}]; encode the image at the clip's size"
        )
    return streams.fix_first_frame(s, geometry.patchify(frame))


def _with_reference(s: Stream | None, ref: Array, numerics: Numerics) -> Stream:
    if s is None:
        raise ValueError("start: a reference was given, but the layout has no audio")
    pos = geometry.reference_positions(ref.shape[1], numerics=numerics)
    return streams.add_reference(s, geometry.patchify_audio(ref), jnp.asarray(pos))


def draw_noise(key: PRNGKeyArray, s: AV) -> AV:
    """Standard normal noise [B T C] for every token, fixed ones included."""
    keys = AV(*jax.random.split(key))
    return each(lambda s, k: jax.random.normal(k, s.x.shape, jnp.float32), s, keys)


def add_noise(s: AV, noise: AV, sigma: float | np.floating | Array) -> AV:
    """The streams at noise level `sigma`; see `streams.noise`."""

    def one(s: Stream, n: Array) -> Stream:
        return streams.noise(s, jnp.asarray(n), jnp.full(len(s.x), sigma, jnp.float32))

    return each(one, s, noise)


@functools.cache
def network(
    cfg: TransformerConfig, dtype: str = "float32", backend: Backend = "auto"
) -> Callable[..., tuple[AV, ...]]:
    """The transformer as `denoise` takes it, computing in `dtype`.

    The same arguments give the same object, on which compiled stages are keyed.
    """

    def apply(
        variables: Any,
        prepared: Any,
        s: AV,
        sigma: AV,
        branches: Any,
        *,
        targets: AV,
        mode: denoise.Mode,
    ) -> tuple[AV, ...]:
        s = each(lambda s: s._replace(x=s.x.astype(dtype)), s)
        options = {"targets": targets, "mode": mode, "backend": backend}
        args = (cfg, variables, prepared, s, sigma, branches)
        return transformer.apply(*args, **options)

    return apply


def denoiser(
    stage: Stage,
    cfg: TransformerConfig,
    variables: Mapping[str, Tree],
    s: AV,
    prompts: tuple[Prompt, ...],
    layout: Layout,
    *,
    numerics: Numerics = "exact",
    dtype: str = "float32",
    backend: Backend = "auto",
) -> denoise.Denoise:
    """The guided prediction of a stage, for streams at these positions.

    Args:
        stage: its terms, positive branch, mode and rescale are read.
        cfg: the transformer.
        variables: {"params": base} and optionally {"lora": adapter}.
        s: `AV[Stream]`.
        prompts: see `Request`.
        layout: the clip.
        numerics: how rope tables are made.
        dtype: what the transformer computes in; the sampler's state is float32.
        backend: see `model.attention.attend`.

    Raises:
        ValueError: if a term needs a prompt that is not given.
    """
    need = 1 + max((term.prompt for term in stage.terms), default=0)
    if len(prompts) < need:
        raise ValueError(
            f"denoiser: stage {stage.name!r} needs {need} prompts (positive, "
            f"negative), got {len(prompts)}; add one or set text guidance to 1"
        )

    def cast(text: Any) -> Any:
        return None if text is None else jnp.asarray(text, dtype)

    texts = tuple(Prompt(cast(p.video), cast(p.audio), p.mask) for p in prompts)
    return denoise.make_denoiser(
        network(cfg, dtype, backend),
        dict(variables),
        transformer.prepare(cfg, variables, s, texts, numerics=numerics),
        stage.terms,
        target_counts(layout),
        depth=cfg.layers,
        positive=stage.positive,
        branches=stage.branches,
        rescale=stage.rescale,
    )


def finish(s: AV, layout: Layout) -> AV:
    """Latents [B F H W C] and [B T M C] of the targets, references dropped."""
    grids = AV(layout.video, layout.audio)
    target = each(lambda s, n: streams.split(s, n)[0].x, s, target_counts(layout))

    def shaped(x: Array, grid: Any) -> Array:
        if isinstance(grid, VideoGrid):
            return geometry.unpatchify(x, grid)
        return geometry.unpatchify_audio(x)

    return each(shaped, target, grids)


def sample(
    stage: Stage,
    cfg: TransformerConfig,
    variables: Mapping[str, Tree],
    request: Request,
    key: PRNGKeyArray,
    *,
    layout: Layout,
    numerics: Numerics = "exact",
    dtype: str = "float32",
    backend: Backend = "auto",
    progress: Progress | None = None,
) -> AV:
    """One stage: latents from a request.

    Args:
        stage: from a plan; without a reference, terms that drop it are left out.
        cfg: the transformer.
        variables: {"params": base} and optionally {"lora": adapter}.
        request: see `Request`.
        key: for the noise, where it is not given, and for the solver.
        layout: the clip.
        numerics: how positions, noise levels and rope tables are made.
        dtype: what the transformer computes in.
        backend: see `model.attention.attend`.
        progress: called after every step; with it, steps are dispatched one by one.
    """
    if request.reference is None:
        stage = plans.without_reference(stage)
    sigmas = stage.sigmas.table(layout, numerics)
    clean = start(request, layout, numerics=numerics)
    options: dict[str, Any] = {
        "numerics": numerics,
        "dtype": dtype,
        "backend": backend,
    }
    noise_key, solver_key = jax.random.split(key)
    noise = draw_noise(noise_key, clean) if request.noise is None else request.noise
    args = (
        denoiser(stage, cfg, variables, clean, request.prompts, layout, **options),
        plans.SOLVERS[stage.solver](),
        sigmas,
        add_noise(clean, noise, sigmas[0]),
        solver_key,
    )
    weights = stage.weights(len(sigmas) - 1)
    if progress is None:
        return finish(denoise.sample(*args, weights=weights), layout)
    done = clean
    for step, done in enumerate(denoise.iterate(*args, weights=weights), start=1):
        jax.block_until_ready(done)
        progress(step, len(sigmas) - 1)
    return finish(done, layout)


def with_adapters(
    base: Tree, adapters: Mapping[str, Adapter], stage: Stage
) -> dict[str, Tree]:
    """The transformer's variables in a stage: base and adapters at their strengths.

    Raises:
        ValueError: if the stage names an adapter that is not there, or one does not fit
            the base.
    """
    missing = [name for name, _ in stage.adapters if name not in adapters]
    if missing:
        raise ValueError(
            f"stage {stage.name!r} uses the adapters {missing}, got {sorted(adapters)}"
        )
    used = [lora.scale(adapters[name], strength) for name, strength in stage.adapters]
    if not used:
        return {"params": base}
    stacked = lora.stack(*used)
    lora.check(stacked, base)
    return {"params": base, "lora": stacked}


def run(
    plan: Plan,
    nets: Networks,
    base: Mapping[str, Tree],
    adapters: Mapping[str, Adapter],
    request: Request,
    key: PRNGKeyArray,
    *,
    layout: Layout,
    **options: Any,
) -> Media:
    """Sample a plan and decode the result.

    Args:
        plan: from `plans`; plans of one stage are known.
        nets: what the networks are.
        base: parameters by network: "transformer", "video_vae", "audio_vae", "vocoder".
        adapters: by the names the plan's stages use, b unscaled by the strength.
        request: see `Request`.
        key: for everything drawn.
        layout: the clip, from `clip`.
        options: numerics, dtype, backend and progress of `sample`.

    Raises:
        ValueError: for a plan of several stages, or a request that does not fit.

    Example:
        >>> plan = plans.one_stage(adapters={"anna": 1.0})
        >>> layout = clip(121, 512, 512)
        >>> adapters = {"anna": adapter}
        >>> media = run(plan, nets, base, adapters, request, key, layout=layout)
    """
    if len(plan.stages) != 1:
        raise ValueError(f"run: expected a plan of one stage, got {len(plan.stages)}")
    (stage,) = plan.stages
    variables = with_adapters(base["transformer"], adapters, stage)
    latents = sample(
        stage, nets.transformer, variables, request, key, layout=layout, **options
    )
    return Media(*codecs.decode(nets, base, latents), latents)

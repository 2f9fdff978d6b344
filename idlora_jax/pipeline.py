"""From a request to media: build streams, sample each stage of a plan, decode.

    request --start--> streams --denoise.sample--> streams --finish--> latents
    latents --enlarge--> twice the sides --refine--> streams, and so on
    latents --video VAE--> video u8 [B F H W 3]
    latents --audio VAE--> log-mel --vocoder--> wave f32 [B 2 N]

`run` is only these functions in turn; each can be used alone. A stage is compiled once
per layout and static part (terms, solver, mode): another prompt, seed, scale, number of
steps' values or adapter strength reuses it. Randomness comes from one key, or one per
sample, split for each draw, or enters as values in the same place (`Request.noise`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from idlora_jax import adapters as lora
from idlora_jax import codecs, denoise, keys, parallel, plans, programs
from idlora_jax.config import TransformerConfig
from idlora_jax.config_upsampler import UpsamplerConfig
from idlora_jax.keys import Keys
from idlora_jax.model import transformer, upsampler
from idlora_jax.model.attention import Backend
from idlora_jax.model.tiling import Tiles
from idlora_jax.plans import Plan, Stage
from idlora_jax.savings import Saving, TextKV
from idlora_jax.starts import (
    LARGER,
    Request,
    add_noise,
    clip,
    draw_noise,
    finish,
    larger,
    of_stage,
    refine,
    start,
    target_counts,
)
from idlora_jax.types import AV, Adapter, Layout, Numerics, Prompt, Tree, each
from idlora_jax.weights.networks import Networks

__all__ = [
    "Media",
    "Request",
    "Seen",
    "Watch",
    "add_noise",
    "clip",
    "denoiser",
    "draw_noise",
    "enlarge",
    "finish",
    "larger",
    "network",
    "refine",
    "run",
    "sample",
    "stages",
    "start",
    "with_adapters",
]


class Seen(NamedTuple):
    """What a watcher sees after each step.

    Attributes:
        stage: the stage's name.
        step: how many of its steps are done.
        steps: how many it has.
        sigma: the noise level reached.
        latents: `AV` of [B F H W C] and [B T M C] at this level.
        x0: `AV` of the guided clean prediction that the step took, likewise.
    """

    stage: str
    step: int
    steps: int
    sigma: float
    latents: AV
    x0: AV


Watch = Callable[[Seen], Any]
"""Called after every step; what it raises ends the run."""


class Media(NamedTuple):
    """What B samples are.

    Attributes:
        video: uint8 [B F H W 3], or None.
        wave: float32 [B 2 N] in [-1, 1] at the vocoder's rate, or None.
        latents: `AV` of [B F H W C] and [B T M C], a pre-roll included.
    """

    video: Any
    wave: Any
    latents: Any


@functools.cache
def network(
    cfg: TransformerConfig,
    dtype: str = "float32",
    backend: Backend = "auto",
    mesh: Mesh | None = None,
    numerics: Numerics = "exact",
    without: tuple[Saving, ...] = (),
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
        args = (cfg, variables, prepared, s, sigma, branches)
        options = {"targets": targets, "mode": mode, "backend": backend, "mesh": mesh}
        return transformer.apply(*args, **options, numerics=numerics, without=without)

    return apply


_prepare = programs.jit(
    transformer.prepare,
    "tables and prompts",
    static_argnums=0,
    static_argnames=("numerics", "text_kv"),
)


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
    mesh: Mesh | None = None,
    text_kv: TextKV = "cached",
    without: tuple[Saving, ...] = (),
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
        mesh: see `model.transformer.apply`.
        text_kv: see `savings`; "shared" where the noise level modulates text (2.3), and
            in stages without guidance, whose few passes are not worth the memory.
        without: savings that are switched off.

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

    read = prompts[:need]
    texts = tuple(Prompt(cast(p.video), cast(p.audio), p.mask) for p in read)
    fixed = bool(stage.terms) and not cfg.text_adaln
    cached = text_kv == "cached" and fixed and "text_kv" not in without
    options: dict[str, Any] = {"numerics": numerics, "text_kv": cached}
    return denoise.make_denoiser(
        network(cfg, dtype, backend, mesh, numerics, without),
        dict(variables),
        _prepare(cfg, dict(variables), s, texts, **options),
        stage.terms,
        target_counts(layout),
        depth=cfg.layers,
        positive=stage.positive,
        branches=stage.branches,
        rescale=stage.rescale,
    )


def sample(
    stage: Stage,
    cfg: TransformerConfig,
    variables: Mapping[str, Tree],
    request: Request,
    key: Keys,
    *,
    layout: Layout,
    before: AV | None = None,
    draws: AV | None = None,
    numerics: Numerics = "exact",
    dtype: str = "float32",
    backend: Backend = "auto",
    mesh: Mesh | None = None,
    text_kv: TextKV = "cached",
    without: tuple[Saving, ...] = (),
    watch: Watch | None = None,
    remat: bool = False,
) -> AV:
    """One stage: latents from a request.

    Args:
        stage: from a plan; without a reference, terms that drop it are left out.
        cfg: the transformer.
        variables: {"params": base} and optionally {"lora": adapter}.
        request: see `Request`; what this stage takes of it (`starts.of_stage`).
        key: for the noise, where it is not given, and for the solver; or a key per
            sample [B], so that a sample comes out the same in any company.
        layout: the clip, at this stage's size.
        before: what a refining stage starts from, at this size (`enlarge`).
        draws: noise for solvers that draw, see `denoise.sample`; None: from the key.
        numerics: how positions, noise levels and rope tables are made.
        dtype: what the transformer computes in.
        backend: see `model.attention.attend`.
        mesh: devices that the samples are divided over, and branches in mode "batch";
            `variables` are placed on it already (`networks.load`, `parallel.place`).
        text_kv: see `denoiser`.
        without: see `denoiser`.
        watch: called after every step; with it, steps are dispatched one by one.
        remat: for gradients; see `denoise.sample`.

    Raises:
        ValueError: if the request does not fit the layout or the stage.
    """
    if request.reference is None and request.video_reference is None:
        stage = plans.without_reference(stage)
    sigmas = stage.sigmas.table(layout, numerics)
    if stage.refines and before is None:
        raise ValueError(
            f"sample: stage {stage.name!r} refines and got no latents, expected the "
            "enlarged ones of the stage before; give before=enlarge(...)"
        )
    if before is not None and not stage.refines:
        raise ValueError(
            f"sample: stage {stage.name!r} starts from noise, expected no latents; "
            "leave out before"
        )
    request = parallel.rows(request, mesh)
    if before is None:
        clean = start(request, layout, numerics=numerics, placing=stage.placing)
    else:
        clean = refine(request, before, layout, numerics=numerics)
    options: dict[str, Any] = {
        "numerics": numerics,
        "dtype": dtype,
        "backend": backend,
        "mesh": mesh,
        "text_kv": text_kv,
        "without": without,
    }
    noise_key, solver_key = keys.split(key, 2)
    noise = draw_noise(noise_key, clean) if request.noise is None else request.noise
    clean, noise = parallel.rows((clean, noise), mesh)
    args = (
        denoiser(stage, cfg, variables, clean, request.prompts, layout, **options),
        plans.solver_of(stage),
        sigmas,
        add_noise(clean, noise, sigmas[0]),
        solver_key if draws is None else draws,
    )
    weights = stage.weights(sigmas)
    if watch is None:
        return finish(denoise.sample(*args, weights=weights, remat=remat), layout)
    done = clean
    steps = enumerate(denoise.iterate(*args, weights=weights), start=1)
    for step, (done, seen) in steps:
        x0 = finish(each(lambda s, x: s._replace(x=x), done, seen.x0), layout)
        now = jax.block_until_ready(finish(done, layout))
        level = float(sigmas[step])
        watch(Seen(stage.name, step, len(sigmas) - 1, level, now, x0))
    return finish(done, layout)


def with_adapters(
    base: Tree,
    adapters: Mapping[str, Adapter],
    stage: Stage,
    mesh: Mesh | None = None,
) -> dict[str, Tree]:
    """The transformer's variables in a stage: base and adapters at their strengths.

    Adapters in host memory (NumPy) are moved to the device now, and are there as long
    as the result: those of another stage are not beside them.

    Args:
        base: of the transformer.
        adapters: by name.
        stage: names them, with their strengths.
        mesh: devices that they are divided over.

    Raises:
        ValueError: if the stage names an adapter that is not there, or one does not fit
            the base.
    """
    missing = [name for name, _ in stage.adapters if name not in adapters]
    if missing:
        raise ValueError(
            f"stage {stage.name!r} uses the adapters {missing}, got {sorted(adapters)}"
        )
    used = [
        lora.scale(parallel.place(adapters[name], mesh), strength)
        for name, strength in stage.adapters
    ]
    if not used:
        return {"params": base}
    # One alone is not copied: the distilled LoRA has 7.6 GB.
    stacked = used[0] if len(used) == 1 else lora.stack(*used)
    lora.check(stacked, base)
    return {"params": base, "lora": jax.tree.map(jnp.asarray, stacked)}


def enlarge(cfg: UpsamplerConfig | None, base: Mapping[str, Tree], latents: AV) -> AV:
    """Latents whose video has twice the sides; the audio stays.

    Args:
        cfg: the latent upsampler.
        base: parameters: "upsampler", and "video_vae" for its statistics.
        latents: `AV` of [B F H W C] and [B T M C].

    Raises:
        ValueError: if there is no upsampler, or it does not double the sides.
    """
    if cfg is None or "upsampler" not in base:
        raise ValueError(
            "enlarge: the plan refines at twice the size, but there is no latent "
            "upsampler; load one (networks.load(upsampler_path=...))"
        )
    shape = latents.video.shape[1:4]
    want = (shape[0], LARGER * shape[1], LARGER * shape[2])
    if cfg.size(*shape) != want:
        raise ValueError(
            f"enlarge: this upsampler turns {[*shape]} into {[*cfg.size(*shape)]}, "
            f"expected {[*want]}; use a spatial x2 upsampler"
        )
    stats = base["video_vae"]["stats"]
    video = latents.video.astype(jnp.float32)
    params = codecs.on_device(base["upsampler"])
    args = (cfg, params, video, *codecs.on_device((stats["mean"], stats["std"])))
    return AV(_upsample(*args), latents.audio)


def _upsampled(
    cfg: UpsamplerConfig, params: Tree, video: Any, mean: Any, std: Any
) -> Any:
    statistics = (x.astype(jnp.float32) for x in (mean, std))
    return upsampler.upsample(cfg, params, video, *statistics)


_upsample = programs.jit(_upsampled, "enlarge", static_argnums=0)


def layouts(plan: Plan, layout: Layout) -> tuple[Layout, ...]:
    """The clip at the size of each stage, given that of the first."""
    out = [layout]
    for stage in plan.stages[1:]:
        out.append(larger(out[-1]) if stage.refines else out[-1])
    return tuple(out)


def stages(
    plan: Plan,
    nets: Networks,
    base: Mapping[str, Tree],
    adapters: Mapping[str, Adapter],
    request: Request,
    key: Keys,
    *,
    layout: Layout,
    **options: Any,
) -> Iterator[AV]:
    """The latents after each stage of a plan; arguments as of `run`."""
    latents: AV | None = None
    # One stage uses the key itself, so that it gives what `sample` alone gives.
    count = len(plan.stages)
    each_key = [key] if count == 1 else keys.split(key, count)
    for number, size in enumerate(layouts(plan, layout)):
        stage, asked = plan.stages[number], of_stage(request, number)
        if stage.refines:
            assert latents is not None, "a plan's first stage does not refine"
            options["before"] = enlarge(nets.upsampler, base, latents)
        args = (base["transformer"], adapters, stage, options.get("mesh"))
        variables = with_adapters(*args)
        args = (stage, nets.transformer, variables, asked, each_key[number])
        latents = sample(*args, layout=size, **options)
        # Adapters of this stage are let go before those of the next one come.
        del args, variables
        yield latents


def run(
    plan: Plan,
    nets: Networks,
    base: Mapping[str, Tree],
    adapters: Mapping[str, Adapter],
    request: Request,
    key: Keys,
    *,
    layout: Layout,
    tiles: Tiles | Literal["usual"] | None = "usual",
    **options: Any,
) -> Media:
    """Sample a plan and decode the result.

    Args:
        plan: from `plans`.
        nets: what the networks are.
        base: parameters by network: "transformer", "video_vae", "audio_vae", "vocoder",
            and "upsampler" where a stage refines.
        adapters: by the names the plan's stages use, b unscaled by the strength.
        request: see `Request`.
        key: for everything drawn, or one per sample [B].
        layout: the clip, from `clip`, at the size of the first stage.
        tiles: how the video is cut for decoding, see `codecs.decode_video`.
        options: numerics, dtype, backend, mesh, text_kv, without and watch of `sample`.

    Raises:
        ValueError: for a request that does not fit, or a missing adapter or upsampler.

    Example:
        >>> plan = plans.one_stage(adapters={"anna": 1.0})
        >>> layout = clip(121, 512, 512)
        >>> adapters = {"anna": adapter}
        >>> media = run(plan, nets, base, adapters, request, key, layout=layout)
    """
    args = (plan, nets, base, adapters, request, key)
    *_, latents = stages(*args, layout=layout, **options)
    before = layout.audio.before if layout.audio is not None else 0
    made = codecs.decode(nets, base, latents, before=before, tiles=tiles)
    return Media(*made, latents)

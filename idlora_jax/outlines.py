"""A run without its numbers: shapes of weights and requests, and what they go through.

    parameters(path) -> {network: shapes}              what `networks.load` would give
    request(nets, layouts) -> Request of shapes        what a run would encode
    outline(plan, nets, params, layout) -> Media       `pipeline.run`, shapes only
    text, inputs, stage, decoding -> jaxprs            the parts of a run, traced

Nothing is read but headers and nothing is allocated, so that plans of the full-size
models trace on any machine. What is traced are the functions that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct as Shape

from idlora_jax import codecs, geometry, hosted, pipeline, starts
from idlora_jax.files import PathLike
from idlora_jax.model import (
    audio_vae,
    text_connector,
    text_encoder,
    video_tiles,
    video_vae,
)
from idlora_jax.model.tiling import Tiles
from idlora_jax.pipeline import Media, Request
from idlora_jax.plans import Plan, Stage
from idlora_jax.savings import TextKV
from idlora_jax.types import AV, Layout, Prompt, Tree
from idlora_jax.weights import fp8, int8, io, networks, rules, upsampler_files
from idlora_jax.weights.fp8 import Choice
from idlora_jax.weights.leaves import Leaf
from idlora_jax.weights.networks import Networks

VOICE = (5 * geometry.SAMPLE_RATE,)


@dataclass(frozen=True)
class Asked:
    """What decides shapes, besides plan and layout.

    Attributes:
        batch: samples at once.
        dtype: of prompts and of the transformer's computation.
        text_length: tokens of a prompt, S.
        voices: samples of each reference recording at the audio VAE's rate.
        first_frame: whether the clip begins with a picture.
        text_kv: see `savings`.
    """

    batch: int = 1
    dtype: str = "bfloat16"
    text_length: int = 1024
    voices: tuple[int, ...] = VOICE
    first_frame: bool = True
    text_kv: TextKV = "cached"


def _like(leaf: Leaf, dtype: np.dtype) -> Shape:
    return Shape(leaf.spec.shape, dtype)


def shapes(
    found: Mapping[str, Leaf],
    dtype: Any,
    choice: Choice = "upcast",
    where: hosted.Where = "device",
) -> dict[str, Any]:
    """What `io.read_all` gives, without reading it; what is on the host is marked."""

    def put(path: str, part: Leaf, dtype: np.dtype) -> Shape:
        like = _like(part, dtype)
        return hosted.like(path, like) if where == "host" else like

    return rules.nest(
        {p: fp8.read(p, leaf, dtype, choice, put) for p, leaf in found.items()}
    )


def parameters(
    base: PathLike,
    *,
    text_encoder_path: PathLike | None = None,
    upsampler_path: PathLike | None = None,
    dtype: Any = "bfloat16",
    choice: Choice = "upcast",
    where: hosted.Where = "device",
    names: Iterable[str] = tuple(io.NETWORKS),
) -> dict[str, Tree]:
    """Shapes and dtypes of what `networks.load` gives; only headers are read.

    Args:
        base: the base checkpoint.
        text_encoder_path: the text encoder's folder, for "text_encoder".
        upsampler_path: the latent upsampler's file, for "upsampler".
        dtype: of the parameters.
        choice: whether the transformer's kernels are in 8 bits.
        where: where they are.
        names: of the base's networks.

    Raises:
        ValueError: if files are unreadable or incomplete.
    """
    opened, target = io.open_base(base), jnp.dtype(dtype)
    found = {name: io.locate(opened, name)[0] for name in names}
    out: dict[str, Tree] = {n: shapes(own, target) for n, own in found.items()}
    if "transformer" in found:
        out["transformer"] = shapes(found["transformer"], target, choice, where)
    if text_encoder_path is not None:
        _, own = networks.text_encoder_leaves(text_encoder_path)
        out["text_encoder"] = shapes(own, target)
    if upsampler_path is not None:
        file = upsampler_files.open_upsampler(upsampler_path)
        out["upsampler"] = shapes(upsampler_files.locate(file)[0], target)
    return out


def stored_as(base: PathLike) -> Literal["plain", "fp8", "int8"]:
    """How a base holds the kernels of the transformer's blocks; some of them, for fp8.

    Raises:
        ValueError: if it is unreadable or incomplete.
    """
    found, _ = io.locate(io.open_base(base), "transformer")
    narrow = [leaf for leaf in found.values() if leaf.narrow]
    if not narrow:
        return "plain"
    return "int8" if all(map(int8.is_int8, narrow)) else "fp8"


def _float32(*shape: int) -> Shape:
    return Shape(shape, jnp.float32)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def latents(nets: Networks, layout: Layout, batch: int) -> AV:
    """Shapes of a clip's latents."""
    assert layout.video is not None and layout.audio is not None, "a clip has both"
    cells = geometry.latent_shape(layout.video)
    sound = layout.audio.frames, geometry.AUDIO_BINS, geometry.AUDIO_CHANNELS
    channels = nets.video_vae.latent_channels
    return AV(_float32(batch, *cells, channels), _float32(batch, *sound))


def _mel(nets: Networks, samples: int) -> Shape:
    cfg = nets.audio_vae
    return _float32(1, samples // cfg.hop + 1, cfg.mel_bins, cfg.in_channels)


def request(nets: Networks, layouts: Sequence[Layout], asked: Asked) -> Request:
    """What is sampled from: two prompts, the voices, a first frame for each stage.

    Args:
        nets: what the networks are.
        layouts: of the stages, see `pipeline.layouts`.
        asked: the rest.
    """
    connector, dtype = nets.text_connector, jnp.dtype(asked.dtype)
    sides = (connector.video.width, connector.audio.width)
    prompt = Prompt(*(Shape((asked.batch, asked.text_length, n), dtype) for n in sides))

    def voice(samples: int) -> Shape:
        frames = -(-_mel(nets, samples).shape[1] // geometry.MEL_PER_LATENT)
        bins, channels = geometry.AUDIO_BINS, geometry.AUDIO_CHANNELS
        return _float32(asked.batch, frames, bins, channels)

    voices = tuple(map(voice, asked.voices))
    pictures = (latents(nets, layout, asked.batch).video.shape for layout in layouts)
    frames = tuple(_float32(s[0], 1, *s[2:]) for s in pictures)
    return Request(
        (prompt, prompt), voices or None, frames if asked.first_frame else None
    )


def outline(
    plan: Plan,
    nets: Networks,
    params: Mapping[str, Tree],
    layout: Layout,
    *,
    adapters: Mapping[str, Tree] | None = None,
    asked: Asked | None = None,
) -> Media:
    """The shapes that `pipeline.run` gives, by tracing all of it, decoding included.

    Args:
        plan: from `plans`.
        nets: what the networks are.
        params: arrays or shapes by network, as from `parameters`.
        layout: the clip, at the size of the first stage.
        adapters: arrays or shapes, by the names that the plan uses.
        asked: the rest.

    Raises:
        ValueError: for whatever `pipeline.run` refuses.
    """
    asked = asked or Asked()
    wanted = request(nets, pipeline.layouts(plan, layout), asked)

    def run(params: Any, adapters: Any, wanted: Any, key: Any) -> Media:
        args = (plan, nets, params, adapters, wanted, key)
        return pipeline.run(*args, layout=layout, dtype=asked.dtype)

    given = hosted.traceable(params), dict(adapters or {}), wanted, _key()
    return jax.eval_shape(run, *given)


def _traced(f: Callable[..., Any], *shapes: Any) -> Any:
    return jax.make_jaxpr(f)(*hosted.traceable(shapes))


def text(nets: Networks, params: Mapping[str, Tree], asked: Asked) -> Any:
    """One text through the text encoder and the connectors, as a jaxpr."""
    encoder, connector = nets.text_encoder, nets.text_connector
    assert encoder is not None, "there is no text to encode without its networks"

    def run(params: Any, ids: Any, mask: Any) -> Any:
        own = params["text_connector"]
        states = text_encoder.hidden_states(encoder, params["text_encoder"], ids, mask)
        found = text_connector.features(connector, own, states, mask)
        return text_connector.connect(connector, own, found, mask)

    side = {n: params[n] for n in ("text_encoder", "text_connector")}
    ids = Shape((1, asked.text_length), jnp.int32)
    return _traced(run, side, ids, Shape(ids.shape, bool))


def inputs(
    nets: Networks, params: Mapping[str, Tree], largest: Layout, asked: Asked
) -> list[Any]:
    """Encoding the first frame at its largest, and each voice, as jaxprs."""
    out, cfg = [], nets.audio_vae
    grid = largest.video
    if asked.first_frame and grid is not None:
        pixels = _float32(1, 1, grid.height, grid.width, nets.video_vae.in_channels)
        encode = lambda p, x: video_vae.encode(nets.video_vae, p, x)
        out.append(_traced(encode, params["video_vae"], pixels))
    for samples in asked.voices:
        encode = lambda p, x: audio_vae.encode(cfg, p, x)
        out.append(_traced(encode, params["audio_vae"], _mel(nets, samples)))
    return out


def variables(
    stage: Stage, params: Mapping[str, Tree], adapters: Mapping[str, Tree]
) -> dict[str, Tree]:
    """Shapes of the transformer's parameters in a stage, and of its adapters."""
    used = {name: adapters[name] for name, _ in stage.adapters if name in adapters}
    run = lambda base, adapters: pipeline.with_adapters(base, adapters, stage)
    made = jax.eval_shape(run, params["transformer"], used)
    return {**made, "params": params["transformer"]}  # which knows what is on the host


def stage(
    plan: Plan,
    number: int,
    nets: Networks,
    params: Mapping[str, Tree],
    own: Mapping[str, Tree],
    layout: Layout,
    asked: Asked,
) -> list[Any]:
    """One stage, and the enlarging before it, as jaxprs.

    Args:
        plan: from `plans`.
        number: of the stage.
        nets: what the networks are.
        params: shapes by network.
        own: the transformer's in this stage, from `variables`.
        layout: of the first stage.
        asked: the rest.
    """
    layouts, this = pipeline.layouts(plan, layout), plan.stages[number]
    wanted = starts.of_stage(request(nets, layouts, asked), number)
    before, out = None, []
    if this.refines:
        small = latents(nets, layouts[number - 1], asked.batch)
        enlarge = lambda p, x: pipeline.enlarge(nets.upsampler, p, x)
        used = {n: params[n] for n in ("upsampler", "video_vae")}
        out.append(_traced(enlarge, used, small))
        before = latents(nets, layouts[number], asked.batch)

    def run(own: Any, wanted: Any, key: Any, before: Any) -> AV:
        args = (this, nets.transformer, own, wanted, key)
        options: dict[str, Any] = {"layout": layouts[number], "dtype": asked.dtype}
        options["text_kv"] = asked.text_kv
        return pipeline.sample(*args, before=before, **options)

    return [*out, _traced(run, own, wanted, _key(), before)]


def decoding(
    nets: Networks,
    params: Mapping[str, Tree],
    largest: Layout,
    asked: Asked,
    tiles: Tiles | Literal["usual"] | None = "usual",
) -> list[Any]:
    """Decoding video and sound, as jaxprs; a tiled video slab by slab."""
    made = latents(nets, largest, asked.batch)
    assert largest.video is not None, "a clip has both"
    if tiles == "usual":
        tiles = codecs.usual_tiles(geometry.latent_shape(largest.video))

    def last(params: Any, video: Any) -> Any:
        """The last slab of frames: those before it are let go one by one."""
        cfg = nets.video_vae
        draws = video_vae.draw(jax.random.key(0), cfg, video.shape)
        options: dict[str, Any] = {"draws": draws, "finish": video_vae.to_uint8}
        assert tiles is not None, "a whole clip has no slabs"
        *_, chunk = video_tiles.decode_chunks(cfg, params, video, tiles, **options)
        return chunk

    def at_once(params: Any, pair: AV) -> Any:
        return codecs.decode(nets, params, pair, tiles=None)

    side = {n: params[n] for n in ("video_vae", "audio_vae", "vocoder")}
    parts = [_traced(at_once, side, AV(None, made.audio))]
    if tiles is not None:
        return [*parts, _traced(last, side["video_vae"], made.video)]
    return [*parts, _traced(at_once, side, AV(made.video, None))]

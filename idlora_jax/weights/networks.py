"""The networks of a checkpoint: what they are, and their parameters by name.

    nets, params = load("ltx-2-19b-dev.safetensors", ("transformer", "audio_vae"))
    audio_vae.encode(nets.audio_vae, params["audio_vae"], mel)

`Networks` is static and hashable, so it may key a compiled function; the parameters
are plain nested dicts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from idlora_jax import hosted, parallel
from idlora_jax.config import Generation, TransformerConfig
from idlora_jax.config_codecs import AudioVAEConfig
from idlora_jax.config_text import TextConnectorConfig, TextEncoderConfig
from idlora_jax.config_upsampler import UpsamplerConfig
from idlora_jax.config_video_vae import VideoVAEConfig
from idlora_jax.config_vocoder import VocoderConfig
from idlora_jax.files import PathLike
from idlora_jax.types import Tree
from idlora_jax.weights import io, text_encoder_files
from idlora_jax.weights.bases import BaseFile, open_base
from idlora_jax.weights.fp8 import Choice
from idlora_jax.weights.leaves import Leaf
from idlora_jax.weights.upsampler_files import load_upsampler, open_upsampler

TEXT_ENCODER, UPSAMPLER = "text_encoder", "upsampler"


@dataclass(frozen=True)
class Networks:
    """The networks' configurations and where they come from.

    A network that was neither asked for nor can be described from the file is None.
    """

    transformer: TransformerConfig
    text_connector: TextConnectorConfig
    video_vae: VideoVAEConfig
    audio_vae: AudioVAEConfig
    vocoder: VocoderConfig
    text_encoder: TextEncoderConfig | None
    generation: Generation
    base_hash: str
    upsampler: UpsamplerConfig | None = None


def _config(base: BaseFile, name: str, wanted: bool) -> Any:
    try:
        return io.network_config(base, name)
    except ValueError:
        if wanted:
            raise
        return None


def text_encoder_leaves(folder: PathLike) -> tuple[TextEncoderConfig, dict[str, Leaf]]:
    """Configuration and leaves of a text encoder's folder, checked for completeness.

    Raises:
        ValueError: if the folder is none, or its files are incomplete.
    """
    file = text_encoder_files.open_text_encoder(folder)
    return file.cfg, file.leaves


def _require_partner(text: TextEncoderConfig, connector: TextConnectorConfig) -> None:
    got = (text.width, text.layers + 1)
    expected = (connector.text_width, connector.text_states)
    if got != expected:
        raise ValueError(
            f"text encoder: got width {got[0]} and {got[1]} states, but the checkpoint "
            f"expects width {expected[0]} and {expected[1]} states; use the text "
            "encoder it was trained with (gemma-3-12b-it for LTX-2)"
        )


def load(
    base_path: PathLike,
    names: Iterable[str],
    *,
    text_encoder_path: PathLike | None = None,
    upsampler_path: PathLike | None = None,
    dtype: Any = jnp.float32,
    weights: Choice = "upcast",
    weights_in: hosted.Where = "device",
    mesh: Mesh | None = None,
) -> tuple[Networks, dict[str, Tree]]:
    """Open a base and read the named networks.

    Args:
        base_path: an original .safetensors file, a converted folder, or diffusers'.
        names: of `io.NETWORKS`, "text_encoder" and "upsampler".
        text_encoder_path: the Gemma-3 folder, or a converted one; its configuration is
            read whenever it is given, its parameters if named.
        upsampler_path: the latent upsampler's file; likewise.
        dtype: of the parameters, float32 or bfloat16; None: as stored. Scale and shift
            tables that the file holds in float32 stay so.
        weights: whether the transformer's kernels are in 8 bits; see `io.load_network`.
        weights_in: where the kernels of its blocks are, see `hosted`.
        mesh: devices that the parameters are read to, as `parallel.RULES` says: those
            of transformer and text encoder in parts, the others whole on each.

    Returns:
        The configurations of all networks, and the parameters of the named ones.

    Raises:
        ValueError: for unknown names, unreadable or incomplete files, a text encoder
            that is not the checkpoint's, or a mesh that cannot divide the heads.
    """
    names = tuple(dict.fromkeys(names))
    known = [*io.NETWORKS, TEXT_ENCODER, UPSAMPLER]
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(f"weights: no networks {unknown}, use some of {known}")
    if TEXT_ENCODER in names and text_encoder_path is None:
        raise ValueError(
            "weights: the text encoder needs its folder (gemma-3-12b-it); give "
            "text_encoder_path"
        )
    if UPSAMPLER in names and upsampler_path is None:
        raise ValueError(
            "weights: the latent upsampler is a file of its own "
            "(ltx-2-spatial-upscaler-x2-1.0.safetensors or alike); give upsampler_path"
        )
    base = open_base(base_path)
    configs = {name: _config(base, name, name in names) for name in io.NETWORKS}
    if mesh is not None and configs["transformer"] is not None:
        parallel.check(mesh.shape, configs["transformer"])
    text, found = None, {}
    if text_encoder_path is not None:
        text, found = text_encoder_leaves(text_encoder_path)
        if configs["text_connector"] is not None:
            _require_partner(text, configs["text_connector"])
    larger = None if upsampler_path is None else open_upsampler(upsampler_path)
    nets = Networks(
        **configs,
        text_encoder=text,
        generation=base.generation,
        base_hash=base.base_hash,
        upsampler=None if larger is None else larger.cfg,
    )
    where: dict[str, Any] = {name: parallel.placement(mesh, name) for name in names}
    if weights_in == "host" and "transformer" in where:
        where["transformer"] = hosted.placement(where["transformer"])
    params = {
        name: io.load_network(base, name, dtype, placement=where[name], weights=weights)
        for name in names
        if name in io.NETWORKS
    }
    if TEXT_ENCODER in names:
        params[TEXT_ENCODER] = io.read_all(found, dtype, placement=where[TEXT_ENCODER])
    if UPSAMPLER in names and upsampler_path is not None:
        _, read = load_upsampler(upsampler_path, dtype)
        params[UPSAMPLER] = parallel.place(read, mesh, UPSAMPLER)
    return nets, params

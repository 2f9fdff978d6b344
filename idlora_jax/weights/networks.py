"""The networks of a checkpoint: what they are, and their parameters by name.

    nets, params = load("ltx-2-19b-dev.safetensors", ("transformer", "audio_vae"))
    audio_vae.encode(nets.audio_vae, params["audio_vae"], mel)

`Networks` is static and hashable, so it may key a compiled function; the parameters
are plain nested dicts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from idlora_jax.config import Generation, TransformerConfig
from idlora_jax.config_codecs import AudioVAEConfig, VideoVAEConfig, VocoderConfig
from idlora_jax.config_text import (
    TextConnectorConfig,
    TextEncoderConfig,
    text_encoder_config,
)
from idlora_jax.files import PathLike, problem
from idlora_jax.model import text_encoder
from idlora_jax.types import Tree
from idlora_jax.weights import io, leaves, tables, tensorfile
from idlora_jax.weights.io import BaseFile, open_base
from idlora_jax.weights.leaves import Leaf, Where

TEXT_ENCODER = "text_encoder"


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


def _config(base: BaseFile, name: str, wanted: bool) -> Any:
    try:
        return io.network_config(base, name)
    except ValueError:
        if wanted:
            raise
        return None


def _shards(folder: Path) -> list[Path]:
    """The weight files of a folder; those that its index names must be there."""
    found = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text("utf-8")).get("weight_map", {}).values())
        absent = sorted(named - {path.name for path in found})
        if absent:
            got, hint = f"a folder without {absent}", "download the rest"
            raise problem("weights", folder, got, "all files of its index", hint)
        return [folder / name for name in sorted(named)] or found
    return found


def text_encoder_leaves(folder: PathLike) -> tuple[TextEncoderConfig, dict[str, Leaf]]:
    """Configuration and leaves of a Gemma-3 folder, checked for completeness.

    Raises:
        ValueError: if the folder is no Gemma-3 folder, or its files are incomplete.
    """
    folder = Path(folder)
    config, shards = folder / "config.json", _shards(folder)
    if not config.is_file() or not shards:
        got = "a folder without config.json and *.safetensors"
        hint = "download gemma-3-12b-it (see docs/quickstart.md)"
        raise problem("weights", folder, got, "a Gemma-3 folder", hint)
    cfg = text_encoder_config(json.loads(config.read_text("utf-8")))
    like = jax.eval_shape(lambda key: text_encoder.init(cfg, key), jax.random.key(0))
    tensors = tensorfile.tensors_of(*shards)
    keys = [k for k in tensors.specs if not k.startswith(tables.GEMMA_IGNORED)]
    needed = leaves.sources(TEXT_ENCODER, like, tables.GEMMA)
    todo = "LTX-2 uses gemma-3-12b-it with 'language_model.model.' keys"
    where = Where(f"{folder}: the text encoder does not fit config.json", todo)
    return cfg, leaves.from_original(tensors, keys, needed, where)


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
    dtype: Any = jnp.float32,
) -> tuple[Networks, dict[str, Tree]]:
    """Open a base and read the named networks.

    Args:
        base_path: an original .safetensors file, or a converted folder.
        names: of `io.NETWORKS`, and "text_encoder".
        text_encoder_path: the Gemma-3 folder; its configuration is read whenever it is
            given, its parameters if named.
        dtype: of the parameters, float32 or bfloat16; None: as stored. Scale and shift
            tables that the file holds in float32 stay so.

    Returns:
        The configurations of all networks, and the parameters of the named ones.

    Raises:
        ValueError: for unknown names, unreadable or incomplete files, or a text encoder
            that is not the checkpoint's.
    """
    names = tuple(dict.fromkeys(names))
    unknown = [n for n in names if n not in (*io.NETWORKS, TEXT_ENCODER)]
    if unknown:
        known = [*io.NETWORKS, TEXT_ENCODER]
        raise ValueError(f"weights: no networks {unknown}, use some of {known}")
    if TEXT_ENCODER in names and text_encoder_path is None:
        raise ValueError(
            "weights: the text encoder needs its folder (gemma-3-12b-it); give "
            "text_encoder_path"
        )
    base = open_base(base_path)
    configs = {name: _config(base, name, name in names) for name in io.NETWORKS}
    text, found = None, {}
    if text_encoder_path is not None:
        text, found = text_encoder_leaves(text_encoder_path)
        if configs["text_connector"] is not None:
            _require_partner(text, configs["text_connector"])
    nets = Networks(
        **configs,
        text_encoder=text,
        generation=base.generation,
        base_hash=base.base_hash,
    )
    params = {n: io.load_network(base, n, dtype) for n in names if n in io.NETWORKS}
    if TEXT_ENCODER in names:
        params[TEXT_ENCODER] = io.read_all(found, dtype)
    return nets, params

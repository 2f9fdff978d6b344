"""Base checkpoints: opening one, and reading its networks a parameter at a time.

    open_base(path) -> BaseFile         config, generation, hash; no tensor is read
    load_network(base, name) -> tree    checked for completeness, then read lazily

A base is an original LTX single file (config as JSON in its metadata), or a folder that
`convert` made of one (config.json, manifest.json, a file of stacked parameters per
network). Reading memory-maps the files, permutes, casts and stacks one parameter, and
hands it to the device: the host holds the final arrays and one stacked tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from idlora_jax import config as core
from idlora_jax import config_codecs, config_text
from idlora_jax.config import Generation
from idlora_jax.files import PathLike, problem
from idlora_jax.model import (
    audio_vae,
    text_connector,
    transformer,
    video_vae,
    vocoder,
)
from idlora_jax.types import Tree
from idlora_jax.weights import leaves, rules, tables, tensorfile
from idlora_jax.weights.leaves import Leaf, Source, Where
from idlora_jax.weights.rules import Rule
from idlora_jax.weights.tensorfile import Tensors

CONFIG, MANIFEST = "config.json", "manifest.json"
_DIT = "model.diffusion_model."


@dataclass(frozen=True)
class BaseFile:
    """A base checkpoint that was opened, not read.

    Attributes:
        path: the file, or the converted folder.
        config: the embedded JSON, all sections.
        generation: which behaviour it has.
        metadata: the original file's, without the config.
        base_hash: sha256 recorded when the file was written by this library, otherwise
            "header:" and a digest of header and size.
        converted: whether it is a converted folder.
    """

    path: Path
    config: dict[str, Any]
    generation: Generation
    metadata: dict[str, str]
    base_hash: str
    converted: bool


class Network(NamedTuple):
    """How a network is read: its keys' prefixes, rules, configuration, parameters.

    `config` takes the embedded JSON, the generation, and how many states the text
    encoder gives, which only the text connector asks for.
    """

    prefixes: tuple[str, ...]
    rules: tuple[Rule, ...]
    config: Callable[[dict[str, Any], Generation, int], Any]
    init: Callable[[Any, jax.Array], Tree]


def _text_width(config: dict[str, Any]) -> int:
    return config.get("transformer", {}).get("caption_channels", 3840)


NETWORKS: dict[str, Network] = {
    "transformer": Network(
        (_DIT,),
        tables.TRANSFORMER,
        lambda config, generation, _: core.transformer_config(config, generation),
        transformer.init,
    ),
    "text_connector": Network(
        (
            f"{_DIT}video_embeddings_connector.",
            f"{_DIT}audio_embeddings_connector.",
            "text_embedding_projection.",
        ),
        tables.TEXT_CONNECTOR,
        lambda config, generation, states: config_text.text_connector_config(
            config, generation, text_width=_text_width(config), text_states=states
        ),
        text_connector.init,
    ),
    "video_vae": Network(
        ("vae.",),
        tables.VIDEO_VAE,
        lambda config, generation, _: config_codecs.video_vae_config(
            config, generation
        ),
        video_vae.init,
    ),
    "audio_vae": Network(
        ("audio_vae.",),
        tables.AUDIO_VAE,
        lambda config, *_: config_codecs.audio_vae_config(config),
        audio_vae.init,
    ),
    "vocoder": Network(
        ("vocoder.",),
        tables.VOCODER,
        lambda config, *_: config_codecs.vocoder_config(config),
        vocoder.init,
    ),
}
_STATES = 49
_PROJECTIONS = {
    "text_embedding_projection.aggregate_embed.weight": 1,
    "text_embedding_projection.video_aggregate_embed.weight": 1,
    "projection/shared/kernel": 0,
    "projection/video/kernel": 0,
}
"""Tensors of which this axis is the text encoder's width times its number of states."""


def _network(name: str) -> Network:
    if name not in NETWORKS:
        raise ValueError(f"weights: no network {name!r}, use one of {[*NETWORKS]}")
    return NETWORKS[name]


def owner(key: str) -> str | None:
    """The network an original key belongs to: that of its longest known prefix."""
    hits = [
        (len(prefix), name)
        for name, network in NETWORKS.items()
        for prefix in network.prefixes
        if key.startswith(prefix)
    ]
    return max(hits)[1] if hits else None


def _tensors(base: BaseFile, name: str) -> Tensors:
    if not base.converted:
        return tensorfile.tensors_of(base.path)
    path = base.path / f"{name}.safetensors"
    if not path.is_file():
        found = [n for n in NETWORKS if (base.path / f"{n}.safetensors").is_file()]
        raise problem(
            "weights", path, "no such file", f"{name!r} beside {found}", "convert again"
        )
    return tensorfile.tensors_of(path)


def _parsed(path: PathLike, text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if isinstance(found, dict):
        return found
    hint = "download or convert it again"
    raise problem("weights", path, f"{what} that is no JSON object", "one", hint)


def _open_folder(path: Path) -> BaseFile:
    absent = [name for name in (CONFIG, MANIFEST) if not (path / name).is_file()]
    if absent:
        hint = "give the original .safetensors file, or convert it (convert/base.py)"
        got = f"a folder without {' and '.join(absent)}"
        raise problem("weights", path, got, "a converted base", hint)
    config, manifest = (
        _parsed(path / name, (path / name).read_text("utf-8"), "a file")
        for name in (CONFIG, MANIFEST)
    )
    if not {"generation", "base_hash", "metadata"} <= manifest.keys():
        hint, what = "convert it again", "one with generation, base_hash, metadata"
        raise problem("weights", path / MANIFEST, f"{[*manifest]}", what, hint)
    generation, base_hash = manifest["generation"], manifest["base_hash"]
    return BaseFile(path, config, generation, manifest["metadata"], base_hash, True)


def open_base(path: PathLike) -> BaseFile:
    """Open a base checkpoint; no tensor is read.

    Args:
        path: an original LTX-2 .safetensors file, or a converted folder.

    Raises:
        ValueError: if it is missing, truncated, or not a base checkpoint.

    Source: ltx_core/loader/sft_loader.py: SafetensorsModelStateDictLoader.metadata.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    head = tensorfile.header(path)
    metadata = dict(head.metadata)
    if "config" not in metadata:
        adapter = any(".lora_A." in name for name in head.tensors)
        got = "an adapter" if adapter else "a file whose metadata has no 'config'"
        hint = "give the single-file checkpoint (ltx-2-19b-dev.safetensors or alike)"
        raise problem("weights", path, got, "a base checkpoint", hint)
    config = _parsed(path, metadata.pop("config"), "a 'config'")
    recorded = metadata.pop(tensorfile.HASH, None)
    generation = core.detect_generation(config, metadata.get("model_version"))
    base_hash = recorded or f"header:{head.fingerprint}"
    return BaseFile(path, config, generation, metadata, base_hash, False)


def names_in(base: BaseFile) -> tuple[str, ...]:
    """The networks a base holds anything of, in the order of `NETWORKS`."""
    if base.converted:
        found = {n for n in NETWORKS if (base.path / f"{n}.safetensors").is_file()}
    else:
        found = {owner(key) for key in tensorfile.header(base.path).tensors}
    return tuple(name for name in NETWORKS if name in found)


def _text_states(base: BaseFile) -> int:
    """How many states the text encoder must give; no config says it."""
    specs = _tensors(base, "text_connector").specs
    flat = [specs[k].shape[axis] for k, axis in _PROJECTIONS.items() if k in specs]
    return flat[0] // _text_width(base.config) if flat else _STATES


def read_config(
    name: str,
    config: dict[str, Any],
    generation: Generation,
    text_states: int = _STATES,
) -> Any:
    """The frozen configuration of a network, from an embedded config.

    Raises:
        ValueError: for a name that is no network's, or a network not supported.
    """
    return _network(name).config(config, generation, text_states)


def network_config(base: BaseFile, name: str) -> Any:
    """The frozen configuration of a base's network; see `read_config`."""
    states = _text_states(base) if name == "text_connector" else _STATES
    return read_config(name, base.config, base.generation, states)


def shapes_of(name: str, cfg: Any) -> Tree:
    """Shapes of the parameters of a network; nothing is allocated."""
    init = _network(name).init
    return jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))


def shapes(base: BaseFile, name: str) -> Tree:
    """Shapes of the parameters that a base's network must have."""
    return shapes_of(name, network_config(base, name))


def locate(base: BaseFile, name: str) -> tuple[dict[str, Leaf], dict[str, Source]]:
    """Leaves and sources of a network by path, checked for completeness.

    Raises:
        ValueError: listing missing keys, wrong shapes and unexpected keys.
    """
    needed = leaves.sources(name, shapes(base, name), _network(name).rules)
    tensors = _tensors(base, name)
    what = f"{base.path}: the {name} does not fit the config"
    if base.converted:
        return leaves.from_converted(
            tensors, needed, Where(what, "convert again")
        ), needed
    todo = "is the file whole, and is it an LTX-2 checkpoint? Download it again"
    keys = [key for key in tensors.specs if owner(key) == name]
    return leaves.from_original(tensors, keys, needed, Where(what, todo)), needed


def load_network(base: BaseFile, name: str, dtype: Any | None = None) -> Tree:
    """Read a network's parameters, one at a time, onto the default device.

    Args:
        base: from `open_base`.
        name: one of `NETWORKS`.
        dtype: of the parameters (default: as stored). Scale and shift tables that the
            file holds in float32 stay so.

    Raises:
        ValueError: if the file lacks keys, has others within the network's prefixes, or
            other shapes than the configuration says; all are listed.
    """
    return read_all(locate(base, name)[0], dtype)


def read_all(found: Mapping[str, Leaf], dtype: Any | None) -> Tree:
    """Leaves by path -> nested parameters on the default device, one at a time."""

    def one(path: str, leaf: Leaf) -> jax.Array:
        target = leaves.kept_dtype(path, leaf.spec.dtype, dtype)
        # Not jnp.asarray, which compiles once per shape (15 ms each, measured).
        return jax.device_put(leaves.read(leaf, target))

    return rules.nest({path: one(path, leaf) for path, leaf in found.items()})


def save_original(
    path: PathLike,
    tree: Mapping[str, Tree],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write networks as an original single file: key names, config, axis order.

    Args:
        path: the .safetensors file.
        tree: parameters by network name.
        config: the embedded JSON, all sections.
        metadata: further text, e.g. "model_version".

    Returns:
        The sha256 that is recorded in the file, its `base_hash`.

    Raises:
        ValueError: for a parameter that has no original name.
        OSError: if it cannot be written; nothing is left behind.
    """
    entries: list[tensorfile.Entry] = []
    for name, params in tree.items():
        needed = leaves.sources(name, params, _network(name).rules)
        entries += leaves.original_entries(leaves.from_arrays(params, needed), needed)
    return tensorfile.write(path, entries, with_config(config, metadata))


def with_config(
    config: Mapping[str, Any], metadata: Mapping[str, str] | None
) -> dict[str, str]:
    """The metadata of an original file."""
    return {"config": json.dumps(config), **(metadata or {})}

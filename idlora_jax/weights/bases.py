"""Base checkpoints: opening one, and finding its tensors; none is read.

    open_base(path) -> BaseFile         config, generation, hash
    tensors(base, name) -> Tensors      of a network, under the names they have on disk

A base is an original LTX single file (config as JSON in its metadata), a folder that
`convert` made of one (config.json, manifest.json, shards of stacked parameters), or a
folder of diffusers, read under original names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from idlora_jax import config as core
from idlora_jax.config import Generation
from idlora_jax.files import PathLike, problem
from idlora_jax.weights import diffusers_open, fingerprint, identify, tensorfile
from idlora_jax.weights.tensorfile import HASH, Tensors

CONFIG, MANIFEST = "config.json", "manifest.json"
FORMAT = 2
"""Of converted folders; others are converted again."""


@dataclass(frozen=True)
class BaseFile:
    """A base checkpoint that was opened, not read.

    Attributes:
        path: the file, or the converted folder.
        config: the embedded JSON, all sections.
        generation: which behaviour it has.
        metadata: the original file's, without the config.
        base_hash: sha256 recorded when the file was written by this library, otherwise
            "sampled:" and a digest of its header, size and parts of it.
        converted: whether it is a converted folder.
        shards: of a converted folder, the files of each network.
    """

    path: Path
    config: dict[str, Any]
    generation: Generation
    metadata: dict[str, str]
    base_hash: str
    converted: bool
    shards: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _parsed(path: PathLike, text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    hint = "download or convert it again"
    raise problem("weights", path, f"{what} that is no JSON object", "one", hint)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a converted folder.

    Raises:
        ValueError: if it is no manifest of this format, or names files elsewhere.
    """
    path = folder / MANIFEST
    found = _parsed(path, path.read_text("utf-8"), "a file")
    needed = {"generation", "base_hash", "metadata", "networks"}
    sound = needed <= found.keys() and found.get("format") == FORMAT
    networks = found.get("networks")
    if (
        not sound
        or not isinstance(networks, dict)
        or not all(isinstance(files, dict) for files in networks.values())
    ):
        got, what = f"{[*found]}", f"one of format {FORMAT} with {sorted(needed)}"
        raise problem("weights", path, got, what, "convert it again")
    names = [file for files in networks.values() for file in files]
    odd = [name for name in names if Path(name).name != name]
    if odd:
        got, what = f"file names {odd}", "names of files in its folder"
        raise problem("weights", path, got, what, "convert it again")
    return found


def _open_folder(path: Path) -> BaseFile:
    absent = [name for name in (CONFIG, MANIFEST) if not (path / name).is_file()]
    if absent:
        found = identify.identify(path)
        hint = "give the original .safetensors file, or convert it (convert/base.py)"
        got = f"a folder without {' and '.join(absent)}"
        if found.kind != "unknown":
            got, hint = f"{found.description} without {absent[0]}", found.advice
        raise problem("weights", path, got, "a converted base", hint)
    manifest = read_manifest(path)
    shards = {name: tuple(files) for name, files in manifest["networks"].items()}
    absent = [f for files in shards.values() for f in files if not (path / f).is_file()]
    if absent:
        got, hint = f"a folder without {absent}", "copy or convert it again"
        raise problem("weights", path, got, "all files of its manifest", hint)
    return BaseFile(
        path,
        _parsed(path / CONFIG, (path / CONFIG).read_text("utf-8"), "a file"),
        manifest["generation"],
        manifest["metadata"],
        manifest["base_hash"],
        True,
        shards,
    )


def _open_diffusers(path: Path) -> BaseFile:
    said = diffusers_open.describe(path)
    # So that a file made of it is read as the same generation, whatever it holds.
    metadata = {"model_version": said.generation}
    return BaseFile(path, said.config, said.generation, metadata, said.base_hash, False)


def open_base(path: PathLike) -> BaseFile:
    """Open a base checkpoint; no tensor is read.

    Args:
        path: an original LTX-2 .safetensors file, a converted folder, or a folder of
            diffusers (the pipeline's, or a component's), read under original names.

    Raises:
        ValueError: if it is missing, truncated, or not a base checkpoint.

    Source: ltx_core/loader/sft_loader.py: SafetensorsModelStateDictLoader.metadata.
    """
    path = Path(path)
    if path.is_dir():
        other = not (path / MANIFEST).is_file() and diffusers_open.is_pipeline(path)
        return _open_diffusers(path) if other else _open_folder(path)
    head = tensorfile.header(path)
    metadata = dict(head.metadata)
    identify.require_base(path, head)
    config = _parsed(path, metadata.pop("config"), "a 'config'")
    recorded = metadata.pop(HASH, None)
    generation = core.detect_generation(config, metadata.get("model_version"))
    base_hash = recorded or fingerprint.sampled(path, head.fingerprint)
    return BaseFile(path, config, generation, metadata, base_hash, False)


def original(base: BaseFile) -> Tensors:
    """All tensors of a checkpoint that was not converted, by original key."""
    if base.path.is_dir():
        return diffusers_open.tensors(base.path, base.config, base.generation)
    return tensorfile.tensors_of(base.path)


def tensors(base: BaseFile, name: str) -> Tensors:
    """A network's tensors (of an original checkpoint, all), by their names on disk.

    Raises:
        ValueError: if a converted folder does not hold the network.
    """
    if not base.converted:
        return original(base)
    if name not in base.shards:
        got, expected = f"networks {[*base.shards]}", f"{name!r} among them"
        raise problem("weights", base.path, got, expected, "convert again")
    return tensorfile.tensors_of(*(base.path / file for file in base.shards[name]))


def original_specs(base: BaseFile) -> dict[str, tensorfile.Spec]:
    """Shapes and dtypes of all tensors of an original checkpoint, by key."""
    return original(base).specs


def files_of(base: BaseFile) -> list[Path]:
    """The weight files of a checkpoint."""
    if not base.converted:
        folder = base.path.is_dir()
        return diffusers_open.files_of(base.path) if folder else [base.path]
    return [base.path / file for files in base.shards.values() for file in files]


def recorded_hashes(base: BaseFile) -> dict[Path, str]:
    """The hash that each file should have; empty where none is recorded."""
    if not base.converted:
        heads = {path: tensorfile.header(path) for path in files_of(base)}
        return {path: head.metadata.get(HASH, "") for path, head in heads.items()}
    named = read_manifest(base.path)["networks"].values()
    return {base.path / f: digest for files in named for f, digest in files.items()}

"""Files of latent upsamplers: opening, checking, reading, converting and exporting.

    load_upsampler(path) -> (config, parameters)

A path is an original file (flat config as JSON in its metadata, keys without prefix),
a file that `convert_upsampler` made of one (our paths, and the original's metadata word
by word), or diffusers' folder (config.json, diffusion_pytorch_model.safetensors).
Opening reads headers only; a file is refused before any tensor is read if it lacks one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idlora_jax.config_upsampler import (
    UpsamplerConfig,
    embedded_config,
    upsampler_config,
)
from idlora_jax.files import PathLike, problem
from idlora_jax.model import upsampler
from idlora_jax.types import Tree
from idlora_jax.weights import (
    bases,
    exporting,
    fingerprint,
    hub_folder,
    io,
    leaves,
    shards,
    tables,
    tensorfile,
)
from idlora_jax.weights.leaves import Leaf, Source, Where
from idlora_jax.weights.progress import bar
from idlora_jax.weights.tensorfile import Entry, Header, Tensors

NAME = "upsampler"
EXPECTED = "a latent upsampler"
_HINT = "give ltx-2-spatial-upscaler-x2-1.0.safetensors or alike"
_ORIGINAL, _SOURCE, _DTYPE = "original", "source_hash", "dtype"

Say = Callable[[str], Any]


@dataclass(frozen=True)
class UpsamplerFile:
    """A latent upsampler that was opened, not read.

    Attributes:
        path: the file, or diffusers' folder.
        files: where its tensors are.
        cfg: what its config says.
        metadata: the original file's, with its config.
        source_hash: sha256 recorded when the original was written by this library,
            otherwise "sampled:" and a digest of its header, size and parts of it.
        converted: whether the names are our paths.
        dtype: that a conversion cast to, or "as stored".
    """

    path: Path
    files: tuple[Path, ...]
    cfg: UpsamplerConfig
    metadata: dict[str, str]
    source_hash: str
    converted: bool
    dtype: str


def _object(path: PathLike, text: Any, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    do = "download or convert it again"
    raise problem("upsampler", path, f"{what} that is no JSON object", "one", do)


def _config(path: PathLike, config: dict[str, Any]) -> UpsamplerConfig:
    try:
        return upsampler_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _refuse_others(path: Path, head: Header) -> None:
    """Raise if the file is something else that people have at hand."""
    got = None
    if any(".lora_" in key or key.startswith("lora_") for key in head.tensors):
        got = "an adapter (LoRA)"
    elif any(io.owner(key) for key in head.tensors):
        got = "a base checkpoint"
    elif head.metadata.get("network", NAME) != NAME:
        got = f"the {head.metadata['network']} of a converted base"
    elif not {"config", _ORIGINAL} & head.metadata.keys():
        got = "a file whose metadata has no 'config'"
    if got:
        raise problem("upsampler", path, got, EXPECTED, _HINT)


def _open_file(path: Path) -> UpsamplerFile:
    head = tensorfile.header(path)
    _refuse_others(path, head)
    metadata, dtype, converted = dict(head.metadata), "as stored", False
    recorded = metadata.pop(tensorfile.HASH, None)
    if _ORIGINAL in metadata:
        recorded, dtype, converted = metadata.get(_SOURCE), metadata.get(_DTYPE), True
        metadata = _object(path, metadata[_ORIGINAL], f"an {_ORIGINAL!r}")
    config = _object(path, metadata.get("config"), "a 'config'")
    recorded = recorded or fingerprint.sampled(path, head.fingerprint)
    cfg = _config(path, config)
    return UpsamplerFile(
        path, (path,), cfg, metadata, recorded, converted, dtype or "as stored"
    )


def _open_folder(path: Path) -> UpsamplerFile:
    """Diffusers' folder of the network, or the pipeline's that holds it."""
    inner = path / "latent_upsampler"
    path = inner if inner.is_dir() else path
    files = tuple(hub_folder.files_of(path))
    if not (path / "config.json").is_file() or not files:
        base = (path / bases.MANIFEST).is_file()
        absent = "a folder without config.json and *.safetensors"
        got = "a converted base" if base else absent
        raise problem("upsampler", path, got, EXPECTED, _HINT)
    text = (path / "config.json").read_text("utf-8", errors="replace")
    config = _object(path / "config.json", text, "a file")
    if "_class_name" not in config:
        got, do = "a config.json without '_class_name'", _HINT
        raise problem("upsampler", path, got, "that of diffusers", do)
    cfg = _config(path / "config.json", config)
    marks = (fingerprint.sampled(f, tensorfile.header(f).fingerprint) for f in files)
    metadata = {"config": json.dumps(embedded_config(cfg))}
    return UpsamplerFile(
        path, files, cfg, metadata, "+".join(marks), False, "as stored"
    )


def open_upsampler(path: PathLike) -> UpsamplerFile:
    """Open a latent upsampler; no tensor is read.

    Args:
        path: an original or converted .safetensors file, or diffusers' folder.

    Raises:
        ValueError: if it is missing, truncated, something else (a base checkpoint, an
            adapter), or has no config that is supported.
    """
    path = Path(path)
    return _open_folder(path) if path.is_dir() else _open_file(path)


def tensors_in(file: UpsamplerFile) -> Tensors:
    """Its tensors by the names they have there; nothing is read but headers.

    Raises:
        ValueError: if the files of a folder and its index do not agree.
    """
    if file.path.is_dir():
        return hub_folder.tensors_in(file.path)
    return tensorfile.tensors_of(file.path)


def _needed(cfg: UpsamplerConfig) -> dict[str, Source]:
    shapes = jax.eval_shape(lambda key: upsampler.init(cfg, key), jax.random.key(0))
    return leaves.sources(NAME, shapes, tables.UPSAMPLER)


def locate(file: UpsamplerFile) -> tuple[dict[str, Leaf], dict[str, Source]]:
    """Leaves and sources by path, checked for completeness.

    Raises:
        ValueError: listing missing and unexpected tensors and those of a wrong shape.
    """
    needed, tensors = _needed(file.cfg), tensors_in(file)
    todo = "is the file whole, and its config its own? Download or convert it again"
    where = Where(f"{file.path}: the upsampler does not fit its config", todo)
    if file.converted:
        return leaves.from_converted(tensors, needed, where), needed
    return leaves.from_original(tensors, tensors.specs, needed, where), needed


def load_upsampler(
    path: PathLike, dtype: Any | None = None
) -> tuple[UpsamplerConfig, Tree]:
    """Read a latent upsampler, one tensor at a time, onto the default device.

    Args:
        path: see `open_upsampler`.
        dtype: of the parameters (default: as stored).

    Returns:
        What `model.upsampler.apply` and `upsample` take first.

    Raises:
        ValueError: as `open_upsampler`, and listing missing and unexpected tensors and
            those of a wrong shape.
    """
    file = open_upsampler(path)
    return file.cfg, io.read_all(locate(file)[0], dtype)


def _occupied(destination: Path, got: str, expected: str) -> ValueError:
    do = "choose another name, or remove this one"
    return problem("convert", destination, got, expected, do)


def _is_done(destination: Path, wanted: Mapping[str, str]) -> bool:
    """Whether the destination is this conversion; anything else is an error."""
    if not destination.exists():
        return False
    try:
        found = tensorfile.header(destination).metadata
    except ValueError:
        found = {}
    if _ORIGINAL not in found or found.get("network") != NAME:
        raise _occupied(destination, "something else", "a new file")
    held = {key: found.get(key) for key in wanted}
    if held != wanted:
        raise _occupied(destination, f"a conversion with {held}", f"{wanted}")
    return True


def _write(
    path: PathLike, entries: list[Entry], metadata: Mapping[str, str], what: str
) -> str:
    with bar(sum(entry.spec.nbytes for entry in entries), what) as progress:
        told = [shards.counted(entry, progress) for entry in entries]
        return tensorfile.write(path, told, metadata)


def convert_upsampler(
    source: PathLike,
    destination: PathLike,
    dtype: Any | None = None,
    *,
    say: Say = print,
) -> bool:
    """Convert an original file, or diffusers' folder, to a file of our paths.

    Args:
        source: see `open_upsampler`.
        destination: the .safetensors file to be made.
        dtype: of the parameters (default: as stored, so that `export_upsampler` gives
            back the same tensors).
        say: takes lines about the progress.

    Returns:
        False if the destination was complete already and nothing was done.

    Raises:
        ValueError: if the source is incomplete or unreadable, or the destination holds
            something else.
        OSError: if it cannot be written; nothing is left behind.
    """
    file, destination = open_upsampler(source), Path(destination)
    if file.converted:
        do = "use it as it is, or give the original file"
        raise problem("convert", source, "a converted upsampler", "an original", do)
    name = "as stored" if dtype is None else np.dtype(dtype).name
    found, _ = locate(file)
    wanted = {_SOURCE: file.source_hash, _DTYPE: name}
    if _is_done(destination, wanted):
        say(f"{destination} holds this conversion already; nothing to do")
        return False
    about = {"network": NAME, _ORIGINAL: json.dumps(file.metadata), **wanted}
    _write(destination, leaves.our_entries(found, dtype), about, "converting")
    say(f"wrote {destination}: {len(found)} parameters")
    return True


def export_upsampler(source: PathLike, path: PathLike, *, say: Say = print) -> str:
    """Write an upsampler as an original file; the inverse of converting.

    Args:
        source: a converted file, or diffusers' folder.
        path: the file; one that is this export already is kept.
        say: takes lines about what was written.

    Returns:
        The hash recorded in the file.

    Raises:
        ValueError: if the source is incomplete, or an original file already, or another
            file has the name.
        OSError: if it cannot be written; nothing is left behind.
    """
    file = open_upsampler(source)
    if not (file.converted or file.path.is_dir()):
        do = "the file has the original key names already"
        raise problem("export", source, "an original file", "a converted one", do)
    if Path(path).resolve() == file.path.resolve():
        raise _occupied(Path(path), "the source itself", "another file")
    entries = leaves.original_entries(*locate(file))
    return exporting.export(path, entries, file.metadata, say=say)


def save_upsampler(
    path: PathLike,
    cfg: UpsamplerConfig,
    params: Tree,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write parameters in memory as an original file.

    Args:
        path: the .safetensors file; replaced if it is there.
        cfg: static.
        params: as `model.upsampler.init` gives them.
        metadata: further text.

    Returns:
        The hash recorded in the file.

    Raises:
        ValueError: for a parameter that has no original name.
        OSError: if it cannot be written; nothing is left behind.
    """
    needed = leaves.sources(NAME, params, tables.UPSAMPLER)
    entries = leaves.original_entries(leaves.from_arrays(params, needed), needed)
    about = io.with_config(embedded_config(cfg), metadata)
    return tensorfile.write(path, entries, about)

"""Adapters as safetensors files with metadata.

Every file is written under a temporary name and renamed, so that a full disk or a kill
leaves either the old file or none.

Source: ltx_trainer/trainer.py: _save_checkpoint (key format); our own metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from idlora_jax import __version__, adapters
from idlora_jax.types import Adapter, Tree
from idlora_jax.weights import lora, lora_files, lora_formats, lora_match
from idlora_jax.weights.lora_names import Format


@dataclass(frozen=True)
class AdapterMeta:
    """What a reader must know to use an adapter as it was trained.

    Attributes:
        generation: "2.0" or "2.3"; empty where a file does not say.
        base_name: file or folder name of the base it was trained on.
        base_hash: content hash of that base.
        rank: largest rank.
        alpha: scale times rank; already folded into the saved b.
        targets: patterns of adapted modules.
        step: optimiser steps.
        numerics: how positions were made.
        reference_gap_s: seconds between the reference's end and time 0.
        video_sees_ref: False if audio-to-video attention was blind to the reference.
        ref_sees_text: False if reference rows were blind to text.
        fps: frames per second of the training clips.
        reference_s: seconds of the longest reference in training; 0 if unknown.
        version: of this library.
        extra: anything else, as strings.
        content_hash: of the tensors, recorded when saved; of the file's bytes where a
            file of others records none.
    """

    generation: str = ""
    base_name: str = ""
    base_hash: str = ""
    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    step: int = 0
    numerics: str = "exact"
    reference_gap_s: float = 0.04
    video_sees_ref: bool = True
    ref_sees_text: bool = True
    fps: float = 25.0
    reference_s: float = 0.0
    version: str = __version__
    extra: dict[str, str] = field(default_factory=dict)
    content_hash: str = ""


def file_hash(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, as hex; of all files' of a folder."""
    path = pathlib.Path(path)
    if path.is_dir():
        inner = "".join(file_hash(p) for p in sorted(path.rglob("*")) if p.is_file())
        return hashlib.sha256(inner.encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """The sha256 of names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    meta: AdapterMeta,
    dtype: Any = None,
    *,
    format: Format = "comfyui",
    text_connector: Adapter | None = None,
) -> AdapterMeta:
    """Write an adapter whose b is already scaled; returns `meta` with its hash.

    Args:
        path: the .safetensors file; for "peft" a folder that is not there yet.
        adapter: see `adapters`.
        meta: written as JSON under the metadata key "idlora".
        dtype: of the saved tensors (default: as they are).
        format: whose key names; see `weights.lora_formats`.
        text_connector: a part for that network, where there is one.

    Raises:
        ValueError: if a kernel's a and b have different ranks.
        OSError: if the file cannot be written; nothing is left behind.
    """
    parts = {"transformer": adapter, "text_connector": text_connector or {}}
    pairs = lora.items(jax.device_get(parts), dtype)
    fields = lora_formats.write(path, pairs, asdict(meta), format)
    return AdapterMeta(**fields)


def content_hash(adapter: Adapter) -> str:
    """What `save_adapter` records of a transformer's adapter, whose b is scaled."""
    pairs = [*lora.items(jax.device_get({"transformer": adapter}))]
    return lora_formats.digest(lora_formats.entries(pairs, "comfyui"))


def read_tensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        ValueError: if the file is missing, truncated or not safetensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a .safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); copy it again"
        ) from None


def _believed(value: Any, default: Any) -> Any:
    """A recorded value as the kind of its default, what fits of it; else None."""
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(v for v in value if isinstance(v, str))
    if isinstance(default, dict) and isinstance(value, dict):
        return {k: v for k, v in value.items() if isinstance(v, str)}
    if isinstance(default, float) and isinstance(value, int | float):
        return float(value) if abs(value) < 1e300 else None  # also false for NaN
    return value if type(value) is type(default) else None


def meta_of(recorded: Mapping[str, Any]) -> AdapterMeta:
    """What a file records, where it is of the right kind; defaults for the rest."""
    defaults = asdict(AdapterMeta())
    found = {name: _believed(recorded.get(name), defaults[name]) for name in defaults}
    return AdapterMeta(**{k: v for k, v in found.items() if v is not None})


def load_adapters(
    path: str | os.PathLike[str],
    bases: Mapping[str, Tree],
    *,
    allow_partial: bool = False,
    verify: bool = False,
) -> tuple[dict[str, Adapter], AdapterMeta]:
    """Read a LoRA file for several networks, and check it against them.

    The part of a network is applied as an adapter of it, or by `adapters.merge`.

    Args:
        path: a .safetensors file, or a PEFT or diffusers folder, in any format that
            `weights.lora_names` lists. Factors (alpha / rank) are folded into b.
        bases: parameters, or their shapes, by network: "transformer" and, for files
            that change it, "text_connector".
        allow_partial: leave out what fits nothing; the keys are in the metadata's
            `extra["left_out"]`. A file of which nothing fits is refused anyway.
        verify: first compare its bytes with the hash recorded in it.

    Returns:
        Adapters by network, of those that the file changes, and the metadata.

    Raises:
        ValueError: if the file is unreadable, or does not fit.
    """
    file = lora_files.open_lora(path)
    if verify:
        lora_files.verify(file)
    try:
        report = lora_match.match(file.tensors.specs, bases)
        lora.require(report, allow_partial)

        def read(pair: lora_match.Pair) -> tuple[np.ndarray, np.ndarray]:
            return lora_files.pair_tensors(file, pair)

        found = lora.stacked(report.pairs, read, bases)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from None
    if not any(np.any(leaf) for leaf in _changes(found)):
        warnings.warn(f"{path}: every lora_B is zero, it changes nothing", stacklevel=3)
    meta = meta_of(file.recorded)
    largest = max(adapters.rank(adapter) for adapter in found.values())
    extra = dict(meta.extra)
    if report.bad:
        extra["left_out"] = json.dumps([*report.bad])
    content = meta.content_hash or file_hash(path)
    meta = replace(meta, rank=meta.rank or largest, extra=extra, content_hash=content)
    return found, meta


def _changes(found: Mapping[str, Adapter]) -> Iterator[Any]:
    for adapter in found.values():
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapter):
            if path[-1].key == "b":
                yield leaf


def load_adapter(
    path: str | os.PathLike[str], base: Tree, *, allow_partial: bool = False
) -> tuple[Adapter, AdapterMeta]:
    """Read a LoRA file of the transformer; see `load_adapters`.

    Raises:
        ValueError: if the file is unreadable, does not fit the base, or has a part for
            another network.
    """
    bases = {"transformer": base}
    found, meta = load_adapters(path, bases, allow_partial=allow_partial)
    return found["transformer"], meta

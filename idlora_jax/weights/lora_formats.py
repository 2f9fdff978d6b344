"""Writing LoRA files so that other tools read them: keys, settings, metadata.

    comfyui    one file, lora_A and lora_B under the original names
    diffusers  one file, diffusers' names; PEFT's settings in the metadata
    peft       a folder with adapter_config.json; the text connector's in a folder in it
    kohya      one file, lora_down, lora_up and alpha

Factors are folded into B. Where a format has an alpha it is the rank, and a rank of its
own is said for every module that has one: a reader that multiplies with alpha / rank
and one that does not get the same change.

Source: peft LoraConfig; diffusers loaders/lora_base.py; kohya-ss networks/lora.py.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from idlora_jax.files import PathLike, problem
from idlora_jax.weights import lora_files, lora_names, tensorfile
from idlora_jax.weights.lora import Item
from idlora_jax.weights.lora_names import Format
from idlora_jax.weights.tensorfile import Entry

_SIDES = {"kohya": ("lora_down", "lora_up")}
_PREFIX = "base_model.model."


def _name(item: Item, format: Format) -> str:
    template = lora_names.spelled(item.module, format)
    if template is None:
        name = lora_names.filled(item.module.original, item.layer)
        raise ValueError(
            f"lora: {format} files have no name for {name} that a reader would know; "
            "write another format (comfyui, diffusers or peft)"
        )
    return lora_names.filled(template, item.layer)


def entries(items: Iterable[Item], format: Format) -> list[Entry]:
    """The tensors of a file, under a format's keys.

    Raises:
        ValueError: for a module that the format has no name for.
    """
    sides = _SIDES.get(format, ("lora_A", "lora_B"))
    out: list[Entry] = []
    for item in items:
        name = _name(item, format)
        for side, spec, get in zip(sides, item.specs, item[3:], strict=True):
            key = f"{name}.{side}.weight"
            out.append(Entry(key, spec, lambda get=get: (get(),)))
        if format == "kohya":
            alpha = np.asarray(item.rank, np.float32)
            out.append(tensorfile.entry(f"{name}.alpha", alpha))
    return out


def peft_settings(items: Iterable[Item]) -> dict[str, Any]:
    """PEFT's settings of one network's pairs: alpha is the rank, for each of them."""
    ranks = {_name(i, "peft").removeprefix(_PREFIX): i.rank for i in items}
    usual = collections.Counter(ranks.values()).most_common(1)[0][0]
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def by_network(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Pairs by the network they change."""
    out: dict[str, list[Item]] = {}
    for item in items:
        out.setdefault(item.module.network, []).append(item)
    return out


def digest(found: Iterable[Entry]) -> str:
    """The sha256 of names, dtypes, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    for entry in sorted(found, key=lambda e: e.name):
        total.update(f"{entry.name} {entry.spec.dtype} {entry.spec.shape}\n".encode())
        for piece in entry.pieces():
            total.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _metadata(items: Sequence[Item], format: Format, fields: Any) -> dict[str, str]:
    out = {"format": "pt", lora_files.OURS: json.dumps(fields)}
    # Where other programs look for it (ltx_pipelines/ic_lora.py).
    factor = fields.get("extra", {}).get(lora_files.DOWNSCALE)
    if factor is not None:
        out[lora_files.DOWNSCALE] = factor
    if format == "diffusers":
        prefixes = {"transformer": "transformer.", "text_connector": "connectors."}
        packed = {
            prefixes[network] + key: value
            for network, group in by_network(items).items()
            for key, value in peft_settings(group).items()
        }
        out[lora_files.THEIRS] = json.dumps(packed, sort_keys=True)
    return out


def write(
    path: PathLike,
    items: Iterable[Item],
    fields: Mapping[str, Any],
    format: Format = "comfyui",
) -> dict[str, Any]:
    """Write pairs; memory holds one tensor.

    Args:
        path: the .safetensors file; for "peft" a folder that is not there yet.
        items: the pairs.
        fields: recorded in the metadata; "content_hash" is added.
        format: whose names and settings.

    Returns:
        The fields with the hash.

    Raises:
        ValueError: for a module that the format has no name for, or no pairs at all.
        OSError: if it cannot be written; nothing is left behind.
    """
    found = list(items)
    if not found:
        raise ValueError(f"lora: {path}: got an adapter of no modules, expected some")
    recorded = {**fields, "content_hash": digest(entries(found, format))}
    if format != "peft":
        text = _metadata(found, format, recorded)
        tensorfile.write(path, entries(found, format), text)
        return recorded
    folder = Path(path)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    if folder.exists():
        do = "remove it, or choose another name"
        raise problem("lora", folder, "something that exists", "a new folder", do)
    try:
        groups = by_network(found)
        for network, group in groups.items():
            second = network == "text_connector" and len(groups) > 1
            inside = lora_files.CONNECTORS if second else ""
            _write_peft(temporary / inside, group, recorded)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return recorded


def _write_peft(folder: Path, items: Sequence[Item], fields: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": fields.get("base_name") or None,
        **peft_settings(items),
    }
    text = json.dumps(about, indent=2) + "\n"
    (folder / lora_files.CONFIG).write_text(text, "utf-8")
    path = folder / lora_files.WEIGHTS[0]
    tensorfile.write(path, entries(items, "peft"), _metadata(items, "peft", fields))

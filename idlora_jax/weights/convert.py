"""Original file <-> converted folder, piece by piece.

The folder has config.json (the embedded one), a .safetensors file per network (stacked
parameters under our paths), and manifest.json, written last. It is made under a
temporary name and renamed, so that it is complete or absent. Memory holds one layer of
one tensor.

A converted base keeps the hash of its source, so that an adapter trained on either form
knows its base.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from idlora_jax import __version__
from idlora_jax.files import PathLike, problem
from idlora_jax.weights import io, leaves, tensorfile
from idlora_jax.weights.io import BaseFile

Say = Callable[[str], None]


def _refuse_occupied(destination: Path) -> None:
    if destination.exists() and (
        not destination.is_dir() or any(destination.iterdir())
    ):
        got, hint = "something else", "choose another folder, or remove this one"
        raise problem("convert", destination, got, "a new folder", hint)


def _is_done(source: BaseFile, destination: Path, dtype: str, names: Any) -> bool:
    """Whether the destination is this conversion; another one's is an error."""
    if not (destination / io.MANIFEST).is_file():
        _refuse_occupied(destination)
        return False
    manifest = json.loads((destination / io.MANIFEST).read_text("utf-8"))
    wanted = {"base_hash": source.base_hash, "dtype": dtype, "networks": [*names]}
    held = {key: manifest.get(key) for key in wanted}
    held["networks"] = [*manifest.get("networks", ())]
    if held != wanted:
        got, hint = f"a conversion with {held}", "choose another folder, or remove this"
        raise problem("convert", destination, got, f"{wanted}", hint)
    return True


def _chosen(base: BaseFile, networks: Sequence[str] | None) -> tuple[str, ...]:
    held = io.names_in(base)
    absent = [name for name in networks or () if name not in held]
    if absent:
        raise ValueError(f"{base.path}: got networks {[*held]}, expected also {absent}")
    return tuple(n for n in held if networks is None or n in networks)


def _write_folder(
    base: BaseFile, folder: Path, names: Sequence[str], dtype: Any | None, say: Say
) -> None:
    located = {name: io.locate(base, name)[0] for name in names}
    hashes = {}
    for name, found in located.items():
        say(f"converting {name}: {len(found)} parameters")
        entries = leaves.our_entries(found, dtype)
        path = folder / f"{name}.safetensors"
        hashes[name] = tensorfile.write(path, entries, {"network": name})
    manifest = {
        "generation": base.generation,
        "base_hash": base.base_hash,
        "version": __version__,
        "source": base.path.name,
        "dtype": _dtype_name(dtype),
        "networks": hashes,
        "metadata": base.metadata,
    }
    for name, content in ((io.CONFIG, base.config), (io.MANIFEST, manifest)):
        text = json.dumps(content, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _dtype_name(dtype: Any | None) -> str:
    return "as stored" if dtype is None else np.dtype(dtype).name


def convert_base(
    source: PathLike,
    destination: PathLike,
    dtype: Any | None = None,
    *,
    networks: Sequence[str] | None = None,
    say: Say = print,
) -> bool:
    """Convert an original single file to our folder.

    Args:
        source: an original LTX-2 .safetensors file.
        destination: the folder to be made.
        dtype: of the parameters (default: as stored, so that `export_base` gives back
            the same tensors). Tables stored in float32 stay so.
        networks: names of `io.NETWORKS` (default: all that the file holds).
        say: takes lines about the progress.

    Returns:
        False if the destination was complete already and nothing was done.

    Raises:
        ValueError: if the source is incomplete or unreadable, or the destination holds
            something else.
        OSError: if it cannot be written; nothing is left behind.
    """
    base, folder = io.open_base(source), Path(destination)
    if base.converted:
        hint = "give the original .safetensors file"
        raise problem("convert", source, "a converted folder", "a file", hint)
    names = _chosen(base, networks)
    if _is_done(base, folder, _dtype_name(dtype), names):
        say(f"{folder} holds this conversion already; nothing to do")
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        _write_folder(base, temporary, names, dtype, say)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"wrote {folder}")
    return True


def export_base(folder: PathLike, path: PathLike, *, say: Say = print) -> str:
    """Write a converted folder as an original single file; the inverse of converting.

    Returns:
        The hash recorded in the file.

    Raises:
        ValueError: if the folder is no complete converted base.
        OSError: if it cannot be written; nothing is left behind.
    """
    base = io.open_base(folder)
    if not base.converted:
        hint = "the file has the original key names already"
        raise problem("export", folder, "an original file", "a converted folder", hint)
    entries: list[tensorfile.Entry] = []
    for name in io.names_in(base):
        entries += leaves.original_entries(*io.locate(base, name))
    digest = tensorfile.write(path, entries, io.with_config(base.config, base.metadata))
    say(f"wrote {path}: {len(entries)} tensors")
    return digest

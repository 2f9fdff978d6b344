"""Original file <-> converted folder, piece by piece.

The folder has config.json (the embedded one), each network as one or several
.safetensors files (stacked parameters under our paths), and manifest.json: where it
comes from, its files and their hashes. Memory holds one layer of one tensor. See
`shards` for what happens when a conversion is stopped.

A converted base keeps the hash of its source, so that an adapter trained on either
form knows its base. What the stacks cannot say (a layer of another dtype than its
neighbours') is in the manifest, so that `export_base` gives every bit back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from idlora_jax import __version__
from idlora_jax.files import PathLike, problem
from idlora_jax.weights import (
    bases,
    exporting,
    fp8_files,
    io,
    leaves,
    shards,
    tensorfile,
)
from idlora_jax.weights.bases import BaseFile
from idlora_jax.weights.fp8 import FLOAT8, Choice, require_choice, stored
from idlora_jax.weights.progress import bar

Say = Callable[[str], Any]
Located = dict[str, tuple[dict[str, leaves.Leaf], dict[str, leaves.Source]]]


def _is_done(base: BaseFile, folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the destination is this conversion; another one's is an error."""
    if not (folder / bases.MANIFEST).is_file():
        shards.refuse_occupied(folder)
        return False
    manifest = bases.read_manifest(folder)
    held = {key: manifest.get(key) for key in wanted}
    held["networks"] = [*manifest.get("networks", ())]
    if held != wanted:
        got, hint = f"a conversion with {held}", "choose another folder, or remove this"
        raise problem("convert", folder, got, f"{wanted}", hint)
    return True


def _require_owners(base: BaseFile) -> None:
    lost = io.unowned(base)
    if lost:
        more = " ..." if len(lost) > 6 else ""
        got = f"{len(lost)} tensors that belong to no network: {lost[:6]}{more}"
        hint = "name the networks to convert (--networks) to leave these out"
        raise problem("convert", base.path, got, "an LTX-2 checkpoint's", hint)


def _mixed(base: BaseFile, located: Located) -> dict[str, str]:
    """Keys whose dtype is not the one that their stack is stored in."""
    specs = bases.original_specs(base)
    return {
        key: tensorfile.NAMES[specs[key].dtype]
        for found, needed in located.values()
        for path, source in needed.items()
        for key in source.keys
        if specs[key].dtype not in (found[path].spec.dtype, *FLOAT8)
    }


_SAID: Mapping[Choice, str] = {
    "keep": "",
    "upcast": ", 8 bits up-cast",
    "int8": ", blocks in int8",
}


def _dtype_name(dtype: Any | None, weights: Choice) -> str:
    name = "as stored" if dtype is None else np.dtype(dtype).name
    return name + _SAID[weights]


def _text(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def _texts(
    base: BaseFile, located: Located, dtype: Any | None, weights: Choice
) -> Callable[[shards.Hashes], Mapping[str, str]]:
    metadata = dict(base.metadata)
    if weights != "keep":
        metadata.pop(fp8_files.METADATA, None)
    about = {
        "format": bases.FORMAT,
        "generation": base.generation,
        "base_hash": base.base_hash,
        "version": __version__,
        "source": base.path.name,
        "dtype": _dtype_name(dtype, weights),
        "metadata": metadata,
        "mixed": {} if dtype else _mixed(base, located),
    }
    return lambda hashes: {
        bases.CONFIG: _text(base.config),
        bases.MANIFEST: _text(about | {"networks": hashes}),
    }


def _entries(
    name: str, found: Mapping[str, leaves.Leaf], dtype: Any | None, weights: Choice
) -> list[tensorfile.Entry]:
    fp8_files.check_scales(found)
    other = weights == "int8" and name != "transformer"
    choice: Choice = "upcast" if other else weights
    return leaves.our_entries(stored(found, choice, dtype), dtype)


def convert_base(
    source: PathLike,
    destination: PathLike,
    dtype: Any | None = None,
    *,
    networks: Sequence[str] | None = None,
    weights: Choice = "keep",
    say: Say = print,
    limit: int = shards.LIMIT,
) -> bool:
    """Convert an original checkpoint to our folder.

    Args:
        source: an original LTX-2 .safetensors file.
        destination: the folder to be made.
        dtype: of the parameters (default: as stored, so that `export_base` gives back
            the same tensors). Tables stored in float32 stay so.
        networks: names of `io.NETWORKS` (default: all that the file holds).
        weights: of parameters that the file holds in 8 bits: "keep" writes them as they
            are, "upcast" multiplies them by their scales. "int8" writes all kernels of
            the transformer's blocks so.
        say: takes lines about the progress.
        limit: bytes of a file, unless one parameter is larger.

    Returns:
        False if the destination was complete already and nothing was done.

    Raises:
        ValueError: if the source is incomplete or unreadable, the destination holds
            something else, or the disk has no room.
        OSError: if it cannot be written; finished files stay, the same call goes on.
    """
    base, folder = io.open_base(source), Path(destination)
    if base.converted:
        hint = "give the original .safetensors file"
        raise problem("convert", source, "a converted folder", "a file", hint)
    names = io.chosen(base, networks)
    require_choice(weights)
    plan = {"base_hash": base.base_hash, "dtype": _dtype_name(dtype, weights)}
    if _is_done(base, folder, plan | {"networks": [*names]}):
        say(f"{folder} holds this conversion already; nothing to do")
        return False
    if networks is None:
        _require_owners(base)
    located = {name: io.locate(base, name) for name in names}
    entries = {
        n: _entries(n, found, dtype, weights) for n, (found, _) in located.items()
    }
    total = sum(entry.spec.nbytes for group in entries.values() for entry in group)
    say(f"converting {', '.join(names)}: {total / 1e9:.2f} GB")
    stat = base.path.stat()
    plan |= {"source": [str(base.path.resolve()), stat.st_size, stat.st_mtime_ns]}
    with bar(total, "converting") as progress:
        shards.write_folder(
            folder,
            entries,
            plan=plan,
            texts=_texts(base, located, dtype, weights),
            limit=limit,
            progress=progress,
            say=say,
        )
    say(f"wrote {folder}")
    return True


def export_base(folder: PathLike, path: PathLike, *, say: Say = print) -> str:
    """Write a converted folder as an original single file; the inverse of converting.

    Returns:
        The hash recorded in the file. A file that is this export already is kept.

    Raises:
        ValueError: if the folder is no complete converted base, another file has the
            name, or the disk has no room.
        OSError: if it cannot be written; nothing is left behind.
    """
    base = io.open_base(folder)
    if not base.converted:
        hint = "the file has the original key names already"
        raise problem("export", folder, "an original file", "a converted folder", hint)
    mixed = bases.read_manifest(base.path).get("mixed", {})
    entries: list[tensorfile.Entry] = []
    for name in io.names_in(base):
        entries += fp8_files.original_entries(*io.locate(base, name))
    entries = [_narrowed(entry, mixed.get(entry.name)) for entry in entries]
    about = io.with_config(base.config, base.metadata)
    return exporting.export(path, entries, about, say=say)


def _narrowed(entry: tensorfile.Entry, name: str | None) -> tensorfile.Entry:
    """The tensor in the dtype that its original had."""
    if name is None:
        return entry
    dtype = tensorfile.DTYPES[name]
    spec = entry.spec._replace(dtype=dtype)
    return entry._replace(
        spec=spec, pieces=lambda: (piece.astype(dtype) for piece in entry.pieces())
    )

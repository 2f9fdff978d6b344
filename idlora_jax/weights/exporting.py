"""Writing a single file under original names, once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from idlora_jax.files import PathLike, problem
from idlora_jax.weights import shards, tensorfile
from idlora_jax.weights.progress import bar
from idlora_jax.weights.tensorfile import HASH, Entry

PROBES = 32
"""Tensors whose bits are compared to recognise an export."""


def _is_this(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> bool:
    """Whether a file is this export: names, shapes, dtypes, metadata, some tensors."""
    head, tensors = tensorfile.header(path), tensorfile.tensors_of(path)
    held = {k: v for k, v in head.metadata.items() if k != HASH}
    same = held == dict(metadata) and head.tensors == {e.name: e.spec for e in entries}
    for entry in entries[:: max(1, len(entries) // PROBES)] if same else ():
        want = np.concatenate([np.ravel(piece) for piece in entry.pieces()])
        same &= tensors.tensor(entry.name).tobytes() == want.tobytes()
    return same


def export(
    path: PathLike,
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    *,
    say: Callable[[str], Any] = print,
) -> str:
    """Write a file, unless it is there already.

    Args:
        path: the .safetensors file.
        entries: its tensors.
        metadata: its text.
        say: takes a line about what was done.

    Returns:
        The hash recorded in the file; "" where an equal one of others records none.

    Raises:
        ValueError: if another file has this name, or the disk has no room.
        OSError: if it cannot be written; nothing is left behind.
    """
    path = Path(path)
    if path.exists():
        if not _is_this(path, entries, metadata):
            got, hint = "another file", "choose another name, or remove this one"
            raise problem("export", path, got, "a new file", hint)
        say(f"{path} holds this export already; nothing to do")
        return tensorfile.header(path).metadata.get(HASH, "")
    total = sum(entry.spec.nbytes for entry in entries)
    shards.require_space(path.absolute().parent, total)
    with bar(total, "exporting") as progress:
        told = [shards.counted(entry, progress) for entry in entries]
        digest = tensorfile.write(path, told, metadata)
    say(f"wrote {path}: {len(entries)} tensors")
    return digest

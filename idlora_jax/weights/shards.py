"""A folder of safetensors shards, written so that it can be stopped and gone on with.

The folder grows beside its destination, under the hidden name `.NAME.partial`: one
file after the other, each complete under its name or absent, and `plan.json`, which
says what is being made. The same call after a kill or a full disk keeps the files that
are there. The last step renames the folder: the destination is complete or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idlora_jax.files import PathLike, problem
from idlora_jax.weights import tensorfile
from idlora_jax.weights.progress import Progress, silent
from idlora_jax.weights.tensorfile import Entry

try:
    import fcntl
except ImportError:  # not on Windows: there, nothing keeps two runs apart
    fcntl = None

LIMIT = 5_000_000_000
"""Bytes of a shard, unless one tensor alone is larger."""

_PLAN, _LOCK = "plan.json", ".lock"
_SPARE = 16_000_000
Hashes = dict[str, dict[str, str]]
"""Recorded hash of each file, by stem and file name."""


class Shard(NamedTuple):
    """A file to be written, and the network it is of."""

    stem: str
    name: str
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.spec.nbytes for entry in self.entries)


def split(stem: str, entries: Sequence[Entry], limit: int = LIMIT) -> tuple[Shard, ...]:
    """Cut tensors into files, in the order of their names.

    Args:
        stem: of the files' names: STEM.safetensors, or STEM-00001-of-00003.safetensors.
        entries: the tensors; each stands whole in one file.
        limit: bytes of a file, exceeded by a tensor that is larger.
    """
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in sorted(entries, key=lambda e: e.name):
        if groups[-1] and size + entry.spec.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.spec.nbytes
    if len(groups) == 1:
        return (Shard(stem, f"{stem}.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(stem, f"{stem}-{n:05}-of-{len(groups):05}.safetensors", tuple(group))
        for n, group in enumerate(groups, 1)
    )


def counted(entry: Entry, progress: Progress) -> Entry:
    """The same tensor; its bytes are told as they are written."""

    def pieces() -> Iterator[np.ndarray]:
        for piece in entry.pieces():
            yield piece
            progress(piece.nbytes)

    return entry._replace(pieces=pieces)


def _recorded(path: Path, shard: Shard) -> str | None:
    """The hash of a shard that an earlier run finished, or None."""
    if not path.is_file():
        return None
    found = tensorfile.header(path)
    wanted = {entry.name: entry.spec for entry in shard.entries}
    return found.metadata.get(tensorfile.HASH) if found.tensors == wanted else None


def require_space(folder: Path, needed: int) -> None:
    """Raise a ValueError unless the disk has room; a missing folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        got, expected = f"{free / 1e9:.2f} GB free", f"{needed / 1e9:.2f} GB"
        do = "free some space, or choose a folder on another disk"
        raise problem("convert", folder, got, expected, do)


def _held(folder: Path) -> Any:
    try:
        return json.loads((folder / _PLAN).read_text("utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time; the lock ends with the process, however it ends."""
    with open(folder / _LOCK, "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            got, do = "another run that writes here", "wait for it, or stop it"
            raise problem("convert", folder, got, "none", do) from None
        yield


def refuse_occupied(destination: Path) -> None:
    """Raise unless the destination is absent or an empty folder."""
    if destination.exists() and (
        not destination.is_dir() or any(destination.iterdir())
    ):
        got, do = "something else", "choose another folder, or remove this one"
        raise problem("convert", destination, got, "a new folder", do)


def partial(destination: Path) -> Path:
    """Where a folder grows."""
    return destination.with_name(f".{destination.name}.partial")


def _begin(folder: Path, plan: Any) -> None:
    """Empty the folder unless it was begun with the same plan."""
    if _held(folder) == plan:
        return
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / _PLAN).write_text(json.dumps(plan), encoding="utf-8")


def _write(
    folder: Path, shards: Sequence[Shard], progress: Progress, say: Callable[..., Any]
) -> Hashes:
    known = {shard.name: _recorded(folder / shard.name, shard) for shard in shards}
    if any(known.values()):
        count = sum(digest is not None for digest in known.values())
        say(f"going on: {count} of {len(shards)} files are there already")
    todo = sum(shard.nbytes for shard in shards if not known[shard.name])
    require_space(folder, todo)
    hashes: Hashes = {}
    for shard in shards:
        digest = known[shard.name]
        if digest is None:
            entries = [counted(entry, progress) for entry in shard.entries]
            path, about = folder / shard.name, {"network": shard.stem}
            digest = tensorfile.write(path, entries, about)
        else:
            progress(shard.nbytes)
        hashes.setdefault(shard.stem, {})[shard.name] = digest
    return hashes


def _keep_or_remove(folder: Path, say: Callable[[str], Any]) -> None:
    """After a failure: finished files stay, for the next run to go on with."""
    done = sorted(folder.glob("*.safetensors"))
    if done:
        say(f"{len(done)} finished files stay in {folder}; run again to go on")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def write_folder(
    destination: PathLike,
    networks: Mapping[str, Sequence[Entry]],
    *,
    plan: Mapping[str, Any],
    texts: Callable[[Hashes], Mapping[str, str]],
    limit: int = LIMIT,
    progress: Progress = silent,
    say: Callable[[str], Any] = print,
) -> Hashes:
    """Write networks as shards, and texts beside them, into a new folder.

    Args:
        destination: the folder; absent or empty.
        networks: the tensors of each, by the stem of their files' names.
        plan: what is being made, as JSON; a folder begun with the same is gone on with.
        texts: further files by name, made from the shards' hashes.
        limit: bytes of a shard.
        progress: takes bytes done, in all the size of the tensors.
        say: takes lines about what is found.

    Returns:
        The recorded hash of each shard.

    Raises:
        ValueError: if the destination is occupied, another run writes it, or the disk
            has no room; nothing is written then.
        OSError: if it cannot be written; finished files stay for the next run.
    """
    folder = Path(destination)
    refuse_occupied(folder)
    growing = partial(folder)
    growing.mkdir(parents=True, exist_ok=True)
    shards = [s for stem, e in networks.items() for s in split(stem, e, limit)]
    agreed = json.loads(json.dumps({**plan, "files": [s.name for s in shards]}))
    with locked(growing):
        try:
            _begin(growing, agreed)
            hashes = _write(growing, shards, progress, say)
            for name, text in texts(hashes).items():
                (growing / name).write_text(text, encoding="utf-8")
        except BaseException:
            _keep_or_remove(growing, say)
            raise
        for name in (_PLAN, _LOCK):
            (growing / name).unlink()
        os.replace(growing, folder)
    return hashes

"""Published data sets to be converted: folders, or archives that hold the folders.

Both give their files one after the other (`scan`), and clips joined from the files of
all folders (`joined`). Archives are streams: each folder has its own, and their orders
may differ. `joined` follows the largest folder's order; of the others it takes in what
the next clips need, as much as fits into `window` bytes, going round a stream until it
has all of it. Where the orders agree every archive is read once.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from idlora_jax.data import archives, published
from idlora_jax.data.published import Names
from idlora_jax.data.stored import FOLDERS, VIDEO, File, Files
from idlora_jax.weights import torch_file

Progress = Callable[[int], object]
WINDOW = 1 << 29


class Place(NamedTuple):
    """Size of a file, and the archive it lies in."""

    nbytes: int
    archive: str = ""


Places = Mapping[tuple[str, str], Place]
"""Files by (folder, name), in the order of `scan`."""


class Item(NamedTuple):
    """A file of a source; `read` can be called until the next one is asked for."""

    folder: str
    name: str
    nbytes: int
    read: Callable[[], File]
    archive: str = ""


Joined = Iterator[tuple[str, Files]]


@dataclass(frozen=True)
class Folder:
    """A folder of the published layout.

    Attributes:
        root: the folder.
        paths: its files by folder of the layout and name.
    """

    root: Path
    paths: Mapping[str, Mapping[str, Path]]

    @property
    def nbytes(self) -> int:
        """Bytes to be read by `scan`."""
        return sum(p.stat().st_size for f in self.paths.values() for p in f.values())

    def state(self) -> list[Any]:
        """What changes when a file does."""
        return [
            [folder, name, (stat := path.stat()).st_size, stat.st_mtime_ns]
            for folder, found in sorted(self.paths.items())
            for name, path in sorted(found.items())
        ]

    def scan(self, progress: Progress) -> Iterator[Item]:
        """Every file."""
        for folder, found in self.paths.items():
            for name, path in found.items():
                size = path.stat().st_size
                yield Item(folder, name, size, functools.partial(published.read, path))
                progress(size)

    def joined(self, clips: Sequence[str], names: Names, places: Places) -> Joined:
        """What the files of each clip hold, in the order of `clips`."""
        del places
        for clip in clips:
            yield (
                clip,
                {f: published.read(self.paths[f][names[f][clip]]) for f in names},
            )

    def ordered(self, clips: Sequence[str], names: Names, places: Places) -> list[str]:
        """The order in which `joined` reads fastest."""
        del names, places
        return sorted(clips)


class _Packed(NamedTuple):
    """A `.pt` file of an archive."""

    name: str
    nbytes: int
    read: Callable[[], bytes]


def _placed(archive: Path, path: str) -> tuple[str, str] | None:
    """Which folder and name a member is; an archive may be named after its folder."""
    at = published.split_path(path)
    if at is None and path.endswith(published.SUFFIXES):
        kinds = [kind for kind in published.KINDS if archive.name.startswith(kind)]
        if kinds and not path.rpartition("/")[2].startswith("."):
            kind = published.KINDS[max(kinds, key=len)]
            return kind, published.without_suffix(path)
    return at


def _parsed(data: bytes, where: str) -> File:
    return published.checked(torch_file.parse(io.BytesIO(data), where), where)


@dataclass(frozen=True)
class Archives:
    """Tar archives that together hold the folders of the published layout.

    Attributes:
        root: where they lie.
        paths: the archives.
        window: bytes that `joined` holds in memory.
    """

    root: Path
    paths: tuple[Path, ...]
    window: int = WINDOW

    @property
    def nbytes(self) -> int:
        """Bytes to be read by `scan`."""
        return sum(path.stat().st_size for path in self.paths)

    def state(self) -> list[Any]:
        """What changes when an archive does."""
        stats = ((path.name, path.stat()) for path in self.paths)
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def scan(self, progress: Progress) -> Iterator[Item]:
        """Every `.pt` file; for an archive that is damaged, one that tells so."""
        for path in self.paths:
            try:
                for member in archives.members(path, progress):
                    at = _placed(path, member.path)
                    if at is not None and at[0] in FOLDERS:
                        read = _reader(path, member)
                        yield Item(*at, member.nbytes, read, path.name)
            except ValueError as error:
                yield Item("archives", path.name, 0, _raiser(str(error)))

    def _folder(self, folder: str, holding: Collection[str]) -> Iterator[_Packed]:
        for path in (path for path in self.paths if path.name in holding):
            for member in archives.members(path):
                at = _placed(path, member.path)
                if at is not None and at[0] == folder:
                    yield _Packed(at[1], member.nbytes, member.read)

    def ordered(self, clips: Sequence[str], names: Names, places: Places) -> list[str]:
        """The order in which `joined` reads fastest: that of the largest folder."""
        leading = _largest(names, places)
        order = {at: n for n, at in enumerate(places)}
        return sorted(clips, key=lambda clip: order[leading, names[leading][clip]])

    def joined(self, clips: Sequence[str], names: Names, places: Places) -> Joined:
        """What the files of each clip hold, in the order of `clips`.

        Args:
            clips: ordered by `ordered`, or a later part of that.
            names: of the clips' files.
            places: of all files of the source.
        """
        leading = _largest(names, places)
        others = [folder for folder in names if folder != leading]

        def stream(folder: str) -> Callable[[Sequence[str]], dict[str, bytes]]:
            holding = {p.archive for (f, _), p in places.items() if f == folder}
            return _round(functools.partial(self._folder, folder, holding))

        def size(clip: str) -> int:
            return sum(places[f, names[f][clip]].nbytes for f in others)

        taking = {folder: stream(folder) for folder in names}

        for group in grouped(clips, size, self.window):
            held = {f: taking[f]([names[f][c] for c in group]) for f in others}
            for clip in group:
                held[leading] = taking[leading]([names[leading][clip]])
                packed = {f: held[f].pop(names[f][clip]) for f in names}
                yield clip, {f: _parsed(d, f"{f}/{clip}") for f, d in packed.items()}


def _reader(archive: Path, member: archives.Member) -> Callable[[], File]:
    return lambda: _parsed(member.read(), f"{archive.name}: {member.path}")


def _raiser(said: str) -> Callable[[], File]:
    def read() -> File:
        raise ValueError(said)

    return read


def _largest(names: Names, places: Places) -> str:
    """The folder with most bytes."""

    def size(folder: str) -> int:
        return sum(places[folder, name].nbytes for name in names[folder].values())

    return max(names, key=size)


def grouped(
    items: Sequence[str], size: Callable[[str], int], limit: int
) -> Iterator[list[str]]:
    """Cut a sequence into groups of at most `limit` bytes, or of one item."""
    group, held = [], 0
    for item in items:
        if group and held + size(item) > limit:
            yield group
            group, held = [], 0
        group.append(item)
        held += size(item)
    if group:
        yield group


def _round(
    start: Callable[[], Iterator[_Packed]],
) -> Callable[[Sequence[str]], dict[str, bytes]]:
    """What takes files from a stream, wherever it stands, and goes round at its end."""
    stream = start()

    def take(names: Sequence[str]) -> dict[str, bytes]:
        nonlocal stream
        wanted, found = set(names), {}
        for _ in range(2):
            for packed in stream:
                if packed.name in wanted and packed.name not in found:
                    found[packed.name] = packed.read()
                if len(found) == len(wanted):
                    return found
            stream = start()
        gone = sorted(wanted - set(found))
        raise ValueError(f"data: {gone} vanished from an archive")

    return take


def open_source(path: Path, *, window: int = WINDOW) -> Folder | Archives:
    """Find out what a path holds.

    Args:
        path: a folder of the published layout, an archive, or a folder of archives.
        window: see `Archives`.

    Raises:
        ValueError: if it holds neither.
    """
    if path.is_file() and path.name.endswith(archives.SUFFIXES):
        return Archives(path.parent, (path,), window)
    root = published.root_of(path)
    listed = published.listed(root)
    if listed:
        return Folder(root, {f: listed[f] for f in FOLDERS if f in listed})
    packed = (p for p in sorted(path.rglob("*")) if p.name.endswith(archives.SUFFIXES))
    paths = tuple(p for p in packed if p.is_file())
    if not paths:
        raise ValueError(
            f"data: {path} holds no folder {VIDEO}/ with .pt or .safetensors files and "
            "no .tar or .tar.zst archive; give the folder that does"
        )
    names = [packed.name for packed in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"data: {path} holds two archives of one name: {names}")
    return Archives(root, paths, window)

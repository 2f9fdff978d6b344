"""Tar archives read as streams: nothing is unpacked to disk, no path is ever opened.

    latents.tar.zst  ->  (member's path, size, a function that reads it), one by one

Headers are taken apart here, because a reader of archives from elsewhere should be told
less than `tarfile` tells: only regular files and folders may stand in them, with
relative paths that stay below. Links, devices and sparse files are refused, and so are
long names or notes of more than a page. Memory: one member, and the window of zstd.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from idlora_jax.files import existing, problem

SUFFIXES = (".tar", ".tar.zst")
LARGEST = 1 << 30
"""Bytes of a member at most; a clip's text features have 20 MB."""
_BLOCK, _LONGEST_NOTE, _PIECE = 512, 1 << 16, 1 << 20
_EXPECTED = "a .tar or .tar.zst archive of regular files"
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_NOTES = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


class Member(NamedTuple):
    """A file in an archive; `read` can be called until the next one is asked for."""

    path: str
    nbytes: int
    read: Callable[[], bytes]


class _Stream(NamedTuple):
    file: Any
    errors: tuple[type[Exception], ...]

    def piece(self, count: int) -> bytes:
        """Some of the next bytes, at least one."""
        try:
            found = self.file.read(min(count, _PIECE))
        except self.errors as error:
            raise ValueError(f"damaged or unusual zstd data ({error})") from None
        if not found:
            raise ValueError("a truncated archive")
        return found

    def exactly(self, count: int) -> bytes:
        """The next bytes, all of them."""
        out = io.BytesIO()
        while (missing := count - out.tell()) > 0:
            out.write(self.piece(missing))
        return out.getvalue()

    def skip(self, count: int) -> None:
        while count > 0:
            count -= len(self.piece(count))


def _padding(size: int) -> int:
    return -size % _BLOCK


def _noted_path(kind: bytes, data: bytes) -> str | None:
    """The path of the next member that a long-name or pax entry gives."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode()
    found = None
    while data and kind == tarfile.XHDTYPE:
        length, _, _ = data.partition(b" ")
        record, data = data[: int(length)], data[max(int(length), 1) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        if key.startswith(b"GNU.sparse") or key in (b"size", b"linkpath"):
            raise ValueError(f"a member with the note {key.decode()!r}")
        if key == b"path":
            found = value.decode()
    return found


def safe(path: str) -> str:
    """A member's path without a leading `./`.

    Raises:
        ValueError: if it leads out of the folder it would be unpacked to.
    """
    parts = PurePosixPath(path).parts
    drive = bool(parts) and parts[0].endswith(":")
    if path.startswith("/") or ".." in parts or "\\" in path or "\0" in path or drive:
        raise ValueError(f"a member whose path leads elsewhere: {path!r:.120}")
    return "/".join(parts)


def _header(stream: _Stream) -> tarfile.TarInfo | None:
    """The next header; None at the end of the archive."""
    block = stream.exactly(_BLOCK)
    if not block.strip(b"\0"):
        return None
    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    if info.size < 0 or info.size > LARGEST:
        raise ValueError(f"a member of {info.size:,} bytes, more than {LARGEST:,}")
    return info


def _members(stream: _Stream) -> Iterator[Member]:
    noted = None
    while (info := _header(stream)) is not None:
        left = info.size
        if info.type in _NOTES:
            if info.size > _LONGEST_NOTE:
                raise ValueError(f"a note of {info.size:,} bytes")
            noted = _noted_path(info.type, stream.exactly(info.size)) or noted
            left = 0
        elif info.type in _FILES:
            done: list[int] = []

            def read(size: int = info.size, done: list[int] = done) -> bytes:
                done.append(size)
                return stream.exactly(size)

            yield Member(safe(noted or info.name), info.size, read)
            noted, left = None, info.size - sum(done)
        elif info.type == tarfile.DIRTYPE:
            noted = None
        else:
            name = noted or info.name
            raise ValueError(f"a link, device or sparse file: {name!r:.120}")
        stream.skip(left + _padding(info.size))


def _opened(path: Path, file: Any) -> _Stream:
    if path.suffix != ".zst":
        return _Stream(file, ())
    import zstandard

    reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return _Stream(reader, (zstandard.ZstdError,))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give errors the archive's name and say what to do."""
    try:
        yield
    except (ValueError, tarfile.TarError) as error:
        hint = "download it again, or unpack it yourself and give the folder"
        raise problem("archive", path, str(error), _EXPECTED, hint) from None


def members(
    path: Path, progress: Callable[[int], object] = lambda done: None
) -> Iterator[Member]:
    """The regular files of an archive, in its order.

    Args:
        path: a .tar or .tar.zst file.
        progress: is told the bytes of the file that were taken in since the last call.

    Raises:
        ValueError: if it is missing, damaged, truncated, or holds anything that is
            neither file nor folder or leads elsewhere.
    """
    with open(existing("archive", path, _EXPECTED), "rb") as file:
        told = 0
        found = _members(_opened(path, file))
        while True:
            with _named(path):
                member = next(found, None)
            if member is None:
                break
            yield member._replace(read=_named(path)(member.read))
            progress(file.tell() - told)
            told = file.tell()
        progress(path.stat().st_size - told)

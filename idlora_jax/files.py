"""Opening and replacing files: one clear error in, nothing half-written out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import av.container
import av.error

PathLike = str | os.PathLike[str]

# Tags in unknown encodings must not keep a file from opening; PyAV 19 needs no option.
_OLD = int(av.__version__.partition(".")[0]) < 19
_LENIENT: dict[str, Any] = {"metadata_errors": "replace"} if _OLD else {}


def problem(name: str, path: PathLike, got: str, expected: str, do: str) -> ValueError:
    """The error of function `name` about a file: one line, to be raised."""
    return ValueError(f"{name}: {path}: got {got}, expected {expected}; {do}")


def existing(name: str, path: PathLike, expected: str) -> str:
    """The absolute path of a file that is there.

    Raises:
        ValueError: if it is missing, or is no file.
    """
    if os.path.isfile(path):
        return os.path.abspath(path)
    got = "a folder" if os.path.isdir(path) else "no such file"
    raise problem(name, path, got, expected, "check the path")


def user_cache() -> Path | None:
    """Our folder in the user's cache folder; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # As the XDG specification wants it, a relative path counts as none.
        folder = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "idlora_jax"


@contextlib.contextmanager
def opened(
    name: str, path: PathLike, expected: str
) -> Iterator[av.container.InputContainer]:
    """Open a media file for reading; opening and decoding errors become ValueErrors."""
    full = existing(name, path, expected)
    try:
        with av.open(full, **_LENIENT) as container:
            yield container
    except av.error.FFmpegError as error:
        got = f"a damaged, truncated or unknown file ({error.strerror})"
        do = "check that it plays, or convert it again"
        raise problem(name, path, got, expected, do) from error


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """Yield a temporary name in the same folder; it replaces `path` on success.

    A reader sees the old file or the whole new one. After an error the temporary file
    is gone and an older `path` is untouched. Missing folders are made.

    Raises:
        OSError: if it cannot be written (disk full, no permission, ...).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = f"could not write {path} ({error.strerror or error})"
        do = "free some disk space or choose another folder; nothing was left behind"
        raise OSError(error.errno, f"{reason}; {do}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

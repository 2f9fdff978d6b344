"""Why a clip cannot be used: a few kinds to be counted, and one sentence each."""

from __future__ import annotations

from typing import Literal, get_args

from idlora_jax.files import PathLike

Kind = Literal[
    "unreadable",
    "no video",
    "no audio",
    "too short",
    "silent",
    "not finite",
    "empty caption",
    "no reference",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_WORDS: tuple[tuple[str, Kind], ...] = (
    ("no video stream", "no video"),
    ("no audio stream", "no audio"),
    ("NaN or infinite", "not finite"),
    ("silent audio", "silent"),
    ("frames at", "too short"),
)
"""What `media` says of files that it cannot use, and which kind that is."""


class Rejection(ValueError):
    """A clip cannot be used.

    Attributes:
        kind: of the reason.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


def rejection(path: PathLike, error: Exception) -> Rejection:
    """The error that a media file gave, with its kind."""
    if isinstance(error, Rejection):
        return error
    # The path may hold any words.
    said = str(error).replace(str(path), "")
    found: list[Kind] = [kind for words, kind in _WORDS if words in said]
    kind = found[0] if found else "unreadable"
    return Rejection(kind, " ".join(str(error).split()))

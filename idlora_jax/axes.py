"""The axes of a mesh of devices as text: "data=2,tensor=4"; see `parallel`.

Nothing here imports jax, so that a configuration can be checked without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

AXES = ("data", "fsdp", "tensor", "guidance")
BATCH = ("data", "fsdp")
"""Axes that the samples of a batch are divided over."""


def parse(text: str) -> dict[str, int]:
    """Sizes of the named axes: "data=2,tensor=4" -> {"data": 2, "tensor": 4}.

    Raises:
        ValueError: for an axis that is unknown or named twice, or a size that is no
            whole number from 1.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text.strip() else ():
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes:
            raise ValueError(
                f"mesh: got {text!r}, expected axis=size of each of {', '.join(AXES)} "
                f'at most once, not {part.strip()!r}; for instance "data=2,tensor=4"'
            )
        if not (size.isascii() and size.isdigit()) or int(size) < 1:
            raise ValueError(
                f"mesh: got {name}={size}, expected a whole number from 1; for "
                f"instance {name}=2"
            )
        sizes[name] = int(size)
    return sizes


def parts(sizes: Mapping[str, int]) -> int:
    """Into how many parts the samples of a batch are divided."""
    return math.prod(sizes.get(axis, 1) for axis in BATCH)

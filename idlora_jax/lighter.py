"""Settings that need less memory for weights, as the command line takes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idlora_jax import hosted, outlines
from idlora_jax.files import PathLike
from idlora_jax.weights.fp8 import Choice


def named(changes: Mapping[str, Any]) -> str:
    """Settings as the command line takes them."""
    return " ".join(f"--{name.replace('_', '-')} {v}" for name, v in changes.items())


def weights(
    choice: Choice, where: hosted.Where, base: PathLike, platform: str
) -> list[list[dict[str, Any]]]:
    """Settings that need less memory for the weights of the transformer's blocks.

    Args:
        choice: the setting `weights`.
        where: the setting `weights_in`.
        base: the checkpoint; int8 helps where it is not there, too.
        platform: of the device; on CPU, host memory is the device's.

    Returns:
        Groups of settings, each from the least change on.
    """
    stored = outlines.stored_as(base) if Path(base).exists() else "plain"
    narrow: list[dict[str, Any]] = []
    if choice == "upcast" and stored == "fp8":
        narrow.append({"weights": "keep"})
    if choice != "int8" and stored != "int8":
        narrow.append({"weights": "int8"})
    if where == "host" or platform == "cpu":
        return [narrow]
    moved = {"weights_in": "host"}
    return [narrow, [moved, *({**moved, **one} for one in narrow)]]

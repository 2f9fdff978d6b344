"""Digests that tell whether something was made from the same things.

Large files are known by their size and by 64 KiB at their beginning, middle and end:
names and times do not count, so that a data set may be moved or copied.
"""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from idlora_jax.files import PathLike

SAMPLE = 1 << 16


def of(*parts: Any) -> str:
    """A digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def of_file(path: PathLike) -> str:
    """A digest of a file's size and of samples of what it holds.

    Raises:
        OSError: if it cannot be read.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in sorted({0, max(0, (size - SAMPLE) // 2), max(0, size - SAMPLE)}):
            file.seek(start)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def of_folder(folder: PathLike) -> str:
    """A digest of the files in a folder, by their names in it.

    Raises:
        OSError: if one cannot be read.
    """
    found = []
    for top, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = os.path.join(top, name)
            if name.endswith((".safetensors", ".json")):
                found.append([os.path.relpath(path, folder), of_file(path)])
    return of(*sorted(found))

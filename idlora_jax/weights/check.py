"""Is a base checkpoint whole? From its headers in seconds, or byte by byte.

`report` reads no tensor: it compares every key and shape with what the embedded
configuration says, network by network. `verify` reads every byte and compares it with
the hashes that were recorded when this library wrote the file.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from idlora_jax.files import PathLike, problem
from idlora_jax.weights import bases, fp8, int8, io, tensorfile
from idlora_jax.weights.bases import BaseFile
from idlora_jax.weights.progress import Progress, bar, silent


class Part(NamedTuple):
    """A network of a checkpoint: what the file holds of it, and what is wrong."""

    name: str
    tensors: int
    parameters: int
    problem: str


class BaseReport(NamedTuple):
    """What a checkpoint holds; `str()` of it is a table for people."""

    path: Path
    generation: str
    nbytes: int
    parts: tuple[Part, ...]
    unowned: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether every key is known, and every network that is there is whole."""
        return not self.unowned and not any(part.problem for part in self.parts)

    @property
    def parameters(self) -> int:
        """Numbers in all tensors of all networks."""
        return sum(part.parameters for part in self.parts)

    @property
    def tensors(self) -> int:
        """Tensors of all networks."""
        return sum(part.tensors for part in self.parts)

    def __str__(self) -> str:
        rows = [(p.name, p.tensors, p.parameters, not p.problem) for p in self.parts]
        rows.append(("in all", self.tensors, self.parameters, self.complete))
        size = f"{self.nbytes / 1e9:.2f} GB"
        lines = [f"{self.path}: LTX-2 base, generation {self.generation}, {size}"]
        lines += [
            f"  {name:15} {tensors:6,} tensors {parameters:15,} parameters  "
            f"{'complete' if whole else 'INCOMPLETE'}"
            for name, tensors, parameters, whole in rows
        ]
        lines += [part.problem for part in self.parts if part.problem]
        if self.unowned:
            lines.append(f"{len(self.unowned)} tensors belong to no network:")
            lines += [f"  {key}" for key in self.unowned[:12]]
        return "\n".join(lines)


def _is_beside(path: str) -> bool:
    """Whether a converted tensor only says how another is read."""
    return path.endswith((fp8.ROW, int8.SCALES))


def _part(base: BaseFile, name: str) -> Part:
    specs = io.specs(base, name)
    try:
        io.locate(base, name)
        wrong = ""
    except ValueError as error:
        wrong = str(error)
    beside = {key for key in specs if base.converted and _is_beside(key)}
    count = sum(
        math.prod(spec.shape) for key, spec in specs.items() if key not in beside
    )
    return Part(name, len(specs), count, wrong)


def report(path: PathLike) -> BaseReport:
    """Compare a checkpoint's headers with its configuration; no tensor is read.

    Args:
        path: an original .safetensors file, or a converted folder. Of a folder the
            tensors are stacks, so there are fewer of them.

    Raises:
        ValueError: if it is missing, truncated, or no base checkpoint.
    """
    base = io.open_base(path)
    parts = tuple(_part(base, name) for name in io.names_in(base))
    unowned = () if base.converted else tuple(io.unowned(base))
    nbytes = sum(file.stat().st_size for file in bases.files_of(base))
    return BaseReport(base.path, base.generation, nbytes, parts, unowned)


def verify(base: BaseFile, progress: Progress = silent) -> None:
    """Read every byte, and compare with the recorded hashes.

    Args:
        base: from `io.open_base`.
        progress: takes bytes read.

    Raises:
        ValueError: naming the files that changed, or if none records a hash.
    """
    named = bases.recorded_hashes(base)
    absent = [path for path, digest in named.items() if not digest]
    if absent:
        got, do = "no recorded hash", "convert it (convert/base.py), which records one"
        raise problem("verify", absent[0], got, "one", do)
    changed = [
        path
        for path, digest in named.items()
        if tensorfile.header(path).metadata.get(tensorfile.HASH) != digest
        or not tensorfile.verify(path, progress=progress)
    ]
    if changed:
        names = ", ".join(path.name for path in changed)
        got, do = f"other bytes in {names}", "copy, download or convert it again"
        raise problem("verify", base.path, got, "those of the recorded hashes", do)


def verify_watched(base: BaseFile) -> None:
    """`verify` with a bar on the terminal."""
    total = sum(path.stat().st_size for path in bases.files_of(base))
    with bar(total, f"verifying {base.path.name}") as progress:
        verify(base, progress)

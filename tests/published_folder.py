"""Data sets in the published form: folders of .pt files, archives of these."""

from __future__ import annotations

import io
import pathlib
import tarfile
from collections.abc import Callable, Iterable
from typing import Any

import latent_folder
import numpy as np
import pt_files
import zstandard

from idlora_jax.data import latents

CLEAN = "audio_latents_clean"


def files(seed: int, **options: Any) -> dict[str, dict[str, Any]]:
    """What a clip's .pt files hold: as `latent_folder.tensors`, numbers as numbers."""
    found = latent_folder.tensors(seed, **options)
    return {
        CLEAN if folder == latents.REFERENCE else folder: {
            key: value.item() if value.ndim == 0 else np.ascontiguousarray(value)
            for key, value in arrays.items()
        }
        for folder, arrays in found.items()
    }


def write_clip(root: pathlib.Path, name: str, contents: dict[str, Any]) -> None:
    for folder, content in contents.items():
        pt_files.save(root / folder / f"{name}.pt", content)


def write(root: pathlib.Path, count: int = 4, **options: Any) -> pathlib.Path:
    for n, name in enumerate(latent_folder.names(count)):
        write_clip(root, name, files(n, **options))
    return root


def tar(
    path: pathlib.Path,
    root: pathlib.Path,
    members: Iterable[str],
    change: Callable[[tarfile.TarInfo], Any] = lambda info: None,
) -> pathlib.Path:
    """An archive of files below `root`; `.zst` is compressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            info = archive.gettarinfo(root / member, member)
            change(info)
            data = (root / member).read_bytes() if info.isfile() else b""
            archive.addfile(info, io.BytesIO(data))
    data = out.getvalue()
    compress = zstandard.ZstdCompressor().compress
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(data) if path.suffix == ".zst" else data)
    return path


def archives(target: pathlib.Path, root: pathlib.Path, seed: int = 0) -> pathlib.Path:
    """One archive a folder, each in an order of its own."""
    rng = np.random.default_rng(seed)
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        paths = sorted(p.relative_to(root).as_posix() for p in folder.rglob("*.pt"))
        rng.shuffle(paths)
        tar(target / f"{folder.name}.tar.zst", root, paths)
    return target

"""Folders of the published layout: which file belongs to which clip, and what it holds.

    latents/a/latent_1.pt        audio_latents/a/latent_1.pt
    conditions/a/condition_1.pt  audio_latents_clean/a/latent_1.pt

One clip has the same relative name in every folder; `latent_X` is also paired with
`condition_X`. Files are those of `torch.save`, as published, or safetensors, as this
library writes them: `specs` and `read` give the same for both. The public archives call
the folder of references `audio_latents_clean`.

Source: ltx_trainer/datasets.py: PrecomputedDataset.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from idlora_jax.data.stored import (
    AUDIO,
    FOLDERS,
    REFERENCE,
    TEXT,
    VIDEO,
    VIDEO_REFERENCE,
    File,
)
from idlora_jax.weights import torch_file
from idlora_jax.weights.header import DTYPES, Spec

KINDS = {
    VIDEO: VIDEO,
    TEXT: TEXT,
    AUDIO: AUDIO,
    REFERENCE: REFERENCE,
    "audio_latents_clean": REFERENCE,
    "ref_audio_latents": REFERENCE,
    VIDEO_REFERENCE: VIDEO_REFERENCE,
    "ref_latents": VIDEO_REFERENCE,
}
"""Names of folders -> the folder of our layout that they stand for."""
SUFFIXES = (".pt", ".safetensors")
_INFO = "dataset_info.json"
_SIZE = re.compile(r"\d+x\d+x\d+")
_ENTERED = (".precomputed", "precomputed")
_LATENT, _CONDITION = "latent_", "condition_"

Names = Mapping[str, Mapping[str, str]]
"""By folder of our layout: clip -> the name its file has there."""


def root_of(folder: Path) -> Path:
    """The folder that holds those of the layout: `folder`, or one inside.

    Raises:
        ValueError: if there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(
            f"data: no such folder {folder}; expected one with {', '.join(FOLDERS)} "
            "(python -m idlora_jax.data.preprocess makes it)"
        )
    inner = (folder / name for name in _ENTERED)
    return next((f for f in inner if f.is_dir()), folder)


def sized(folder: Path) -> list[Path]:
    """The folders of sizes in a folder, such as 512x512x121; [] if there are none."""
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inner if path.is_dir() and _SIZE.fullmatch(path.name)]


def dataset_root(path: Path) -> Path | None:
    """The folder of a TFDS data set: `path`, or the only one in it, up to two below.

    Raises:
        ValueError: if there are several.
    """
    for pattern in (_INFO, f"[0-9]*/{_INFO}", f"*/[0-9]*/{_INFO}"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(p.parent) for p in found)
            raise ValueError(f"data: {path} holds several data sets: {names}; name one")
        if found:
            return found[0].parent
    return None


def split_path(path: str) -> tuple[str, str] | None:
    """A relative path -> (folder of our layout, name without suffix).

    Folders above that of the layout are passed over. None: the path is none of a clip.
    """
    parts = PurePosixPath(path).parts
    at = next((n for n, part in enumerate(parts[:-1]) if part in KINDS), None)
    if at is None or parts[-1].startswith(".") or not path.endswith(SUFFIXES):
        return None
    return KINDS[parts[at]], without_suffix("/".join(parts[at + 1 :]))


def without_suffix(name: str) -> str:
    """`a/b.c.pt` -> `a/b.c`."""
    return name.rpartition(".")[0]


def listed(root: Path) -> dict[str, dict[str, Path]]:
    """The files of a folder by folder of our layout and name.

    Raises:
        ValueError: if a name stands for two files.
    """
    found: dict[str, dict[str, Path]] = {}
    for folder in sorted(KINDS):
        for path in sorted((root / folder).rglob("*")):
            at = split_path(path.relative_to(root).as_posix())
            if at is None or not path.is_file():
                continue
            kind, name = at
            other = found.setdefault(kind, {}).setdefault(name, path)
            if other != path:
                raise ValueError(f"data: {other} and {path} are the same clip's")
    return found


def _flat(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their last part."""
    by_last: dict[str, list[str]] = {}
    for name in names:
        by_last.setdefault(name.rpartition("/")[2], []).append(name)
    return by_last


def pair(names: Mapping[str, Collection[str]]) -> Names:
    """Which file of each folder belongs to which clip.

    Args:
        names: of the files, by folder of our layout.

    Returns:
        By folder: clip -> name. Clips are named as in `latents`; a file that belongs to
        none of those keeps its own name.
    """
    videos = names.get(VIDEO, ())
    last = _flat(videos)

    def clip_of(name: str) -> str:
        folder, slash, base = name.rpartition("/")
        if name in videos or not base.startswith(_CONDITION):
            return name
        base = _LATENT + base.removeprefix(_CONDITION)
        beside, anywhere = folder + slash + base, last.get(base, [])
        if beside in videos or folder or len(anywhere) != 1:
            return beside
        return anywhere[0]

    paired = {kind: {name: name for name in found} for kind, found in names.items()}
    conditions = names.get(TEXT, ())
    if conditions:
        # A file of the clip's own name comes before one that is renamed to it.
        ordered = sorted(conditions, key=lambda n: (n not in videos, n))
        paired[TEXT] = {}
        for name in ordered:
            paired[TEXT].setdefault(clip_of(name), name)
    return paired


def _spec_or_number(file: Any, key: str) -> Any:
    part = file.get_slice(key)
    shape = tuple(part.get_shape())
    if math.prod(shape) != 1:
        return Spec(shape, DTYPES[part.get_dtype()])
    return file.get_tensor(key).item()


def _safetensors(path: Path, *, tensors: bool) -> File:
    try:
        with safe_open(path, framework="numpy") as file:
            if tensors:
                return {key: file.get_tensor(key) for key in file.keys()}
            return {key: _spec_or_number(file, key) for key in file.keys()}
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"data: {path} is damaged ({error}); preprocess this clip again"
        ) from None


def checked(content: Any, path: Any) -> File:
    """What a `.pt` file holds, which must be a dict.

    Raises:
        ValueError: if it is not.
    """
    if not isinstance(content, dict):
        got = type(content).__name__
        raise ValueError(f"data: {path} holds a {got}, expected a dict of tensors")
    return content


def read(path: Path) -> File:
    """What a file holds: arrays and numbers by key.

    Raises:
        ValueError: if it is missing or damaged.
    """
    if path.suffix == ".pt":
        return checked(torch_file.read_pt(path), path)
    return _safetensors(path, tensors=True)


def specs(path: Path) -> File:
    """The same with `Spec(shape, dtype)` for arrays, which are not read; numbers are,
    also those stored as tensors.

    Raises:
        ValueError: if it is missing or damaged.
    """
    if path.suffix != ".pt":
        return _safetensors(path, tensors=False)
    found = checked(torch_file.specs(path), path)
    shapes = (x.shape for x in found.values() if isinstance(x, Spec))
    return read(path) if any(math.prod(s) == 1 for s in shapes) else found

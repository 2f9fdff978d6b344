"""Folders as transformers and diffusers write them: safetensors shards and an index.

A folder holds one network: `NAME.safetensors`, or `NAME-00001-of-00003.safetensors` and
so on beside `NAME.safetensors.index.json`, which says the file of every tensor. What
such a folder says is checked before a tensor is read: files stay inside the folder and
are all there, and files and index hold the same tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idlora_jax.files import PathLike, problem
from idlora_jax.weights import fingerprint, tensorfile
from idlora_jax.weights.tensorfile import Tensors

CONFIG, INDEX = "config.json", ".safetensors.index.json"
TOKENIZER = "tokenizer.json"
_AGAIN = "download the folder again"


def parsed(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ValueError: if the file is missing or holds something else.
    """
    found = None
    if path.is_file():
        try:
            found = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError):
            pass
    if isinstance(found, dict):
        return found
    got = "a file that is no JSON object" if path.is_file() else "no such file"
    raise problem("weights", path, got, "a JSON object", _AGAIN)


def _weight_map(path: Path) -> dict[str, str]:
    found = parsed(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise problem("weights", path, "no 'weight_map'", "one", _AGAIN)
    odd = sorted({str(n) for n in found.values() if not _is_plain(n)})
    if odd:
        expected = "names of .safetensors files in its folder"
        raise problem("weights", path, f"file names {odd}", expected, _AGAIN)
    return found


def _is_plain(name: Any) -> bool:
    """Whether an index's file name names a file of the same folder."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not set(name) & set("/\\:\0")
    )


def _index_of(folder: Path) -> Path | None:
    found = sorted(folder.glob(f"*{INDEX}"))
    if len(found) > 1:
        names = [path.name for path in found]
        hint = "keep one variant of the weights in the folder"
        raise problem("weights", folder, f"indices {names}", "one", hint)
    return found[0] if found else None


def files_of(folder: PathLike) -> list[Path]:
    """The weight files of a folder, those of its index if it has one; maybe none.

    Raises:
        ValueError: if the index is damaged, names files elsewhere, or files are absent.
    """
    folder = Path(folder)
    index = _index_of(folder)
    if index is None:
        return sorted(folder.glob("*.safetensors"))
    named = sorted(set(_weight_map(index).values()))
    absent = [name for name in named if not (folder / name).is_file()]
    if absent:
        got, hint = f"a folder without {absent}", "download the rest"
        raise problem("weights", folder, got, "all files of its index", hint)
    return [folder / name for name in named]


def _refuse(folder: Path, names: Sequence[str], what: str, expected: str) -> None:
    if names:
        more = " ..." if len(names) > 6 else ""
        got = f"{len(names)} tensors {what}: {sorted(names)[:6]}{more}"
        raise problem("weights", folder, got, expected, _AGAIN)


def _check(folder: Path, held: Mapping[str, set[str]]) -> None:
    """Compare the tensors of each file with one another and with the index."""
    counts = Counter(name for names in held.values() for name in names)
    twice = [name for name, count in counts.items() if count > 1]
    _refuse(folder, twice, "in two files", "each in one")
    index = _index_of(folder)
    if index is None:
        return
    mapped = _weight_map(index)
    extra = [name for name in counts if name not in mapped]
    _refuse(folder, extra, "that its index does not name", "those of the index")
    absent = [name for name, file in mapped.items() if name not in held[file]]
    _refuse(folder, absent, "absent from the file that the index says", "all there")


def tensors_in(folder: PathLike) -> Tensors:
    """Open all weight files of a folder; nothing is read but their headers.

    Raises:
        ValueError: if there are none, one is absent, truncated or no safetensors, a
            tensor is in two files, or files and index do not hold the same tensors.
    """
    folder, paths = Path(folder), files_of(folder)
    if not paths:
        got, hint = "no *.safetensors", "download the weights (not the .bin files)"
        raise problem("weights", folder, got, "safetensors files", hint)
    _check(folder, {path.name: set(tensorfile.header(path).tensors) for path in paths})
    return tensorfile.tensors_of(*paths)


def index_text(files: Mapping[str, Sequence[tensorfile.Entry]]) -> str:
    """The index of shards, by file name, as JSON."""
    entries = [(name, entry) for name, group in files.items() for entry in group]
    total = sum(entry.spec.nbytes for _, entry in entries)
    weight_map = {entry.name: name for name, entry in entries}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def sampled(*folders: Path) -> str:
    """A digest that tells networks apart: their configs, and parts of their files.

    Returns:
        "sampled:" and 64 hexadecimal digits; see `fingerprint.sampled`.
    """
    digest = hashlib.sha256()
    for folder in sorted(folders):
        digest.update((folder / CONFIG).read_bytes())
        for path in files_of(folder):
            head = tensorfile.header(path).fingerprint
            digest.update(fingerprint.sampled(path, head).encode())
    return f"sampled:{digest.hexdigest()}"


def tokenizer_folder(folder: PathLike) -> Path:
    """Where the tokenizer of a text encoder's folder is.

    In the folder itself, or in `tokenizer/` in it or beside it, as in the pipelines of
    diffusers; the folder itself where there is none.
    """
    folder = Path(folder)
    places = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    held = (place for place in places if (place / TOKENIZER).is_file())
    return next(held, folder)

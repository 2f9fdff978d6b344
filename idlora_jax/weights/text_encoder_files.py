"""Folders of the text encoder: opening, checking, and converting to our stacks.

A Gemma-3 folder is what transformers writes (config.json, safetensors shards, the
tokenizer's files). Its keys have had several beginnings over the years, see `LAYOUTS`;
the vision tower and the output head that some folders hold are left out. A diffusers
pipeline keeps the network in text_encoder/ and the tokenizer beside it, in tokenizer/.

A converted folder holds the same parameters stacked by layer, under our paths:
text_encoder*.safetensors, manifest.json, and copies of config.json and the tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from idlora_jax import __version__
from idlora_jax.config_text import TextEncoderConfig, text_encoder_config
from idlora_jax.files import PathLike, problem
from idlora_jax.model import text_encoder
from idlora_jax.weights import fp8, fp8_files, hub_folder, leaves, shards, tables
from idlora_jax.weights import tensorfile as files
from idlora_jax.weights.leaves import Leaf, Where
from idlora_jax.weights.progress import bar

NAME, CONFIG, MANIFEST = "text_encoder", "config.json", "manifest.json"
FORMAT = 1
LAYOUTS = (
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "model.",
    "",
)
"""What the keys of the text tower begin with: in the published file and transformers
before 4.52, in later ones, without a head; text-only, and that without a head."""

_PUBLISHED, _FIRST = LAYOUTS[0], "embed_tokens.weight"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
_HINT = "download gemma-3-12b-it (see docs/quickstart.md)"


class TextEncoderFile(NamedTuple):
    """A text encoder that was opened, not read.

    Attributes:
        path: its folder.
        cfg: what config.json says.
        leaves: its parameters by path.
        ignored: how many tensors are not the text tower's.
        source_hash: "sampled:" and a digest of the files it was first read from.
        dtype: that a conversion cast to, or "as stored".
        converted: whether it is a folder of ours.
    """

    path: Path
    cfg: TextEncoderConfig
    leaves: dict[str, Leaf]
    ignored: int
    source_hash: str
    dtype: str
    converted: bool

    def __str__(self) -> str:
        count = sum(math.prod(leaf.spec.shape) for leaf in self.leaves.values())
        tensors = sum(leaf.count for leaf in self.leaves.values())
        size = f"{self.cfg.layers} layers of width {self.cfg.width}"
        kind = "converted folder" if self.converted else "Gemma-3 folder"
        rest = f"\n  left out: {self.ignored:,} tensors (vision tower, output head)"
        return (
            f"{self.path}: text encoder, {kind}, {size}\n"
            f"  {tensors:,} tensors {count:,} parameters  complete"
            f"{rest if self.ignored else ''}"
        )


def folder_of(path: PathLike) -> Path:
    """The network's folder, given that or a diffusers pipeline's."""
    path = Path(path)
    inner = path / NAME
    return inner if (inner / CONFIG).is_file() else path


def _layout(keys: Iterable[str]) -> str | None:
    """The beginning of the text tower's keys, if it is a known one."""
    found = [key.removesuffix(_FIRST) for key in keys if key.endswith(_FIRST)]
    return found[0] if len(found) == 1 and found[0] in LAYOUTS else None


def published_names(keys: Iterable[str]) -> dict[str, str]:
    """The text tower's keys by the names that the rules know.

    Args:
        keys: those of a folder; the vision tower's and the head's are left out.

    Returns:
        A dict from the published file's spelling to the folder's. Keys of an unknown
        layout stand for themselves.
    """
    own = [key for key in keys if not key.startswith(tables.GEMMA_IGNORED)]
    layout = _layout(own)
    same = {key: key for key in own}
    if layout is None:
        return same
    named = {
        _PUBLISHED + key.removeprefix(layout) if key.startswith(layout) else key: key
        for key in own
    }
    # Keys of two layouts in one folder would hide one another.
    return named if len(named) == len(own) else same


def _needed(cfg: TextEncoderConfig) -> dict[str, leaves.Source]:
    like = jax.eval_shape(lambda key: text_encoder.init(cfg, key), jax.random.key(0))
    return leaves.sources(NAME, like, tables.GEMMA)


def _config(folder: Path) -> TextEncoderConfig:
    try:
        return text_encoder_config(hub_folder.parsed(folder / CONFIG))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _manifest(folder: Path) -> dict[str, Any]:
    found = hub_folder.parsed(folder / MANIFEST)
    needed = {"source_hash", "dtype", "networks"}
    named = found.get("networks")
    ours = isinstance(named, dict) and isinstance(named.get(NAME), dict)
    if found.get("format") != FORMAT or not needed <= found.keys() or not ours:
        got, expected = f"{[*found]}", f"a converted text encoder of format {FORMAT}"
        do = "give the text encoder's folder, or convert it again"
        raise problem("weights", folder / MANIFEST, got, expected, do)
    return found


def _converted(folder: Path) -> TextEncoderFile:
    manifest, cfg = _manifest(folder), _config(folder)
    named = [Path(name).name for name in manifest["networks"][NAME]]
    absent = [name for name in named if not (folder / name).is_file()]
    if absent:
        got, do = f"a folder without {absent}", "copy or convert it again"
        raise problem("weights", folder, got, "all files of its manifest", do)
    tensors = files.tensors_of(*(folder / name for name in named))
    what = f"{folder}: the text encoder does not fit {CONFIG}"
    found = leaves.from_converted(tensors, _needed(cfg), Where(what, "convert again"))
    about = manifest["source_hash"], manifest["dtype"]
    return TextEncoderFile(folder, cfg, found, 0, *about, True)


def open_text_encoder(path: PathLike) -> TextEncoderFile:
    """Open a text encoder's folder, checked for completeness; no tensor is read.

    Args:
        path: a Gemma-3 folder in any of transformers' layouts, a diffusers pipeline
            that holds one, or a converted folder.

    Raises:
        ValueError: if it is none of them, or its files are incomplete or do not fit.
    """
    folder = folder_of(path)
    if (folder / MANIFEST).is_file():
        return _converted(folder)
    if not (folder / CONFIG).is_file() or not hub_folder.files_of(folder):
        got = f"a folder without {CONFIG} and *.safetensors"
        raise problem("weights", folder, got, "a Gemma-3 folder", _HINT)
    cfg, tensors = _config(folder), hub_folder.tensors_in(folder)
    named = tensors.renamed(published_names(tensors.specs))
    todo = "LTX-2 uses gemma-3-12b-it; is the folder whole?"
    where = Where(f"{folder}: the text encoder does not fit {CONFIG}", todo)
    scaled = fp8_files.from_original(named, named.specs, _needed(cfg), where)
    found = {name: fp8.upcast(name, leaf, None) for name, leaf in scaled.items()}
    ignored = len(tensors.specs) - len(named.specs)
    digest = hub_folder.sampled(folder)
    return TextEncoderFile(folder, cfg, found, ignored, digest, "as stored", False)


def _texts(folder: Path) -> dict[str, str]:
    """What is copied: config.json and the tokenizer's files."""
    tokenizer = hub_folder.tokenizer_folder(folder)
    if not (tokenizer / _TOKENIZER[0]).is_file():
        got, do = f"no {_TOKENIZER[0]}", "it is published beside config.json; copy it"
        raise problem("convert", folder, got, "the tokenizer too", do)
    paths = [folder / CONFIG, *(tokenizer / name for name in _TOKENIZER)]
    return {path.name: path.read_text("utf-8") for path in paths if path.is_file()}


def _is_done(destination: Path, wanted: Mapping[str, str]) -> bool:
    """Whether the destination is this conversion; another one's is an error."""
    if not (destination / MANIFEST).is_file():
        shards.refuse_occupied(destination)
        return False
    found = _converted(destination)
    held = {"source_hash": found.source_hash, "dtype": found.dtype}
    if held != wanted:
        got, do = f"a conversion with {held}", "choose another folder, or remove this"
        raise problem("convert", destination, got, f"{wanted}", do)
    return True


def convert_text_encoder(
    source: PathLike,
    destination: PathLike,
    dtype: Any | None = None,
    *,
    limit: int = shards.LIMIT,
    say: Callable[[str], Any] = print,
) -> bool:
    """Convert a Gemma-3 folder to ours: stacked by layer, without the vision tower.

    Args:
        source: see `open_text_encoder`.
        destination: the folder to be made.
        dtype: of the parameters (default: as stored).
        limit: bytes of a file, unless one parameter is larger.
        say: takes lines about the progress.

    Returns:
        False if the destination was complete already and nothing was done.

    Raises:
        ValueError: if the source is incomplete or unreadable, the destination holds
            something else, or the disk has no room.
        OSError: if it cannot be written; finished files stay for the same call.
    """
    file, folder = open_text_encoder(source), Path(destination)
    if file.converted:
        do = "use it as it is, or give the Gemma-3 folder"
        raise problem("convert", source, "a converted text encoder", "another", do)
    name = "as stored" if dtype is None else np.dtype(dtype).name
    wanted = {"source_hash": file.source_hash, "dtype": name}
    if _is_done(folder, wanted):
        say(f"{folder} holds this conversion already; nothing to do")
        return False
    copied, entries = _texts(file.path), leaves.our_entries(file.leaves, dtype)
    total = sum(entry.spec.nbytes for entry in entries)
    about = {"format": FORMAT, **wanted, "version": __version__}

    def texts(hashes: shards.Hashes) -> dict[str, str]:
        manifest = {**about, "source": file.path.name, "networks": hashes}
        return {**copied, MANIFEST: json.dumps(manifest, indent=2) + "\n"}

    say(f"converting {file.path}: {total / 1e9:.2f} GB")
    with bar(total, "converting") as progress:
        shards.write_folder(
            folder,
            {NAME: entries},
            plan=wanted,
            texts=texts,
            limit=limit,
            progress=progress,
            say=say,
        )
    say(f"wrote {folder}: {len(entries)} parameters")
    return True


def verify(path: PathLike) -> None:
    """Read every byte of a converted folder, and compare with the recorded hashes.

    Raises:
        ValueError: if a file changed, or the folder records no hashes because it was
            not converted.
    """
    file = open_text_encoder(path)
    if not file.converted:
        do = "convert it (convert/text_encoder.py), which records them"
        raise problem("verify", path, "no recorded hashes", "a converted folder", do)
    named = _manifest(file.path)["networks"][NAME]
    digests = {file.path / Path(name).name: digest for name, digest in named.items()}
    total = sum(path.stat().st_size for path in digests)
    with bar(total, f"verifying {file.path.name}") as progress:
        for path, digest in digests.items():
            recorded = files.header(path).metadata.get(files.HASH)
            if recorded != digest or not files.verify(path, progress=progress):
                got, do = "other bytes", "copy or convert it again"
                raise problem("verify", path, got, "those of the recorded hash", do)

"""Prompts on disk by content, so that the text encoder is read for new texts only.

    encoded(config, nets, texts)          text -> Prompt, of a run of `sample.py`
    cached(folder, keys, make)            the same of any texts and any encoder

A prompt's file is named by a sha256 of all that its numbers depend on: the tokens, the
text encoder, the connectors and what adapters change in them, dtype and numerics, and
the software and device that computed. Whatever of it differs is another file, so
nothing here is ever out of date, and the folder may be removed at any time: what is
absent or damaged is encoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idlora_jax import adapters, checkpoints, parallel, prompts
from idlora_jax.data import tokenize
from idlora_jax.data.tokenize import TextTokenizer
from idlora_jax.files import PathLike, user_cache
from idlora_jax.sample_config import SampleConfig
from idlora_jax.types import AV, Adapter, Numerics, Prompt
from idlora_jax.weights import (
    bases,
    hub_folder,
    io,
    networks,
    rules,
    tensorfile,
    text_encoder_files,
)
from idlora_jax.weights.networks import Networks
from idlora_jax.weights.tensorfile import Tensors

FORMAT = 1
"""Raised whenever this library gives prompts other numbers, or their files another
form: it is part of every name, so that older files are not looked at any more."""
LIMIT = 2 << 30
"""Bytes that a folder keeps: prompts of LTX-2 have 12 to 16 MB, so 130 or more."""
ROWS = 4
"""Of each matrix, read to tell networks apart: training changes every row."""
TEXT_SIDE = ("text_encoder", "text_connector")

_OURS = re.compile(r"(\.?)[0-9a-f]{64}(\.\d+\.tmp)?\.safetensors")
"""Our files, and what a killed process left of one; others are never removed."""

Say = Callable[[str], Any]
Make = Callable[[list[str]], Iterable[Prompt]]


def _load(path: Path, key: str, shapes: AV) -> Prompt | None:
    """The prompt of a file; None if there is none.

    Raises:
        ValueError: if the file is damaged, or not that prompt.
        OSError: if it cannot be read.
    """
    if not path.is_file():
        return None
    sound = tensorfile.verify(path)
    head = tensorfile.header(path)
    found = {name: spec.shape for name, spec in head.tensors.items()}
    if not sound or found != shapes._asdict() or head.metadata.get("key") != key:
        raise ValueError(f"{path}: got another prompt, expected {key}")

    # Not as `tensorfile.Tensors`, which refuses a file whose time of change moves: all
    # processes of a run touch the same files.
    def array(name: str) -> np.ndarray:
        spec, start = head.tensors[name], head.starts[name]
        flat = np.fromfile(path, np.uint8, spec.nbytes, offset=start)
        return flat.view(spec.dtype).reshape(spec.shape)

    prompt = Prompt(array("video"), array("audio"))
    with contextlib.suppress(OSError):
        os.utime(path)
    return prompt


def _trim(folder: Path, limit: int) -> None:
    """Remove the files that were not used for longest, beyond `limit` bytes."""
    found = []
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            with contextlib.suppress(OSError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > limit:
            with contextlib.suppress(OSError):
                path.unlink()


def _store(path: Path, key: str, text: str, prompt: Prompt, limit: int) -> None:
    arrays = {"video": prompt.video, "audio": prompt.audio}
    entries = [tensorfile.entry(name, array) for name, array in arrays.items()]
    about = {"key": key, "text": hashlib.sha256(text.encode()).hexdigest()}
    tensorfile.write(path, entries, about)
    _trim(path.parent, limit)


def _look_up(
    folder: Path, keys: Iterable[str], shapes: AV, say: Say
) -> dict[str, Prompt]:
    """The prompts that the folder holds, by key."""
    found, bad = {}, []
    for key in keys:
        path = folder / f"{key}.safetensors"
        try:
            prompt = _load(path, key, shapes)
        except (OSError, ValueError):
            bad.append(path.name)
            continue
        if prompt is not None:
            found[key] = prompt
    if bad:
        names = ", ".join(bad[:3]) + (" ..." if len(bad) > 3 else "")
        say(f"text cache: {len(bad)} damaged in {folder}, encoded again: {names}")
    return found


def cached(
    folder: PathLike | None,
    keys: Mapping[str, str],
    make: Make,
    *,
    shapes: AV,
    limit: int = LIMIT,
    note: Say | None = None,
) -> dict[str, Prompt]:
    """Prompts from a folder, those that it lacks from `make`, which are then kept.

    Args:
        folder: of the files; made if it is not there. None: all are made, none kept.
        keys: text -> 64 hexadecimal digits that stand for all its numbers depend on.
        make: gives the prompts of a list of texts, in order; called once, with what is
            lacking, and not at all if nothing is.
        shapes: the (video, audio) shapes of every prompt.
        limit: bytes that the folder keeps; what was not used for longest is removed.
        note: takes a line about a damaged file, or about a folder that cannot be
            written to. Neither is an error.

    Returns:
        The prompts by text, in host memory, in the dtype they were made in: bit by bit
        the same, whether they were made or read.
    """
    folder = None if folder is None else Path(folder)
    say: Say = note or (lambda line: None)
    wanted = {key: text for text, key in keys.items()}
    found = {} if folder is None else _look_up(folder, wanted, shapes, say)
    lacking = {key: text for key, text in wanted.items() if key not in found}
    if lacking:
        made = make([*lacking.values()])
        for (key, text), prompt in zip(lacking.items(), made, strict=True):
            found[key] = Prompt(*jax.device_get((prompt.video, prompt.audio)))
            try:
                if folder is not None:
                    path = folder / f"{key}.safetensors"
                    _store(path, key, text, found[key], limit)
            except OSError as error:
                say(f"text cache: {error}; prompts are not kept")
                folder = None
    return {text: found[key] for text, key in keys.items()}


def _content(tensors: Tensors, names: Iterable[str]) -> str:
    """A digest of tensors' names, dtypes and shapes, and of rows spread over each."""
    digest = hashlib.sha256()
    for name in sorted(names):
        spec, rows = tensors.specs[name], slice(None)
        if len(spec.shape) > 1:
            rows = slice(None, None, max(1, spec.shape[-2] // ROWS))
        cuts = (*(slice(None) for _ in spec.shape[:-2]), rows)
        digest.update(f"{name} {spec.dtype} {spec.shape}\n".encode())
        digest.update(tensors.slice(name, cuts[: len(spec.shape)]).tobytes())
    return digest.hexdigest()


def _machine() -> tuple[Any, ...]:
    """What computes, and how: another one's prompts differ in their last bits."""
    modes: Any = jax.config
    precision = modes.jax_default_matmul_precision, modes.jax_enable_x64
    return jax.__version__, jax.devices()[0].device_kind, *precision


def origin(
    base: PathLike,
    text_encoder: PathLike,
    nets: Networks,
    changes: Sequence[Adapter] = (),
    *,
    numerics: Numerics,
    dtype: str,
    mesh: str = "",
) -> str:
    """A digest of all that prompts depend on, but for their tokens.

    Networks are told apart by rows of every tensor (25 MB of 24 GB are read), and
    neither by name nor by time: a copy of a folder has the same digest.

    Args:
        base: the base checkpoint, whose connectors are used.
        text_encoder: the text encoder's folder.
        nets: of both.
        changes: of the text connector, scaled.
        numerics: see `prompts.prompts`.
        dtype: of the parameters.
        mesh: that the text encoder is divided over, which changes sums' last bits.

    Raises:
        ValueError: if files are damaged.
    """
    encoder = hub_folder.tensors_in(text_encoder_files.folder_of(text_encoder))
    opened = io.open_base(base)
    connector = bases.tensors(opened, "text_connector")
    flat = [rules.flatten(jax.device_get(change)) for change in changes]
    parts = (
        *(FORMAT, numerics, dtype, mesh, *_machine()),
        *(nets.text_encoder, nets.text_connector),
        _content(encoder, encoder.specs),
        _content(connector, io.specs(opened, "text_connector")),
        *(checkpoints.tensors_hash(change) for change in flat),
    )
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def keys_of(
    tokenizer: TextTokenizer, texts: Iterable[str], origin: str
) -> dict[str, str]:
    """What stands for each text's prompt: of its tokens, and of `origin`.

    Tokens are all that the text encoder gets, so they stand for the text, the tokenizer
    and the length.

    Args:
        tokenizer: of the text encoder.
        texts: any; each is in the result once.
        origin: from the function of that name.

    Returns:
        64 hexadecimal digits by text, as `cached` wants them.
    """

    def key(text: str) -> str:
        ids, mask = tokenize.encode(tokenizer, [text])
        content = origin.encode() + ids.tobytes() + mask.tobytes()
        return hashlib.sha256(content).hexdigest()

    return {text: key(text) for text in dict.fromkeys(texts)}


def shapes_of(nets: Networks, tokenizer: TextTokenizer) -> AV:
    """(video, audio) shapes of a text's prompt, [1 S D] and [1 S Da]."""
    connector, length = nets.text_connector, tokenizer.length
    return AV(*((1, length, x.width) for x in (connector.video, connector.audio)))


def folder_of(config: SampleConfig) -> Path | None:
    """Where a configuration keeps prompts; None: nowhere."""
    if not config.use_text_cache:
        return None
    if config.text_cache is not None:
        return config.text_cache
    root = user_cache()
    return None if root is None else root / "prompts"


def _encoder(
    config: SampleConfig, tokenizer: TextTokenizer, changes: Sequence[Adapter]
) -> Make:
    """Reads the text side once, and lets it go after the last text."""

    def make(texts: list[str]) -> Iterator[Prompt]:
        nets, params = networks.load(
            config.base,
            TEXT_SIDE,
            text_encoder_path=config.text_encoder,
            dtype=jnp.dtype(config.dtype),
            mesh=parallel.make(config.mesh) if config.mesh else None,
        )
        if changes:
            merged = adapters.merge(params["text_connector"], *changes)
            params = {**params, "text_connector": merged}
        for text in texts:
            found = prompts.features(nets, params, tokenizer, [text])
            yield prompts.prompts(nets, params, *found, numerics=config.numerics)

    return make


def encoded(
    config: SampleConfig,
    nets: Networks,
    texts: Sequence[str],
    changes: Sequence[Adapter] = (),
    *,
    note: Say | None = None,
) -> dict[str, Prompt]:
    """The prompts of texts, from the cache where it has them.

    The text encoder is read once if any text is new, otherwise not at all; when this
    returns, nothing of it is in memory.

    Args:
        config: which files, numerics, dtype and cache folder.
        nets: what they are, with the text encoder's configuration.
        texts: prompts and negative prompts, in any order and number.
        changes: of the text connector by adapters, scaled.
        note: takes a line about a cache that could not be used; see `cached`.

    Returns:
        Prompt of [1 S D] and [1 S Da] by text, in host memory, mask None.

    Raises:
        ValueError: if files are missing or damaged, or an adapter does not fit.
    """
    tokenizer, folder = tokenize.load(config.text_encoder), folder_of(config)
    source = "" if folder is None else _origin(config, nets, changes)
    keys = keys_of(tokenizer, texts, source)
    make = _encoder(config, tokenizer, changes)
    shapes = shapes_of(nets, tokenizer)
    return cached(folder, keys, make, shapes=shapes, note=note)


def lacking(
    config: SampleConfig,
    nets: Networks,
    texts: Sequence[str],
    changes: Sequence[Adapter] = (),
) -> list[str]:
    """The texts for which `encoded` would read the text encoder; arguments as there.

    A damaged file counts as there: this looks at names alone.
    """
    folder = folder_of(config)
    if folder is None:
        return [*dict.fromkeys(texts)]
    tokenizer = tokenize.load(config.text_encoder)
    keys = keys_of(tokenizer, texts, _origin(config, nets, changes))
    there = {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
    return [text for text, key in keys.items() if key not in there]


def _origin(config: SampleConfig, nets: Networks, changes: Sequence[Adapter]) -> str:
    return origin(
        config.base,
        config.text_encoder,
        nets,
        changes,
        numerics=config.numerics,
        dtype=config.dtype,
        mesh=config.mesh,
    )

"""A base checkpoint written as a pipeline folder of diffusers.

    FOLDER/model_index.json              the pipeline's class and its components
    FOLDER/transformer/config.json       and so on: connectors, vae, audio_vae, vocoder
    FOLDER/transformer/diffusion_pytorch_model-00001-of-00008.safetensors, and an index
    FOLDER/scheduler/scheduler_config.json

The text encoder is no part of a base: diffusers takes it as an argument, see
docs/converting.md. Memory holds one tensor. The folder is made under a temporary name
and renamed, so that it is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from idlora_jax.config_video_vae import video_vae_config
from idlora_jax.files import PathLike, problem
from idlora_jax.weights import (
    diffusers_audio,
    diffusers_config,
    diffusers_keys,
    diffusers_vae,
    fp8,
    hub_folder,
    io,
    leaves,
    shards,
    tensorfile,
)
from idlora_jax.weights.bases import BaseFile
from idlora_jax.weights.diffusers_open import COMPONENTS, CONFIG, MODEL_INDEX
from idlora_jax.weights.progress import Progress, bar
from idlora_jax.weights.tensorfile import Entry

STEM = "diffusion_pytorch_model"
_LIBRARY = {"transformer": "diffusers", "vae": "diffusers", "audio_vae": "diffusers"}
_ABSENT = ("text_encoder", "tokenizer", "processor", "prompt_enhancer", "duration_head")
_MADE_OF = "idlora_jax.json"
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
Section = dict[str, Any]


def _config(base: BaseFile, name: str) -> Section:
    """The config.json of one component."""
    generation = base.generation
    if name == "vocoder":
        return diffusers_audio.vocoder_to_diffusers(base.config[name])
    if name == "video_vae":
        cfg = video_vae_config(base.config, generation)
        return diffusers_vae.video_vae_to_diffusers(cfg, generation)
    write: dict[str, Callable[[Any], Section]] = {
        "transformer": diffusers_config.transformer_to_diffusers,
        "text_connector": diffusers_config.connectors_to_diffusers,
        "audio_vae": diffusers_audio.audio_vae_to_diffusers,
    }
    return write[name](io.network_config(base, name))


def _class(base: BaseFile, name: str) -> str:
    extended = name == "vocoder" and diffusers_audio.has_extension(base.config[name])
    return COMPONENTS[name].classes[-1 if extended else 0]


def _entries(base: BaseFile, name: str, dtype: Any | None) -> list[Entry]:
    """The tensors of one component under diffusers' names."""
    found, needed = io.locate(base, name)
    for path, leaf in found.items():
        wide = fp8.upcast(path, leaf, dtype)
        target = leaves.kept_dtype(path, wide.spec.dtype, dtype)
        found[path] = wide._replace(spec=wide.spec._replace(dtype=target))
    names = COMPONENTS[name].names(base.config, base.generation)
    out = []
    for entry in leaves.original_entries(found, needed):
        spelled = diffusers_keys.to_diffusers(names, entry.name)
        if spelled is not None:
            out.append(entry._replace(name=spelled))
        else:
            assert entry.name in diffusers_keys.DROPPED, entry.name
    return out


def _scheduler(distilled: bool) -> Section:
    """Shifted by the number of tokens, or a distilled model's noise levels as given."""
    return {
        "_class_name": _SCHEDULER,
        "use_dynamic_shifting": not distilled,
        "base_shift": 0.95,
        "max_shift": 2.05,
        "base_image_seq_len": 1024,
        "max_image_seq_len": 4096,
        "shift_terminal": None if distilled else 0.1,
    }


def _model_index(base: BaseFile, names: Sequence[str]) -> Section:
    index: Section = {
        "_class_name": "LTX2Pipeline",
        **dict.fromkeys(_ABSENT, (None,) * 2),
    }
    for name, part in COMPONENTS.items():
        library = _LIBRARY.get(part.folder, "ltx2")
        held = name in names
        index[part.folder] = (library, _class(base, name)) if held else (None, None)
    return index | {"scheduler": ("diffusers", _SCHEDULER)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_shards(
    folder: Path, stem: str, entries: Sequence[Entry], limit: int, progress: Progress
) -> None:
    """Write tensors as diffusers and transformers do: shards, an index if several."""
    folder.mkdir(exist_ok=True)
    pieces = shards.split(stem, entries, limit)
    for shard in pieces:
        counted = [shards.counted(entry, progress) for entry in shard.entries]
        tensorfile.write(folder / shard.name, counted, {"format": "pt"})
    if len(pieces) > 1:
        index = hub_folder.index_text({s.name: s.entries for s in pieces})
        (folder / f"{stem}{hub_folder.INDEX}").write_text(index, encoding="utf-8")


def _is_done(folder: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a folder is this export already; anything else there is an error."""
    if (folder / _MADE_OF).is_file() and hub_folder.parsed(folder / _MADE_OF) == wanted:
        return True
    shards.refuse_occupied(folder)
    return False


def export_diffusers(
    source: PathLike,
    folder: PathLike,
    dtype: Any | None = None,
    *,
    networks: Sequence[str] | None = None,
    distilled: bool = False,
    limit: int = shards.LIMIT,
    say: Callable[[str], Any] = print,
) -> tuple[str, ...]:
    """Write a base as a pipeline folder that diffusers' classes load.

    Args:
        source: an original .safetensors file, or a converted folder.
        folder: to be made; absent or empty. One that is this export is kept.
        dtype: of the parameters (default: as stored; those in 8 bits become the others'
            dtype). Tables stored in float32 stay so.
        networks: names of `io.NETWORKS` (default: all that the source holds).
        distilled: whether the source is a distilled model, whose noise levels must not
            be shifted by diffusers' scheduler; no file says it.
        limit: bytes of a shard, unless one tensor is larger.
        say: takes a line about what was written.

    Returns:
        The names of the networks that were written.

    Raises:
        ValueError: if the source is incomplete or of diffusers already, the folder is
            occupied, or diffusers cannot describe a network.
        OSError: if it cannot be written; nothing is left behind.
    """
    base, destination = io.open_base(source), Path(folder)
    if base.path.is_dir() and not base.converted:
        hint = "the folder has diffusers' names already"
        raise problem("export", source, "a folder of diffusers", "another base", hint)
    names = io.chosen(base, networks)
    made_of = {
        "base_hash": base.base_hash,
        "dtype": None if dtype is None else np.dtype(dtype).name,
        "networks": [*names],
        "distilled": distilled,
    }
    if _is_done(destination, made_of):
        say(f"{destination} holds this export already; nothing to do")
        return names
    configs = {name: _config(base, name) for name in names}
    entries = {name: _entries(base, name, dtype) for name in names}
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    total = sum(entry.spec.nbytes for group in entries.values() for entry in group)
    shards.require_space(destination.absolute().parent, total)
    try:
        temporary.mkdir()
        with bar(total, "exporting") as progress:
            for name in names:
                inner = temporary / COMPONENTS[name].folder
                write_shards(inner, STEM, entries[name], limit, progress)
                about = {"_class_name": _class(base, name), **configs[name]}
                _write_json(inner / CONFIG, about)
        scheduler = _scheduler(distilled)
        _write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(temporary / MODEL_INDEX, _model_index(base, names))
        _write_json(temporary / _MADE_OF, made_of)
        os.replace(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    say(f"wrote {destination}: {', '.join(names)}, {total / 1e9:.2f} GB")
    return names

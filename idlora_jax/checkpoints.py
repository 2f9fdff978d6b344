"""Adapters as safetensors files with metadata, and the training state on disk.

Every file is written under a temporary name and renamed, so that a full disk or a kill
leaves either the old file or none.

Source: ltx_trainer/trainer.py: _save_checkpoint (key format); our own metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from idlora_jax import __version__, adapters
from idlora_jax.types import Adapter, Tree
from idlora_jax.weights import lora


@dataclass(frozen=True)
class AdapterMeta:
    """What a reader must know to use an adapter as it was trained.

    Attributes:
        generation: "2.0" or "2.3"; empty where a file does not say.
        base_hash: content hash of the base it was trained on.
        rank: largest rank.
        alpha: scale times rank; already folded into the saved b.
        targets: patterns of adapted modules.
        step: optimiser steps.
        numerics: how positions were made.
        reference_gap_s: seconds between the reference's end and time 0.
        video_sees_ref: False if audio-to-video attention was blind to the reference.
        ref_sees_text: False if reference rows were blind to text.
        fps: frames per second of the training clips.
        version: of this library.
        extra: anything else, as strings.
        content_hash: of the tensors, recorded when saved; of the file's bytes where a
            file of others records none.
    """

    generation: str = ""
    base_hash: str = ""
    rank: int = 0
    alpha: float = 0.0
    targets: tuple[str, ...] = ()
    step: int = 0
    numerics: str = "exact"
    reference_gap_s: float = 0.04
    video_sees_ref: bool = True
    ref_sees_text: bool = True
    fps: float = 25.0
    version: str = __version__
    extra: dict[str, str] = field(default_factory=dict)
    content_hash: str = ""


def file_hash(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, np.ndarray]) -> str:
    """The sha256 of names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_adapter(
    path: str | os.PathLike[str],
    adapter: Adapter,
    meta: AdapterMeta,
    dtype: Any = None,
) -> AdapterMeta:
    """Write an adapter whose b is already scaled; returns `meta` with its hash.

    Args:
        path: the .safetensors file.
        adapter: see `adapters`.
        meta: written as JSON under the metadata key "idlora".
        dtype: of the saved tensors (default: as they are).

    Raises:
        OSError: if the file cannot be written; nothing is left behind.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fields = asdict(meta)
    try:
        tensors = lora.export(adapter, dtype)
        fields["content_hash"] = tensors_hash(tensors)
        save_file(tensors, temporary, metadata={"idlora": json.dumps(fields)})
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error}); free some space") from None
    finally:
        temporary.unlink(missing_ok=True)
    return AdapterMeta(**fields)


def read_tensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        ValueError: if the file is missing, truncated or not safetensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a .safetensors file")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); copy it again"
        ) from None


def _recorded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `AdapterMeta` that a file records; none where it is not ours."""
    try:
        fields = json.loads(metadata.get("idlora", "{}"))
    except json.JSONDecodeError:
        return {}
    if not isinstance(fields, dict):
        return {}
    known = {k: v for k, v in fields.items() if k in AdapterMeta.__dataclass_fields__}
    return known | {"targets": tuple(known.get("targets", ()))}


def load_adapter(
    path: str | os.PathLike[str], base: Tree
) -> tuple[Adapter, AdapterMeta]:
    """Read an adapter file and check it against the base.

    Args:
        path: a .safetensors file in the ComfyUI key format, ours or another's.
        base: transformer parameters, or their shapes.

    Raises:
        ValueError: if the file is unreadable, or does not fit the base.
    """
    tensors, metadata = read_tensors(path)
    try:
        adapter = lora.import_(tensors, base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = _recorded(metadata)
    known.setdefault("rank", adapters.rank(adapter))
    known["content_hash"] = known.get("content_hash") or file_hash(path)
    return adapter, AdapterMeta(**known)


def _manager(folder: str | os.PathLike[str], keep: int | None = None) -> Any:
    import orbax.checkpoint as ocp  # seconds to import, and only training needs it

    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=keep is not None, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager(pathlib.Path(folder).resolve(), options=options)


def latest(folder: str | os.PathLike[str]) -> int | None:
    """The newest step saved in a folder, or None."""
    if not pathlib.Path(folder).is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def save_state(
    folder: str | os.PathLike[str],
    step: int,
    state: Any,
    meta: dict[str, Any],
    *,
    keep: int,
) -> None:
    """Write a training state; older ones beyond `keep` are removed afterwards.

    Args:
        folder: of the states, one folder a step.
        step: its number; a step that is there already is left alone.
        state: any tree of arrays.
        meta: anything JSON, for `restore_state` to return.
        keep: how many states stay.

    Raises:
        OSError: if it cannot be written; the older states stay.
    """
    import orbax.checkpoint as ocp

    with _manager(folder, keep) as manager:
        if step not in manager.all_steps():
            items = {"state": ocp.args.StandardSave(state)}
            manager.save(
                step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
            )


def state_meta(folder: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """The metadata saved with a state."""
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        wanted = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return manager.restore(step, args=wanted)["meta"]


def restore_state(folder: str | os.PathLike[str], step: int, like: Any) -> Any:
    """Read a training state.

    Args:
        folder: as given to `save_state`.
        step: which one (`latest`).
        like: a tree of arrays (or shapes) of the same structure.

    Raises:
        ValueError: if it is damaged, or its shapes are not those of `like`.
    """
    import orbax.checkpoint as ocp

    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
    try:
        with _manager(folder) as manager:
            return manager.restore(step, args=wanted)["state"]
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{folder}/{step}: this training state is damaged or of another adapter "
            f"({str(error).splitlines()[0]}); delete it to resume from an older one"
        ) from None

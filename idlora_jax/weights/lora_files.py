"""Opening a LoRA file or folder: tensors, what it says of itself, how it is scaled.

The change of a module is B A times a factor that tools keep in different places: in a
tensor <module>.alpha, in an adapter_config.json beside the file (PEFT), in the file's
metadata (diffusers), or nowhere, which means 1. `open_lora` finds them, `factor` gives
the number, `pair_tensors` reads a pair with the factor folded into B.

Source: peft LoraConfig, LoraLayer.update_layer, utils/other.py: get_pattern_key;
diffusers loaders/lora_base.py: LORA_ADAPTER_METADATA_KEY.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idlora_jax.files import PathLike, problem
from idlora_jax.weights import identify, tensorfile
from idlora_jax.weights.lora_match import Pair
from idlora_jax.weights.rules import KeyMismatchError
from idlora_jax.weights.tensorfile import Tensors

OURS = "idlora"
"""Metadata key of what this library records, as JSON."""
DOWNSCALE = "reference_downscale_factor"
"""Metadata key of how many times smaller video references were, for any program."""
THEIRS = "lora_adapter_metadata"
"""Metadata key of PEFT's settings in files of diffusers, names behind a prefix."""
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
CONNECTORS = "connectors"
"""The folder, within one of the transformer's, of the text connector's adapter."""
_PREFIXES = ("base_model.model.", "transformer.", "connectors.")
_NETWORKS = {"transformer.": "transformer", "connectors.": "text_connector"}
_KINDS = {"extra": dict, "alpha": (int, float), "generation": str}
"""What recorded fields must be to be believed."""
NETWORKS = tuple(_NETWORKS.values())
"""Those that a LoRA file may change."""


class Settings(NamedTuple):
    """How PEFT scales the pairs of one network; see LoraConfig."""

    alpha: float
    rank: int | None
    alphas: dict[str, float]
    ranks: dict[str, int]
    root: bool


class LoraFile(NamedTuple):
    """A LoRA file or folder that was opened, not read.

    Attributes:
        path: as given.
        files: that hold the tensors.
        tensors: of all its files.
        recorded: what this library recorded in it, {} where it did not.
        settings: by network, where the file or a file beside it has some.
        identity: tells it from other files, and from itself after a change.
        notes: what a person should know about it.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Tensors
    recorded: dict[str, Any]
    settings: dict[str, Settings]
    identity: str
    notes: tuple[str, ...]


def _json(path: PathLike, text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    raise problem("lora", path, f"{what} that is no JSON object", "one", "copy it anew")


def _settings(path: PathLike, raw: Mapping[str, Any]) -> Settings:
    """PEFT's settings, checked to be of plain LoRA."""
    odd = {k: raw[k] for k in ("use_dora", "lora_bias") if raw.get(k)}
    if raw.get("peft_type", "LORA") != "LORA":
        odd["peft_type"] = raw["peft_type"]
    if raw.get("bias", "none") != "none":
        odd["bias"] = raw["bias"]
    if odd:
        got, do = f"an adapter with {odd}", "merge or convert it with peft"
        raise problem("lora", path, got, "plain LoRA", do)
    try:
        return Settings(
            alpha=_number(raw.get("lora_alpha", 8)),
            rank=int(raw["r"]) if "r" in raw else None,
            alphas={k: _number(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
            ranks={k: int(v) for k, v in (raw.get("rank_pattern") or {}).items()},
            root=bool(raw.get("use_rslora", False)),
        )
    except (TypeError, ValueError, AttributeError, OverflowError):
        got = "lora_alpha, r or a pattern that is no number"
        raise problem("lora", path, got, "numbers", "export it again") from None


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _of_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, Settings]:
    """The settings that diffusers writes into a file."""
    if THEIRS not in metadata:
        return {}
    raw = _json(path, metadata[THEIRS], f"a {THEIRS!r}")
    if "lora_alpha" in raw:  # of one model's file, names without a prefix
        return dict.fromkeys(NETWORKS, _settings(path, raw))
    found = {}
    for prefix, network in _NETWORKS.items():
        own = {
            k.removeprefix(prefix): v for k, v in raw.items() if k.startswith(prefix)
        }
        if own:
            found[network] = _settings(path, own)
    return found


def _recorded(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        fields = json.loads(metadata.get(OURS, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(fields, dict):
        return {}
    return {k: v for k, v in fields.items() if isinstance(v, _KINDS.get(k, object))}


def _weights(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    got, do = f"a folder without {WEIGHTS[0]}", "give the .safetensors file"
    if (folder / "adapter_model.bin").is_file():
        got, do = "a pickle (adapter_model.bin)", "save it as safetensors with peft"
    raise problem("lora", folder, got, "a PEFT or diffusers LoRA folder", do)


def _files(path: Path) -> dict[tuple[str, ...], Path]:
    """The weight files by the networks that an adapter_config.json beside is about."""
    main = _weights(path) if path.is_dir() else path
    second = main.parent / CONNECTORS / WEIGHTS[0]
    if main.name == WEIGHTS[0] and second.is_file():
        return {("transformer",): main, ("text_connector",): second}
    return {NETWORKS: main}


def open_lora(path: PathLike) -> LoraFile:
    """Open a LoRA file, or the folder that PEFT or diffusers makes; no tensor is read.

    Raises:
        ValueError: if something is missing, truncated, or says what cannot be.
    """
    path = Path(path)
    files = _files(path)
    heads = {about: tensorfile.header(file) for about, file in files.items()}
    for about, head in heads.items():
        identify.require_lora(files[about], head)
    opened = tensorfile.tensors_of(*files.values())
    settings: dict[str, Settings] = {}
    recorded: dict[str, Any] = {}
    identity: list[str] = []
    notes: list[str] = []
    for about, file in files.items():
        head, beside = heads[about], file.parent / CONFIG
        identity += [head.fingerprint, str(file.stat().st_mtime_ns)]
        settings |= _of_metadata(file, head.metadata)
        recorded = recorded or _recorded(head.metadata)
        if not any(key.startswith("base_model.model.") for key in head.tensors):
            continue
        if beside.is_file():
            text = beside.read_text("utf-8", errors="replace")
            found = _settings(beside, _json(beside, text, "a file"))
            settings |= dict.fromkeys(about, found)
            identity.append(text)
        elif not recorded:
            notes.append(f"no {CONFIG} beside {file.name}: alpha is taken as the rank")
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    held = tuple(files.values())
    return LoraFile(path, held, opened, recorded, settings, digest, tuple(notes))


def verify(file: LoraFile) -> None:
    """Read every byte, and compare with the hashes recorded when it was written.

    Raises:
        ValueError: if a file changed, or records no hash.
    """
    for path in file.files:
        if not tensorfile.verify(path):
            got, do = "other bytes", "copy or convert it again"
            raise problem("verify", path, got, "those of the recorded hash", do)


def _chosen(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, as PEFT does."""
    for pattern, value in patterns.items():
        plain = pattern.removeprefix("^")
        if plain == name or (plain == pattern and name.endswith(f".{plain}")):
            return value
        if re.fullmatch(r"[\w.^-]+", pattern):
            continue
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        except re.error:
            raise KeyMismatchError(f"{CONFIG}: {pattern!r} is no pattern") from None
    return default


def alpha_of(file: LoraFile, pair: Pair) -> float | None:
    """The alpha that a file gives a pair; None where it gives none.

    Raises:
        ValueError: if it is no finite number, or the settings say another rank.
    """
    if pair.alpha is not None:
        alpha = float(np.asarray(file.tensors.tensor(pair.alpha)).reshape(()))
        if not math.isfinite(alpha):
            raise ValueError(
                f"{file.path}: {pair.alpha}: got {alpha}, expected a number"
            )
        return alpha
    settings = file.settings.get(pair.slot.module.network)
    if settings is None:
        return None
    name = pair.name
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    rank = _chosen(settings.ranks, name, settings.rank)
    if rank not in (None, pair.rank):
        got, do = f"rank {rank} of {pair.name}", "do the files belong together?"
        raise problem("lora", file.path, got, f"{pair.rank}, the tensors'", do)
    return _chosen(settings.alphas, name, settings.alpha)


def factor(file: LoraFile, pair: Pair) -> float:
    """What B A is multiplied with: alpha / rank, alpha / sqrt(rank), or 1."""
    alpha = alpha_of(file, pair)
    if alpha is None:
        return 1.0
    settings = file.settings.get(pair.slot.module.network)
    root = pair.alpha is None and settings is not None and settings.root
    return alpha / (math.sqrt(pair.rank) if root else pair.rank)


def _finite(x: np.ndarray) -> bool:
    if x.dtype.itemsize != 2:
        return bool(np.isfinite(x).all())
    exponent = 0x7C00 if x.dtype == np.float16 else 0x7F80
    return not ((x.view(np.uint16) & exponent) == exponent).any()


def tensor(file: LoraFile, key: str) -> np.ndarray:
    """One tensor of a pair.

    Raises:
        ValueError: if it holds NaN or infinity.
    """
    found = np.ascontiguousarray(file.tensors.tensor(key))
    if not _finite(found):
        do = "the training diverged, or the file is damaged"
        raise problem("lora", file.path, f"NaN or infinity in {key}", "numbers", do)
    return found


def folded(x: np.ndarray, scale: float, dtype: Any, key: str) -> np.ndarray:
    """`x` times `scale`, in float32 and rounded once to `dtype`; equal for scale 1.

    Raises:
        ValueError: if a value is too large for `dtype`.
    """
    if scale == 1.0 and x.dtype == dtype:
        return x
    product = x.astype(np.float32) * np.float32(scale) if scale != 1.0 else x
    with np.errstate(over="ignore"):
        out = product.astype(dtype)
    if not _finite(out):
        name = np.dtype(dtype).name
        raise ValueError(f"{key}: a value is too large for {name}; use bf16 or f32")
    return out


def pair_tensors(
    file: LoraFile, pair: Pair, strength: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """A pair as it is stored, lora_A [R I] and lora_B [O R], factors folded into B.

    Raises:
        ValueError: for values that are no finite numbers, or settings that cannot be.
    """
    a, b = tensor(file, pair.a), tensor(file, pair.b)
    return a, folded(b, factor(file, pair) * strength, b.dtype, pair.b)

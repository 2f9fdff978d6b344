"""What a file or folder is, told from headers in a moment, for reports and for errors.

    identify("ltx-2.3-22b-dev.safetensors").description
    a base checkpoint of generation 2.3 (5,947 tensors, 23.07 B parameters, BF16, F32)

Names of tensors and metadata decide; no tensor is read. Somebody who gives one file in
the place of another is told what it is and which script takes it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from idlora_jax.config import detect_generation
from idlora_jax.files import PathLike, problem
from idlora_jax.weights import hub_folder
from idlora_jax.weights.header import DTYPES, Header, Spec, header, recognise, shown
from idlora_jax.weights.lora_generation import lora_generation

What = Literal[
    "base",
    "lora",
    "upsampler",
    "text_encoder",
    "adapter of ours",
    "converted network",
    "latents",
    "unknown",
]

_UNKNOWN: What = "unknown"

ADVICE: dict[What, str] = {
    "base": "convert/base.py converts it, train.py and sample.py take it as the base",
    "lora": "convert/lora.py takes it, with the base it was trained on",
    "upsampler": "convert/upsampler.py takes it",
    "text_encoder": "convert/text_encoder.py takes its folder",
    "adapter of ours": "convert/lora.py takes it, sample.py takes it as an adapter",
    "converted network": "give the folder it lies in",
    "latents": "convert/dataset.py takes the folders of a data set",
    "unknown": "give the single-file checkpoint (ltx-2-19b-dev.safetensors or alike)",
}
"""What to do with each kind."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Kind:
    """What a file or folder is.

    Attributes:
        kind: in one word or two.
        generation: "2.0" or "2.3"; empty where nothing tells it.
        tensors: how many.
        parameters: their values, fp8 scales included.
        dtypes: their names in safetensors, the most frequent first.
        description: one line for people, which begins with an article.
        advice: which script takes it.
    """

    kind: What
    generation: str
    tensors: int
    parameters: int
    dtypes: tuple[str, ...]
    description: str
    advice: str


class _Found(NamedTuple):
    """All headers of a file or folder, and the folder's configuration."""

    tensors: Mapping[str, Spec]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]


_LORA = re.compile(r"[._]lora[._]?(A|B|down|up)\b|^lora_unet_")
_DOWN = re.compile(r"[._]lora[._]?(A|down)\b")

_GEMMA = ("language_model.", "model.language_model.", "vision_tower.", "embed_tokens.")
_DIT = ("model.diffusion_model.", "diffusion_model.", "transformer_blocks.")
_CODECS = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.")
_SECTIONS = {"transformer", "vae", "audio_vae", "vocoder"}
_FEATURES = {"latents", "prompt_embeds", "video_prompt_embeds"}
_DATA = {"latents", "audio_latents", "reference_audio_latents", "conditions"}


def _starts(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _embedded(metadata: Mapping[str, str], key: str = "config") -> dict[str, Any]:
    """A JSON object in the metadata; empty where there is none."""
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_base(found: _Found) -> bool:
    names = found.tensors
    return (
        _starts(names, _DIT[:1] + _CODECS)
        or bool(_SECTIONS & _embedded(found.metadata).keys())
        or _starts(names, _DIT[1:])
        or "LTX2" in str(found.config.get("_class_name"))
    )


def _is_upsampler(found: _Found) -> bool:
    ends = ("initial_conv.", "final_conv.")
    classes = (found.config, _embedded(found.metadata))
    named = any("Upsampler" in str(c.get("_class_name")) for c in classes)
    inside = all(_starts(found.tensors, (prefix,)) for prefix in ends)
    return named or inside or found.metadata.get("network") == "upsampler"


def _is_text(found: _Found) -> bool:
    plain = any(
        "self_attn." in n and n.startswith("model.layers.") for n in found.tensors
    )
    return plain or _starts(found.tensors, _GEMMA)


_TESTS: tuple[tuple[What, Callable[[_Found], bool]], ...] = (
    ("adapter of ours", lambda found: "idlora" in found.metadata),
    ("lora", lambda found: any(_LORA.search(name) for name in found.tensors)),
    ("upsampler", _is_upsampler),
    ("converted network", lambda found: {"network", "base_hash"} <= {*found.metadata}),
    ("text_encoder", _is_text),
    ("base", _is_base),
    ("latents", lambda found: bool(_FEATURES & found.tensors.keys())),
)
"""In this order: a LoRA has the base's names with more behind them."""


def _generation(kind: What, found: _Found) -> str:
    if kind in ("lora", "adapter of ours"):
        said = str(_embedded(found.metadata, "idlora").get("generation", ""))
        return said if said in ("2.0", "2.3") else lora_generation(found.tensors)
    if kind != "base":
        return ""
    config = _embedded(found.metadata)
    version = found.metadata.get("model_version")
    if isinstance(config.get("transformer"), dict):
        return detect_generation(config, version)
    if any("to_gate_logits" in name for name in found.tensors):
        return "2.3"
    whole = any("caption_projection" in name for name in found.tensors)
    return "2.0" if whole else ""


def _noun(kind: What, found: _Found) -> str:
    nouns: dict[What, str] = {
        "base": "a base checkpoint",
        "lora": "an adapter (LoRA)",
        "upsampler": "a latent upsampler",
        "text_encoder": "a text encoder, or a part of one",
        "adapter of ours": "an adapter (ID-LoRA)",
        "converted network": f"the {found.metadata.get('network')} of a converted base",
        "latents": "latents or text features of a data set",
        "unknown": f"a file of unknown tensors {shown([*found.tensors][:2])}",
    }
    part = kind == "base" and not any(
        mark in name for name in found.tensors for mark in _DIT
    )
    return "a part of a base checkpoint" if part else nouns[kind]


def _amount(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,}"


def _described(kind: What, generation: str, noun: str, found: _Found) -> Kind:
    specs = found.tensors.values()
    count = sum(math.prod(spec.shape) for spec in specs)
    ranks = [
        s.shape[0] for n, s in found.tensors.items() if s.shape and _DOWN.search(n)
    ]
    counted = Counter(_NAMES[spec.dtype] for spec in specs)
    dtypes = tuple(name for name, _ in counted.most_common())
    amounts = [f"{len(specs):,} tensors", f"{_amount(count)} parameters"]
    amounts += [f"rank {max(ranks)}"] if ranks else []
    amounts += [", ".join(dtypes)] if dtypes else []
    of = f" of generation {generation}" if generation else ""
    text = f"{noun}{of} ({', '.join(amounts)})"
    return Kind(kind, generation, len(specs), count, dtypes, text, ADVICE[kind])


def _kind(found: _Found) -> Kind:
    hits: list[What] = [kind for kind, test in _TESTS if test(found)]
    kind = hits[0] if hits else _UNKNOWN
    return _described(kind, _generation(kind, found), _noun(kind, found), found)


def of_header(head: Header) -> Kind:
    """What a safetensors file is, its header being read already."""
    return _kind(_Found(head.tensors, head.metadata, {}))


def _other(what: str, advice: str, kind: What = "unknown") -> Kind:
    return Kind(kind, "", 0, 0, (), what, advice)


def _file(path: Path) -> Kind:
    if path.suffix == ".pt" and path.parent.name in _DATA:
        return _other("a .pt file of a data set", ADVICE["latents"], "latents")
    try:
        return of_header(header(path))
    except ValueError as error:
        with open(path, "rb") as file:
            found = recognise(file.read(64))
        return _other(*(found or (f"a damaged file ({error})", "copy it again")))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return _embedded({"config": path.read_text("utf-8", errors="replace")})


def _merged(folder: Path, files: Mapping[str, Path]) -> _Found:
    """All headers of a folder; a key of `files` begins with what tells parts apart."""
    tensors: dict[str, Spec] = {}
    metadata: dict[str, str] = {}
    for name, path in files.items():
        head, part = header(path), name.rpartition("/")[0]
        metadata |= head.metadata
        tensors |= {f"{part}/{k}" if part else k: v for k, v in head.tensors.items()}
    return _Found(tensors, metadata, _json(folder / "config.json"))


def _folder(folder: Path) -> Kind:
    manifest = _json(folder / "manifest.json")
    inner = {f"{p.parent.name}/{p.name}": p for p in folder.glob("*/*.safetensors")}
    if "base_hash" in manifest:
        own = folder.glob("*.safetensors")
        found = _merged(folder, {f"{path.stem}/{path.name}": path for path in own})
        said = str(manifest.get("generation", ""))
        return _described("base", said, "a converted base", found)
    if (folder / "model_index.json").is_file():
        found = _merged(folder, inner)
        said = _generation("base", found)
        return _described("base", said, "a base in diffusers' form", found)
    if any((folder / name).is_dir() for name in (*_DATA, ".precomputed")):
        return _other("a folder of a data set", ADVICE["latents"], "latents")
    files = {path.name: path for path in hub_folder.files_of(folder)}
    if not files:
        return _other("a folder without .safetensors files", ADVICE["unknown"])
    return _kind(_merged(folder, files))


def identify(path: PathLike) -> Kind:
    """Tell what a file or folder is; only headers are read.

    A damaged file or folder is of kind "unknown", and its description says the damage.

    Raises:
        ValueError: if there is nothing at that path.
    """
    path = Path(path)
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        what = "a file or folder"
        raise problem("identify", path, "no such file", what, "check the path")
    try:
        return _folder(path)
    except ValueError as error:
        return _other(f"a damaged folder ({error})", "copy or download it again")


def require_lora(path: PathLike, head: Header) -> None:
    """Refuse what is certainly no LoRA; what is unknown may be one.

    Args:
        path: the file.
        head: its header.

    Raises:
        ValueError: saying what the file is, and which script takes it.
    """
    found = of_header(head)
    if found.kind not in ("lora", "adapter of ours", "unknown"):
        raise problem("lora", path, found.description, "a LoRA file", found.advice)


def require_base(path: PathLike, head: Header) -> None:
    """Refuse what is known to be something else than a base checkpoint.

    Raises:
        ValueError: saying what the file is and which script takes it, or that it has no
            embedded configuration, or one of odd sections.
    """
    found, config = of_header(head), _embedded(head.metadata)
    other = found.kind not in ("base", "unknown")
    absent = "config" not in head.metadata
    if other or absent:
        got = found.description + absent * " whose metadata has no 'config'"
        do = found.advice if other else ADVICE["unknown"]
        raise problem("weights", path, got, "a base checkpoint", do)
    for name in sorted(_SECTIONS & config.keys()):
        if not isinstance(config[name], dict):
            got = f"a 'config' whose {name!r} is {shown(config[name])}"
            raise problem("weights", path, got, "an object", "download it again")

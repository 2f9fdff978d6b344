"""Folders of diffusers as original files: keys and config in the original spelling.

A pipeline folder has model_index.json and a folder per component, of which any may be
absent; a component's folder alone is taken, too. `describe` reads the config.json
files, `tensors` opens the weights under original key names, so that whatever reads an
original file reads such a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from idlora_jax.config import Generation, Json, detect_generation
from idlora_jax.config_video_vae import video_vae_config
from idlora_jax.files import problem
from idlora_jax.weights import (
    diffusers_audio,
    diffusers_config,
    diffusers_keys,
    diffusers_vae,
    hub_folder,
    tensorfile,
)
from idlora_jax.weights.diffusers_config import Section
from idlora_jax.weights.diffusers_keys import Names
from idlora_jax.weights.tensorfile import Tensors

MODEL_INDEX, CONFIG = "model_index.json", "config.json"


class Component(NamedTuple):
    """A network as diffusers keeps it.

    `sections` takes config.json and the generation; `names` the embedded config and the
    generation.
    """

    folder: str
    classes: tuple[str, ...]
    sections: Callable[[Json, Generation], dict[str, Section]]
    names: Callable[[Json, Generation], Names]


def _vocoder_names(config: Json) -> Names:
    extended = diffusers_audio.has_extension(config.get("vocoder", {}))
    return diffusers_keys.VOCODER_WITH_EXTENSION if extended else diffusers_keys.VOCODER


COMPONENTS: dict[str, Component] = {
    "transformer": Component(
        "transformer",
        ("LTX2VideoTransformer3DModel",),
        lambda config, _: diffusers_config.transformer_to_original(config),
        lambda *_: diffusers_keys.TRANSFORMER,
    ),
    "text_connector": Component(
        "connectors",
        ("LTX2TextConnectors",),
        lambda config, _: diffusers_config.connectors_to_original(config),
        lambda *_: diffusers_keys.CONNECTORS,
    ),
    "video_vae": Component(
        "vae",
        ("AutoencoderKLLTX2Video",),
        diffusers_vae.video_vae_to_original,
        lambda config, generation: diffusers_keys.video_vae(
            video_vae_config(config, generation)
        ),
    ),
    "audio_vae": Component(
        "audio_vae",
        ("AutoencoderKLLTX2Audio",),
        lambda config, _: diffusers_audio.audio_vae_to_original(config),
        lambda *_: diffusers_keys.AUDIO_VAE,
    ),
    "vocoder": Component(
        "vocoder",
        ("LTX2Vocoder", "LTX2VocoderWithBWE"),
        lambda config, _: diffusers_audio.vocoder_to_original(config),
        lambda config, _: _vocoder_names(config),
    ),
}
"""By the name of our network."""

_BY_CLASS = {name: n for n, part in COMPONENTS.items() for name in part.classes}


class Described(NamedTuple):
    """What a folder says of itself, in the terms of an original file."""

    config: dict[str, Any]
    generation: Generation
    base_hash: str


def folders(path: Path) -> dict[str, Path]:
    """The component folders by the name of our network; empty if it is no such folder.

    Raises:
        ValueError: if a config.json of diffusers is damaged, or of another model.
    """
    if (path / CONFIG).is_file():
        # Only diffusers names a class in config.json.
        name = hub_folder.parsed(path / CONFIG).get("_class_name")
        return {_network(path, name): path} if name else {}
    inner = {n: path / part.folder for n, part in COMPONENTS.items()}
    return {n: folder for n, folder in inner.items() if (folder / CONFIG).is_file()}


def _network(path: Path, name: Any) -> str:
    if name not in _BY_CLASS:
        expected = f"one of {sorted(_BY_CLASS)}"
        hint = "give a folder of LTX-2 or LTX-2.3"
        raise problem("weights", path / CONFIG, f"class {name!r}", expected, hint)
    return _BY_CLASS[name]


def is_pipeline(path: Path) -> bool:
    """Whether a folder is one of diffusers', with components of an LTX-2 or not."""
    return (path / MODEL_INDEX).is_file() or bool(folders(path))


def _generation(configs: Mapping[str, Json]) -> Generation:
    """From the components that behave differently; the others' hints come last."""
    parts = ("transformer", "text_connector")
    for name in (n for n in parts if n in configs):
        return detect_generation(COMPONENTS[name].sections(configs[name], "2.0"))
    if "vocoder" in configs:
        return "2.3" if diffusers_audio.has_extension(configs["vocoder"]) else "2.0"
    vae = configs.get("video_vae", {})
    modes = {vae.get(f"{s}_spatial_padding_mode") for s in ("encoder", "decoder")}
    return "2.3" if modes == {"zeros"} else "2.0"


def describe(path: Path) -> Described:
    """Config, generation and hash of a folder; no tensor is read.

    Raises:
        ValueError: if it has no component of an LTX-2, a config.json is damaged or of
            another model, components contradict one another, or files are absent.
    """
    found = folders(path)
    if not found:
        folder_names = [part.folder for part in COMPONENTS.values()]
        got, hint = "a folder without any of them", "download the rest of it"
        raise problem("weights", path, got, f"some of {folder_names}", hint)
    configs = {n: hub_folder.parsed(folder / CONFIG) for n, folder in found.items()}
    for name, config in configs.items():
        if _network(found[name], config.get("_class_name")) != name:
            got = f"class {config['_class_name']!r}"
            expected = f"one of {[*COMPONENTS[name].classes]}"
            raise problem("weights", found[name], got, expected, "check the folder")
    generation = _generation(configs)
    try:
        said = ((n, COMPONENTS[n].sections(c, generation)) for n, c in configs.items())
        sections = diffusers_config.merged(said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Described(sections, generation, hub_folder.sampled(*found.values()))


def _component(folder: Path, names: Names) -> Tensors:
    tensors = hub_folder.tensors_in(folder)
    spelled = {key: diffusers_keys.to_original(names, key) for key in tensors.specs}
    odd = sorted(key for key, original in spelled.items() if original is None)
    if odd:
        more = " ..." if len(odd) > 6 else ""
        got = f"{len(odd)} tensors that an LTX-2 has not: {odd[:6]}{more}"
        hint = "is it a folder of LTX-2 or LTX-2.3? Download it again"
        raise problem("weights", folder, got, "those of diffusers' class", hint)
    return tensors.renamed({new: old for old, new in spelled.items() if new})


def files_of(path: Path) -> list[Path]:
    """The weight files of all components.

    Raises:
        ValueError: if an index is damaged, or files of it are absent.
    """
    return [file for f in folders(path).values() for file in hub_folder.files_of(f)]


def tensors(path: Path, config: Json, generation: Generation) -> Tensors:
    """The weights of all components under original key names; nothing is read.

    Args:
        path: the pipeline's folder, or a component's.
        config: of `describe`.
        generation: of `describe`.

    Raises:
        ValueError: if files are absent, damaged or do not fit their index, or a tensor
            has no original name.
    """
    parts = [
        _component(folder, COMPONENTS[name].names(config, generation))
        for name, folder in folders(path).items()
    ]
    return tensorfile.joined(parts)

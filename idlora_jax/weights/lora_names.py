"""What LoRA files call the modules: four tools' spellings of every adaptable kernel.

    comfyui    diffusion_model.<module>              text_embedding_projection.<module>
    diffusers  transformer.<module'>                 connectors.<module'>
    peft       base_model.model.<module'>            (one file for each network)
    kohya      lora_unet_<module, dots as "_">       (no name for the text projection)

<module> is the name in the original checkpoint, <module'> the one in diffusers'
classes, which call the parts outside the blocks otherwise. The table is derived from
that of the base, so every kernel has its names, and no name two kernels.

Source: ltx_core/loader/sd_ops.py; diffusers loaders/lora_conversion_utils.py:
_convert_non_diffusers_ltx2_lora_to_diffusers, scripts/convert_ltx2_to_diffusers.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from idlora_jax.types import Tree
from idlora_jax.weights import rules
from idlora_jax.weights.rules import Rule
from idlora_jax.weights.tables import TEXT_CONNECTOR, TRANSFORMER

Format = Literal["comfyui", "diffusers", "peft", "kohya"]
FORMATS: tuple[Format, ...] = get_args(Format)

_DIT = "diffusion_model."
_PEFT = "base_model.model."
_DIFFUSERS = {"transformer": "transformer.", "text_connector": "connectors."}

_RENAMED = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "video_embeddings_connector": "video_connector",
    "audio_embeddings_connector": "audio_connector",
    "transformer_1d_blocks": "transformer_blocks",
    "aggregate_embed": "text_proj_in",
    "video_aggregate_embed": "video_text_proj_in",
    "audio_aggregate_embed": "audio_text_proj_in",
}
"""Parts of an original name that diffusers calls otherwise, dot to dot."""


class Module(NamedTuple):
    """An adaptable kernel, with `{L}` for the layer where it is stacked.

    Attributes:
        network: "transformer" or "text_connector".
        path: of the kernel in that network's parameters.
        original: its name in a ComfyUI file.
        diffusers: its name in the network's class of diffusers, without a prefix.
    """

    network: str
    path: str
    original: str
    diffusers: str


class Slot(NamedTuple):
    """A place for a pair: a module, its layer (None where not stacked), its widths."""

    module: Module
    layer: int | None
    wide: int
    out: int

    @property
    def name(self) -> str:
        """Its name in a ComfyUI file."""
        return filled(self.module.original, self.layer)


def _module(rule: Rule) -> Module:
    network, path = rule.flax.split("/", 1)
    original = rule.torch.removeprefix("model.").removesuffix(".weight")
    bare = original.removeprefix(_DIT).removeprefix("text_embedding_projection.")
    theirs = ".".join(_RENAMED.get(part, part) for part in bare.split("."))
    return Module(network, path, original, theirs)


MODULES: tuple[Module, ...] = tuple(
    _module(rule) for rule in TRANSFORMER + TEXT_CONNECTOR if rule.layout == "linear"
)


def filled(template: str, layer: int | None) -> str:
    """A template with the layer's number."""
    return template if layer is None else template.replace("{L}", str(layer))


def spelled(module: Module, format: Format) -> str | None:
    """The template of a module's name in a format; None where it has none."""
    if format == "comfyui":
        return module.original
    if format == "diffusers":
        return _DIFFUSERS[module.network] + module.diffusers
    if format == "peft":
        return _PEFT + module.diffusers
    if not module.original.startswith(_DIT):
        return None
    return "lora_unet_" + module.original.removeprefix(_DIT).replace(".", "_")


def accepted(module: Module) -> Iterator[tuple[Format, str]]:
    """Every template that is read as a module's name, with the format it is of.

    Besides `spelled`: tools that keep the original names behind another prefix, behind
    the checkpoint's own, or behind none, and a kohya-style trainer that holds the
    transformer as `model` and the video's connector as `embeddings_connector`.
    """
    bare = module.original.removeprefix(_DIT)
    for format in FORMATS:
        name = spelled(module, format)
        if name is not None:
            yield format, name
    yield "comfyui", f"model.{module.original}"
    yield "comfyui", bare
    yield "diffusers", module.diffusers
    yield "diffusers", _DIFFUSERS[module.network] + bare
    yield "peft", _PEFT + module.original
    yield "peft", _PEFT + bare
    yield "kohya", "lora_unet_" + module.diffusers.replace(".", "_")
    flat = bare.replace(".", "_")
    if module.network == "transformer":
        yield "kohya", f"lora_unet_model_{flat}"
    elif flat.startswith("video_embeddings"):
        yield "kohya", "lora_unet_" + flat.removeprefix("video_")


def slots(bases: Mapping[str, Tree]) -> tuple[Slot, ...]:
    """The places that networks have for pairs.

    Args:
        bases: parameters, or their shapes, by network name.
    """
    flat = {name: rules.flatten(tree) for name, tree in bases.items()}
    return tuple(
        slot
        for module in MODULES
        for slot in _of(module, flat.get(module.network, {}).get(module.path))
    )


def _of(module: Module, kernel: Any | None) -> Iterator[Slot]:
    if kernel is None:
        return
    *stack, wide, out = kernel.shape
    for layer in range(stack[0]) if stack else (None,):
        yield Slot(module, layer, wide, out)


def index(places: tuple[Slot, ...]) -> dict[str, tuple[Format, Slot]]:
    """Every accepted name -> its format and place."""
    found: dict[str, tuple[Format, Slot]] = {}
    for slot in places:
        for format, template in accepted(slot.module):
            name = filled(template, slot.layer)
            _, other = found.setdefault(name, (format, slot))
            assert other == slot, f"{name} names {other.name} and {slot.name}"
    return found


_KNOWN = {template: module for module in MODULES for _, template in accepted(module)}
_LAYER = re.compile(r"(?<=_blocks[._])\d+")


def known(name: str) -> tuple[Module, int | None] | None:
    """The module and layer that a name means in any base, or None."""
    module = _KNOWN.get(_LAYER.sub("{L}", name, count=1))
    layer = _LAYER.search(name)
    return module and (module, int(layer.group()) if layer else None)

"""Reading the networks of a base checkpoint, a parameter at a time.

    open_base(path) -> BaseFile         see `bases`
    load_network(base, name) -> tree    checked for completeness, then read lazily

Reading permutes, casts and stacks one parameter, and hands it to the devices: the host
holds the final arrays and one stacked tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from idlora_jax.files import PathLike
from idlora_jax.types import Tree
from idlora_jax.weights import bases, catalog, fp8_files, leaves, rules, tensorfile
from idlora_jax.weights.bases import BaseFile, open_base
from idlora_jax.weights.catalog import (
    NETWORKS,
    Network,
    owner,
    read_config,
    shapes_of,
)
from idlora_jax.weights.fp8 import Choice, read, require_choice
from idlora_jax.weights.leaves import Leaf, Source, Where

__all__ = [
    "NETWORKS",
    "BaseFile",
    "Network",
    "load_network",
    "locate",
    "open_base",
    "owner",
    "read_config",
    "save_original",
    "shapes",
    "shapes_of",
]

_PROJECTIONS = {
    "text_embedding_projection.aggregate_embed.weight": 1,
    "text_embedding_projection.video_aggregate_embed.weight": 1,
    "projection/shared/kernel": 0,
    "projection/video/kernel": 0,
}
"""Tensors of which this axis is the text encoder's width times its number of states."""


def names_in(base: BaseFile) -> tuple[str, ...]:
    """The networks a base holds anything of, in the order of `NETWORKS`."""
    if base.converted:
        found = set(base.shards)
    else:
        found = {owner(key) for key in bases.original_specs(base)}
    return tuple(name for name in NETWORKS if name in found)


def chosen(base: BaseFile, networks: Sequence[str] | None) -> tuple[str, ...]:
    """The networks to work on: those named, or all that the base holds.

    Raises:
        ValueError: if it lacks one that is named.
    """
    held = names_in(base)
    absent = [name for name in networks or () if name not in held]
    if absent:
        raise ValueError(f"{base.path}: got networks {[*held]}, expected also {absent}")
    return tuple(name for name in held if networks is None or name in networks)


def specs(base: BaseFile, name: str) -> dict[str, tensorfile.Spec]:
    """Shapes and dtypes of a network's tensors, by the names they have on disk."""
    found = bases.tensors(base, name).specs
    return {k: v for k, v in found.items() if base.converted or owner(k) == name}


def unowned(base: BaseFile) -> list[str]:
    """Keys of an original checkpoint that belong to no network."""
    return sorted(key for key in bases.original_specs(base) if owner(key) is None)


def _text_states(base: BaseFile) -> int:
    """How many states the text encoder must give; no config says it."""
    specs = bases.tensors(base, "text_connector").specs
    flat = [specs[k].shape[axis] for k, axis in _PROJECTIONS.items() if k in specs]
    return flat[0] // catalog.text_width(base.config) if flat else catalog.STATES


def network_config(base: BaseFile, name: str) -> Any:
    """The frozen configuration of a base's network; see `read_config`."""
    states = _text_states(base) if name == "text_connector" else catalog.STATES
    return read_config(name, base.config, base.generation, states)


def shapes(base: BaseFile, name: str) -> Tree:
    """Shapes of the parameters that a base's network must have."""
    return shapes_of(name, network_config(base, name))


def locate(base: BaseFile, name: str) -> tuple[dict[str, Leaf], dict[str, Source]]:
    """Leaves and sources of a network by path, checked for completeness.

    Raises:
        ValueError: listing missing keys, wrong shapes and unexpected keys.
    """
    needed = leaves.sources(name, shapes(base, name), catalog.network(name).rules)
    tensors = bases.tensors(base, name)
    what = f"{base.path}: the {name} does not fit the config"
    if base.converted:
        found = fp8_files.from_converted(tensors, needed, Where(what, "convert again"))
        return found, needed
    todo = "is the file whole, and is it an LTX-2 checkpoint? Download it again"
    keys = [key for key in tensors.specs if owner(key) == name]
    where = Where(what, todo)
    scaled = name == "transformer" and fp8_files.lists_layers(base.path, base.metadata)
    found = fp8_files.from_original(tensors, keys, needed, where, scaled=scaled)
    return found, needed


Placement = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Parameter path and shape -> where its parts go."""


def load_network(
    base: BaseFile,
    name: str,
    dtype: Any | None = None,
    *,
    placement: Placement | None = None,
    weights: Choice = "upcast",
) -> Tree:
    """Read a network's parameters, one at a time, straight to their devices.

    Args:
        base: from `open_base`.
        name: one of `NETWORKS`.
        dtype: of the parameters (default: as stored). Scale and shift tables that the
            file holds in float32 stay so.
        placement: sharding by path and shape (default: whole, on the default device);
            a host reads and holds only the parts of its own devices. The parts of one
            in 8 bits are asked for one by one, as "PATH/values" and so on.
        weights: "upcast" multiplies kernels that the file holds in fp8 by their scales
            (bfloat16 unless `dtype` says otherwise), "keep" reads them as they are,
            "int8" makes all kernels of the blocks int8; see `quantized`. Only the
            transformer computes with 8 bits; other networks are up-cast. What a
            converted file holds in int8 is read so, whatever is asked.

    Raises:
        ValueError: if the file lacks keys, has others within the network's prefixes, or
            other shapes than the configuration says; all are listed. If a scale is not
            a finite number.
    """
    require_choice(weights)
    choice: Choice = weights if name == "transformer" else "upcast"
    return read_all(locate(base, name)[0], dtype, placement=placement, weights=choice)


def _placed(leaf: Leaf, dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
    """A parameter on its devices; parts that several hold are read once."""
    shape = leaf.spec.shape
    owners: dict[Any, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        index = () if index is None else index
        owners.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
    arrays = []
    for bounds, devices in owners.items():
        part = leaves.read_part(leaf, tuple(slice(*b) for b in bounds), dtype)
        kind: Any = {"memory_kind": sharding.memory_kind}
        own = (SingleDeviceSharding(device, **kind) for device in devices)
        put = [jax.device_put(part, place) for place in own]
        arrays += jax.block_until_ready(put)
    if isinstance(sharding, SingleDeviceSharding):
        # Made again of itself, it would forget that it is in host memory.
        return arrays[0]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def read_all(
    found: Mapping[str, Leaf],
    dtype: Any | None,
    *,
    placement: Placement | None = None,
    weights: Choice = "upcast",
) -> Tree:
    """Leaves by path -> nested parameters on devices, one at a time."""
    fp8_files.check_scales(found)

    def put(path: str, leaf: Leaf, target: np.dtype) -> jax.Array:
        if placement is not None:
            return _placed(leaf, target, placement(path, leaf.spec.shape))
        # Not jnp.asarray, which compiles once per shape (15 ms each, measured).
        # Waiting keeps one stack in flight: copies lag behind reading otherwise.
        return jax.block_until_ready(jax.device_put(leaves.read(leaf, target)))

    return rules.nest(
        {p: read(p, leaf, dtype, weights, put) for p, leaf in found.items()}
    )


def save_original(
    path: PathLike,
    tree: Mapping[str, Tree],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write networks as an original single file: key names, config, axis order.

    Args:
        path: the .safetensors file.
        tree: parameters by network name.
        config: the embedded JSON, all sections.
        metadata: further text, e.g. "model_version".

    Returns:
        The sha256 that is recorded in the file, its `base_hash`.

    Raises:
        ValueError: for a parameter that has no original name.
        OSError: if it cannot be written; nothing is left behind.
    """
    entries: list[tensorfile.Entry] = []
    for name, params in tree.items():
        needed = leaves.sources(name, params, catalog.network(name).rules)
        found = fp8_files.from_arrays(params, needed)
        entries += fp8_files.original_entries(found, needed)
    return tensorfile.write(path, entries, with_config(config, metadata))


def with_config(
    config: Mapping[str, Any], metadata: Mapping[str, str] | None
) -> dict[str, str]:
    """The metadata of an original file."""
    return {"config": json.dumps(config), **(metadata or {})}

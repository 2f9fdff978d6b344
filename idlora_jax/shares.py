"""What each device holds of a training run, and how the host sees all of it.

    state = made(init, mesh, base)       each array is made in parts, on its devices
    places = places_of(state, mesh)      where they lie; the compiled step keeps it so
    gathered(state.adapter)              all of it on the first process
    seen(x)                              a small array on every process

What is trained lies as the base does (`parallel.RULES`), and an adapter's a and b are
divided over `fsdp` in any case, along the network's width. An optimizer's moments and
averages lie as what they belong to. Without a mesh each function here does nothing.

Source: ZeRO, arXiv 1910.02054 (optimizer states, gradients and parameters in parts).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from idlora_jax import parallel, programs
from idlora_jax.config import TransformerConfig
from idlora_jax.settings import UsageError

NETWORK = "transformer"
_WIDE = {"/kernel/a": -2, "/kernel/b": -1}
"""The axis of an adapter's part that is as wide as the network."""


def _spread(place: NamedSharding, shape: tuple[int, ...], wide: int) -> NamedSharding:
    """The same, its wide axis also divided over `fsdp`, if that can be."""
    mesh, spec = place.mesh, [*place.spec, *[None] * (len(shape) - len(place.spec))]
    axes = (spec[wide],) if isinstance(spec[wide], str) else spec[wide] or ()
    if "fsdp" in axes:
        return place
    spec[wide] = (*axes, "fsdp")
    fits = shape[wide] % math.prod(mesh.shape[axis] for axis in spec[wide]) == 0
    return NamedSharding(mesh, P(*spec)) if fits else place


def mesh_of(text: str, cfg: TransformerConfig) -> Mesh | None:
    """The devices that a run is divided over; None: it is not.

    Args:
        text: sizes of axes, see `axes.parse`.
        cfg: the transformer.

    Raises:
        UsageError: if there are fewer devices, or the heads cannot be divided.
    """
    if not text and not jax.distributed.is_initialized():
        return None
    if not text:
        devices = jax.device_count()
        raise UsageError(
            f"mesh: got none for {jax.process_count()} processes, expected one of all "
            f"their {devices} devices; for instance --mesh data={devices}"
        )
    try:
        parallel.check(text, cfg)
        return parallel.make(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def place(
    mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...]
) -> NamedSharding:
    """Where an array of a training state lies.

    Args:
        mesh: from `parallel.make`, or one without devices.
        path: of the parameter, or of the part of an adapter, that it belongs to; empty
            for a number that belongs to none.
        shape: its own.
    """
    found = parallel.sharding(mesh, f"{NETWORK}/{path}", shape)
    wide = next((axis for end, axis in _WIDE.items() if path.endswith(end)), None)
    return found if wide is None else _spread(found, shape, wide)


def _path(keys: tuple[Any, ...]) -> str:
    """The parameter that an array belongs to: the names of dicts on the way to it.

    Around trees of parameters an optimizer has tuples, whose names are not taken.
    """
    names = (key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
    return "/".join(map(str, names))


def places_of(tree: Any, mesh: Mesh | AbstractMesh | None) -> Any:
    """Where each array of a state, an adapter or a trained base lies; None: anywhere.

    Args:
        tree: arrays or shapes.
        mesh: None: on the default device.
    """
    if mesh is None:
        return None
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: place(mesh, _path(keys), leaf.shape), tree
    )


def made(f: Callable[..., Any], mesh: Mesh | None, *given: Any) -> Any:
    """`f(*given)`, each array made in parts on its devices (`places_of`)."""
    if mesh is None:
        return f(*given)
    places = places_of(jax.eval_shape(f, *given), mesh)
    return programs.jit(f, "start", out_shardings=places)(*given)


def everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Where a number lies that every device knows."""
    return None if mesh is None else NamedSharding(mesh, P())


@functools.cache
def _copied(place: NamedSharding | None) -> Callable[..., Any]:
    return jax.jit(lambda x: x, out_shardings=place)


@functools.cache
def _layer(place: NamedSharding | None) -> Callable[..., Any]:
    cut = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    return jax.jit(cut, out_shardings=place)


def _is_here(x: Any) -> bool:
    """Whether this process can read all of an array."""
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_addressable or x.is_fully_replicated


def seen(x: Any) -> np.ndarray:
    """An array on the host of every process, which all of them must ask for."""
    return np.asarray(x if _is_here(x) else _copied(everywhere(x.sharding.mesh))(x))


def _rows(x: Any, keep: bool) -> np.ndarray | None:
    """A stack [L ...] layer by layer: a device holds all of one layer at a time."""
    cut = _layer(everywhere(x.sharding.mesh))
    out = np.empty(x.shape, x.dtype) if keep else None
    for row in range(x.shape[0]):
        layer = jax.block_until_ready(cut(x, np.int32(row)))
        if out is not None:
            out[row] = np.asarray(layer)
    return out


def gathered(tree: Any) -> Any:
    """Arrays as numpy on the first process; None in their place on the others.

    All processes must call it. Of a stack their devices hold one layer at a time.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    keep = jax.process_index() == 0

    def one(x: Any) -> np.ndarray | None:
        if _is_here(x):
            return np.asarray(x) if keep else None
        whole = _rows(x, keep) if x.ndim > 2 else seen(x)
        return whole if keep else None

    return jax.tree.map(one, tree)

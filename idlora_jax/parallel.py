"""One plan on several devices: the mesh, and what lies where on it.

    mesh = make("data=2,tensor=4")
    nets, base = networks.load(path, names, mesh=mesh)    each device reads its share
    adapter = place(adapter, mesh)
    pipeline.run(..., mesh=mesh)                          the same latents

| axis | what is divided over it |
|---|---|
| data | the samples of a batch |
| fsdp | the samples of a batch, and each large kernel a second time |
| tensor | heads, and the inner width of each feed-forward network |
| guidance | the branches of a step, where they are rows of one batch (mode "batch") |

In y = f(x W) V the inner axis is divided: W (queries, keys, values, up) by columns, V
(out, down) by rows. A device works on its own heads and channels, and what it exchanges
is one sum after V. Queries and keys are normalised over all heads: one number per
token more to sum.

The networks are written for whole arrays, and XLA divides the work as their inputs are
placed; what it cannot know (that branches may lie on different devices) is said by
`constrain`. The mesh is an argument, never a context: everything that a compiled stage
depends on can be read off its call, and without a mesh each function here gives back
what it got.

Source: Megatron-LM, arXiv 1909.08053, section 3; GSPMD, arXiv 2105.04663.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from idlora_jax.axes import AXES, BATCH, parse
from idlora_jax.config import TransformerConfig
from idlora_jax.types import Tree

_COLUMNS, _ROWS = P("fsdp", "tensor"), P("tensor", "fsdp")
_WIDTH = P("tensor")

RULES: tuple[tuple[str, P], ...] = (
    ("transformer/blocks/*_attn/[qkv]/kernel", _COLUMNS),
    ("transformer/blocks/*_attn/gate/kernel", _COLUMNS),
    ("transformer/blocks/*_attn/out/kernel", _ROWS),
    ("transformer/*/up/kernel", _COLUMNS),
    ("transformer/*/down/kernel", _ROWS),
    ("transformer/*/*ada/out/kernel", _ROWS),
    ("transformer/*/cross_gate/out/kernel", _ROWS),
    ("transformer/blocks/*_attn/[qkv]/bias", _WIDTH),
    ("transformer/blocks/*_attn/[qk]_norm/scale", _WIDTH),
    ("transformer/blocks/*_attn/gate/bias", _WIDTH),
    ("transformer/*/up/bias", _WIDTH),
    ("text_encoder/layers/attn/[qkv]/kernel", P(None, AXES)),
    ("text_encoder/layers/attn/out/kernel", P(AXES)),
    ("text_encoder/layers/mlp/gate/kernel", P(None, AXES)),
    ("text_encoder/layers/mlp/up/kernel", P(None, AXES)),
    ("text_encoder/layers/mlp/down/kernel", P(AXES)),
    ("text_encoder/embed/embedding", P(None, AXES)),
)
"""Which axes of the mesh a parameter's last axes are divided over, by its path.

The first pattern that fits decides; what fits none is whole on every device: norms,
tables, biases after a sum, the codecs. The text encoder passes one text at a time, so
all axes serve its width.
"""


def _sizes(sizes: str | Mapping[str, int]) -> dict[str, int]:
    """Checked sizes of the named axes."""
    if isinstance(sizes, str):
        return parse(sizes)
    return parse(",".join(f"{axis}={size}" for axis, size in sizes.items()))


def make(sizes: str | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all of `AXES`, those not named of size 1.

    Args:
        sizes: as `parse` takes or gives them.
        devices: to use (default: all). A mesh may be smaller: it takes the first ones,
            unless several processes share them.

    Raises:
        ValueError: if there are not that many devices, or the sizes are wrong.
    """
    sizes = _sizes(sizes)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    devices = jax.devices() if devices is None else devices
    count, shared = math.prod(shape), jax.process_count() > 1
    if count > len(devices) or (shared and count < len(devices)):
        named = " * ".join(f"{axis}={size}" for axis, size in sizes.items())
        most = "exactly" if shared else "at most"
        raise ValueError(
            f"mesh: got {named} = {count} devices, expected {most} the "
            f"{len(devices)} that there are; choose sizes whose product fits"
        )
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, auto, devices=devices[:count])


def check(
    sizes: str | Mapping[str, int], cfg: TransformerConfig, branches: str = "batch"
) -> None:
    """Refuse a mesh that would not divide this transformer's work.

    Args:
        sizes: as `parse` takes or gives them.
        cfg: the transformer.
        branches: how its passes are laid out, see `spans.Mode`.

    Raises:
        ValueError: if heads cannot be divided, or branches are not rows of a batch.
    """
    sizes = _sizes(sizes)
    tensor, guidance = sizes.get("tensor", 1), sizes.get("guidance", 1)
    heads = math.gcd(cfg.video.heads, cfg.audio.heads)
    if heads % tensor:
        fit = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"mesh: got tensor={tensor}, but the transformer has {cfg.video.heads} "
            f"heads for video and {cfg.audio.heads} for audio; use tensor="
            f"{' or '.join(fit)}"
        )
    if guidance > 1 and branches != "batch":
        raise ValueError(
            f"mesh: got guidance={guidance} with branches={branches!r}, expected "
            "branches='batch', where branches are rows that can be divided"
        )


def _size(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def _fitting(
    mesh: Mesh | AbstractMesh, spec: Sequence[Any], shape: tuple[int, ...]
) -> NamedSharding:
    """`spec`, but whole where an axis cannot be divided evenly."""
    pairs = zip(spec, shape, strict=False)
    return NamedSharding(
        mesh, P(*(a if n % _size(mesh, a) == 0 else None for a, n in pairs))
    )


def sharding(
    mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...]
) -> NamedSharding:
    """Where a parameter lies.

    Args:
        mesh: from `make`, or one without devices, to ask how large a part is.
        path: the network's name, "/" and the path: a parameter, one of the two parts of
            its adapter ("a", "b"), or of one kept in 8 bits ("values", "wide", and
            "scales" per output channel).
        shape: its own; an axis that cannot be divided evenly stays whole.
    """
    path = path.removesuffix("/values").removesuffix("/wide").removesuffix("/scales")
    part = path[-2:] if path.endswith(("/kernel/a", "/kernel/b")) else ""
    path = path.removesuffix(part)
    spec: Any = next((s for p, s in RULES if fnmatch.fnmatchcase(path, p)), P())
    if part:
        rows, columns = (*spec, None, None)[:2]
        spec = (rows, None) if part == "/a" else (None, columns)
    whole = (None,) * (len(shape) - len(spec))
    return _fitting(mesh, (*whole, *spec), shape)


def placement(
    mesh: Mesh | None, network: str
) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
    """`sharding` of one network's parameters, as `io.load_network` takes it."""
    if mesh is None:
        return None
    return lambda path, shape: sharding(mesh, f"{network}/{path}", shape)


def place(tree: Tree, mesh: Mesh | None, network: str = "transformer") -> Tree:
    """Parameters or an adapter of a network, each part on its devices."""
    if mesh is None:
        return tree

    def one(keys: Any, leaf: Any) -> Array:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return jax.device_put(leaf, sharding(mesh, f"{network}/{path}", leaf.shape))

    return jax.tree.map_with_path(one, tree)


def rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays [B ...] (streams, prompts, noise), their samples divided over `BATCH`.

    Where B cannot be divided evenly, every device has all of them.
    """
    if mesh is None:
        return tree
    put = lambda x: jax.device_put(x, _fitting(mesh, (BATCH,), x.shape))
    return jax.tree.map(put, tree)


def own_rows(mesh: Mesh | None, batch: int) -> Int[np.ndarray, " n"]:
    """Which rows of a batch this process reads, ascending.

    Those that its devices work on: all of them without a mesh, with one process, and
    where B cannot be divided evenly. Processes may share rows (`tensor`).

    Args:
        mesh: from `make`.
        batch: B, the rows of all processes together.
    """
    every = np.arange(batch)
    if mesh is None:
        return every
    where = _fitting(mesh, (BATCH,), every.shape)
    parts = where.addressable_devices_indices_map(every.shape).values()
    return np.unique(np.concatenate([every[part] for part in parts]))


def from_own_rows(tree: Any, mesh: Mesh | None, batch: int) -> Any:
    """Arrays [B ...] of all processes, of the rows that each has read.

    Args:
        tree: arrays [n ...] on the host, the rows of `own_rows` in their order.
        mesh: None gives them back as they are.
        batch: B.
    """
    if mesh is None:
        return tree
    own = own_rows(mesh, batch)

    def one(rows: Any) -> Array:
        rows = np.asarray(rows)
        shape = (batch, *rows.shape[1:])
        assert len(rows) == len(own), f"{len(rows)} rows, expected {len(own)}"

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(batch)
            at = np.searchsorted(own, first)
            return rows[at : at + last - first]

        where = _fitting(mesh, (BATCH,), shape)
        return jax.make_array_from_callback(shape, where, part)

    return jax.tree.map(one, tree)


def constrain(x: Array, mesh: Mesh | None, *axes: Any) -> Array:
    """Say inside of a compiled function how `x` is divided.

    Args:
        x: any array.
        mesh: None leaves `x` as it is.
        axes: what each of the first axes of `x` is divided over: an axis of the mesh,
            several, or None; the others stay whole.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(mesh, axes, x.shape))


def _parts(mesh: Mesh | None, groups: int, batch: int) -> tuple[int, int]:
    """Into how many parts groups and samples are divided."""
    if mesh is None:
        return 1, 1
    parts = mesh.shape["guidance"], _size(mesh, BATCH)
    return (
        parts[0] if groups % parts[0] == 0 else 1,
        parts[1] if batch % parts[1] == 0 else 1,
    )


def side_by_side(x: Shaped[Array, "g B ..."], mesh: Mesh | None) -> Array:
    """[g B ...] -> [g*B ...], so that rows of one device stay on it.

    Rows are in the order of the devices first, then of groups and samples: a plain
    reshape would deal the samples of one device out to others.
    """
    groups, batch = x.shape[:2]
    g, b = _parts(mesh, groups, batch)
    x = x.reshape(g, groups // g, b, batch // b, *x.shape[2:])
    return jnp.swapaxes(x, 1, 2).reshape(-1, *x.shape[4:])


def apart(x: Shaped[Array, "n ..."], groups: int, mesh: Mesh | None) -> Array:
    """The inverse of `side_by_side`."""
    batch = x.shape[0] // groups
    g, b = _parts(mesh, groups, batch)
    x = x.reshape(g, b, groups // g, batch // b, *x.shape[1:])
    return jnp.swapaxes(x, 1, 2).reshape(groups, batch, *x.shape[4:])

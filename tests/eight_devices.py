"""A small plan on eight virtual devices; prints what was seen, as JSON.

    XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_dump_to=DIR" \
        python tests/eight_devices.py FILE DIR

FILE is the checkpoint that `write` made.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eight_bits
import jax
import numpy as np
import small_transformer as small

from idlora_jax import adapters, config, parallel, pipeline, plans
from idlora_jax.model import transformer
from idlora_jax.types import AV, Layout, Prompt, Tree
from idlora_jax.weights import io, leaves, networks, rules

BATCH = 2
SECTION = config.tiny_section("2.3") | {"num_layers": 2}
CFG = config.transformer_config({"transformer": SECTION})
MESHES = {"weights": "data=2,tensor=4", "branches": "data=2,tensor=2,guidance=2"}
FULL = {"steps": 1, "stg": 0, "bimodal": 1, "adapters": {"id": 1.0}}


def shapes() -> Tree:
    return jax.eval_shape(lambda key: transformer.init(CFG, key), jax.random.key(0))


def write(path: Path) -> Path:
    """A checkpoint that holds a transformer of four heads alone."""
    params = jax.tree.map(lambda x: 0.5 * np.asarray(x), small.random_like(shapes()))
    io.save_original(path, {"transformer": params}, {"transformer": SECTION})
    return path


def adapter() -> Tree:
    like = jax.eval_shape(lambda k: adapters.init(k, shapes(), 2), jax.random.key(0))
    return small.random_like(like, 3)


def request() -> pipeline.Request:
    def prompt(seed: int) -> Prompt:
        widths = (CFG.video.width, CFG.audio.width)
        return Prompt(*(small.draw(seed + w, BATCH, 4, w) for w in widths))

    reference, frame = (
        small.draw(20, BATCH, 3, 16, 8),
        small.draw(21, BATCH, 1, 2, 1, 128),
    )
    return pipeline.Request((prompt(0), prompt(1)), reference, frame)


def load(path: str, mesh: Any, **options: Any) -> tuple[Tree, list[tuple[int, ...]]]:
    """The transformer, and the shapes of what was read in one piece."""
    seen, original = [], leaves.read_part

    def spy(leaf: Any, index: Any, dtype: Any) -> np.ndarray:
        part = original(leaf, index, dtype)
        seen.append((leaf.spec.shape, part.shape))
        return part

    leaves.read_part = spy
    try:
        found = networks.load(path, ("transformer",), mesh=mesh, **options)[1]
        params = found["transformer"]
    finally:
        leaves.read_part = original
    return params, seen


def latents(path: str, mode: Any, mesh: Any, **options: Any) -> tuple[AV, Tree, Any]:
    params, read = load(path, mesh, **options)
    (stage,) = plans.one_stage(branches=mode, **FULL).stages
    change = {"id": parallel.place(adapter(), mesh)}
    variables = pipeline.with_adapters(params, change, stage)
    layout = Layout(small.GRID, small.SOUND)
    args = (stage, CFG, variables, request(), jax.random.key(0))
    return pipeline.sample(*args, layout=layout, mesh=mesh), params, read


def held(tree: Tree) -> dict[str, int]:
    """Bytes on each device."""
    out: dict[str, int] = {}
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            name = str(shard.device.id)
            out[name] = out.get(name, 0) + shard.data.nbytes
    return out


def whole(params: Tree) -> Tree:
    """What every device has all of."""
    flat = rules.flatten(params)
    return {path: leaf for path, leaf in flat.items() if leaf.is_fully_replicated}


def compiled(folder: str, run: Callable[[], Any]) -> tuple[Any, str]:
    """What `run` gives, and the text of the sampling loop that it compiled."""
    pattern = "*jit__all_steps*after_optimizations.txt"
    before = set(Path(folder).glob(pattern))
    out = run()
    (new,) = set(Path(folder).glob(pattern)) - before
    return out, new.read_text("utf-8")


def hidden_size(text: str) -> int:
    """Numbers in the video's largest feed-forward layer, on one device."""
    found = re.findall(
        r"= f32\[([\d,]+)\]\S* dot\(.*video.feed_forward/ff/up/dot", text
    )
    return max(math.prod(map(int, dims.split(","))) for dims in found)


def report(path: str, folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    want, params, _ = latents(path, "sweep", None)
    out["bytes"] = held(params)["0"]
    for name, mode in (("weights", "sweep"), ("branches", "batch")):
        mesh = parallel.make(MESHES[name])
        made, text = compiled(folder, lambda m=mode, on=mesh: latents(path, m, on))
        got, params, read = made
        out[name] = {
            "errors": relative(got, want),
            "held": held(params),
            "whole": [*whole(params)],
            "whole_bytes": held(whole(params))["0"],
            "placed_as_loaded": all(
                leaf.sharding
                == parallel.sharding(mesh, f"transformer/{at}", leaf.shape)
                for at, leaf in rules.flatten(params).items()
            ),
            "read": [(math.prod(whole), math.prod(part)) for whole, part in read],
            "gathers": len(re.findall(r" all-gather(?:-start)?\(", text)),
            "sums": len(re.findall(r" all-reduce(?:-start)?\(", text)),
            "hidden": hidden_size(text),
            "samples": [str(x.sharding.spec) for x in got],
        }
    return out


def kept(path: str, folder: str) -> dict[str, Any]:
    """A kernel divided by rows, the second layer's in 8 bits."""
    tensors, metadata = eight_bits.read(Path(path))
    narrow = eight_bits.scaled(tensors, eight_bits.in_layers(1))
    file = eight_bits.write(Path(folder) / "narrow.safetensors", narrow, metadata)
    base = io.open_base(file)
    where = parallel.placement(parallel.make(MESHES["weights"]), "transformer")
    options: dict[str, Any] = {"weights": "keep"}
    whole = io.load_network(base, "transformer", **options)
    parts = io.load_network(base, "transformer", placement=where, **options)
    one, other = (
        tree["blocks"]["video"]["ff"]["down"]["kernel"] for tree in (parts, whole)
    )
    return {
        "shape": one.values.shape,
        "part": one.values.addressable_shards[0].data.shape,
        "dtype": str(one.values.dtype),
        "same": all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other))),
    }


def relative(got: AV, want: AV) -> list[float]:
    """The largest difference of each modality, relative to its largest value."""
    pairs = zip(map(np.asarray, got), map(np.asarray, want), strict=True)
    return [float(np.abs(g - w).max() / np.abs(w).max()) for g, w in pairs]


def in_int8(path: str) -> dict[str, Any]:
    """Kernels in int8 and in host memory, on eight devices and on one."""
    want, _, _ = latents(path, "sweep", None, weights="int8")
    mesh = parallel.make(MESHES["weights"])
    options: dict[str, Any] = {"weights": "int8", "weights_in": "host"}
    got, params, _ = latents(path, "sweep", mesh, **options)
    own = params["blocks"]["video"]["ff"]["up"]["kernel"]
    part = lambda x: [*x.addressable_shards[0].data.shape]
    return {
        "errors": relative(got, want),
        "shapes": [[*own.values.shape], [*own.scales.shape]],
        "parts": [part(own.values), part(own.scales)],
        "kinds": [own.values.sharding.memory_kind, own.scales.sharding.memory_kind],
    }


def rows() -> dict[str, Any]:
    """Where samples go, and what putting branches side by side moves."""
    mesh = parallel.make(MESHES["branches"])

    def part(samples: int) -> list[int]:
        placed = parallel.rows(np.zeros((samples, 5)), mesh)
        return [*placed.addressable_shards[0].data.shape]

    x = np.arange(4 * 6 * 3.0).reshape(4, 6, 3)
    axes = ("guidance", parallel.BATCH)
    there = jax.jit(
        lambda x: parallel.side_by_side(parallel.constrain(x, mesh, *axes), mesh)
    )
    back = jax.jit(lambda y: parallel.apart(y, 4, mesh))
    placed = jax.jit(lambda x: parallel.constrain(x, mesh, *axes))(x)
    text = there.lower(placed).compile().as_text()
    return {
        "moves": len(re.findall(r" (?:all-|collective-)\S+\(", text)),
        "same": np.array_equal(back(there(placed)), x),
        "even": part(4),
        "odd": part(3),
    }


if __name__ == "__main__":
    found = report(*sys.argv[1:3])
    found |= {"eight_bits": kept(*sys.argv[1:3]), "rows": rows()}
    found |= {"int8": in_int8(sys.argv[1])}
    print(json.dumps(found))

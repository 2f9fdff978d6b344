"""Training on eight virtual devices; its last line is what was seen, as JSON.

    XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_dump_to=DUMP" \
        python tests/eight_trainers.py BASE FOLDER DUMP METHODS MESH ...

BASE is the tiny checkpoint, METHODS are optimizers, joined by commas. One device trains
20 steps by the shipped path, and each mesh the same 20.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import latent_folder
import numpy as np
from eight_devices import held

from idlora_jax import (
    adapters,
    experiment,
    fitting,
    loop,
    optimizers,
    parallel,
    shares,
    states,
    training,
)
from idlora_jax.presets import tiny_train
from idlora_jax.weights import networks, rules

STEPS, BATCH, PARTS = 20, 8, 2
MIXED = "data=2,fsdp=2,tensor=2"
COMPILED = "*jit_step*after_optimizations.txt"


def config(base: str, folder: Path, mesh: str) -> experiment.TrainConfig:
    tiny = tiny_train()
    return dataclasses.replace(
        tiny,
        base=Path(base),
        data=folder / "clips",
        output=folder / f"run-{mesh}",
        heldout=experiment.HeldOut(clips=0),
        steps=STEPS,
        batch_size=BATCH,
        optimizer=dataclasses.replace(tiny.optimizer, accumulation=PARTS),
        save_every=STEPS,
        tensorboard=False,
        mesh=mesh,
    )


def gathered(folder: Path, before: set[Path]) -> list[list[int]]:
    """Shapes that the step's devices put together from their parts."""
    (new,) = set(folder.glob(COMPILED)) - before
    found = re.findall(r"= (\S+) all-gather(?:-start)?\(", new.read_text("utf-8"))
    shapes = (re.search(r"\[([\d,]*)\]", text) for text in found)
    return [[*map(int, m[1].split(","))] for m in shapes if m and m[1]]


def trained(settings: experiment.TrainConfig, dump: Path) -> dict[str, Any]:
    """The losses of a run, and how its arrays lie on the devices."""
    seen: dict[str, Any] = {}
    real, before = loop.train, set(dump.glob(COMPILED))

    def spy(run: Any, step: Any, state: Any, base: Any, *rest: Any) -> Any:
        before = jax.tree.map(lambda x: x.sharding, state)
        out = real(run, step, state, base, *rest)
        seen.update(
            kept=before == jax.tree.map(lambda x: x.sharding, out[0]),
            programs=step._cache_size(),
            base=held(base),
            adapter=held(out[0].adapter),
            optimizer=held(out[0].opt_state),
        )
        return out

    loop.train = spy
    try:
        result = fitting.fit(fitting.plan(settings), lambda line: None)
    finally:
        loop.train = real
    rows = (settings.output / "log.jsonl").read_text().splitlines()
    for name in ("loss", "grad_norm", "adapter_norm/audio_self_attn"):
        seen[name] = [json.loads(row)[name] for row in rows]
    gathers = gathered(dump, before)
    return seen | {"gathers": gathers, "file": result.adapter.stat().st_size}


def adapter() -> Any:
    """Of two modules, wide enough for moments in 8 bits."""
    wide = np.zeros((1, 512, 1024), np.float32)
    kernels = {"up": {"kernel": wide}, "down": {"kernel": wide.swapaxes(1, 2)}}
    base = {"blocks": {"audio": {"ff": kernels}}}
    return adapters.init(jax.random.key(0), base, 16, ("blocks/audio/ff/*",))


METHODS = {
    "adamw": {},
    "adamw8bit": {},
    "lion": {},
    "prodigy": {"learning_rate": 1.0},
    "schedule_free": {"schedule": "constant"},
}


def method(name: str) -> Any:
    cfg = experiment.Optimizer(name=name, **METHODS[name])
    ema = experiment.Ema(None if name == "schedule_free" else 0.9)
    return optimizers.make_optimizer(cfg, 10, ema=ema)


def first(name: str, mesh: Any) -> Any:
    """The first state."""
    return training.init(shares.made(adapter, mesh), {}, method(name), mesh)


def updated(name: str, mesh: Any) -> Any:
    """The state after four updates."""
    tx, state = method(name), first(name, mesh)
    places = shares.places_of(state, mesh)

    def step(state: Any, n: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(1), n)
        grads = jax.tree.map(lambda w: jax.random.normal(key, w.shape), state.adapter)
        updates, opt = tx.update(grads, state.opt_state, state.adapter)
        new = jax.tree.map(jnp.add, state.adapter, updates)
        return training.TrainState(new, opt, state.step + 1)

    run = jax.jit(step, donate_argnums=0, out_shardings=places)
    for n in range(4):
        state = run(state, n)
    return state


def largest_error(got: Any, want: Any) -> float:
    """Relative to the largest value of each array."""

    def one(a: Any, b: Any) -> float:
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    return max(jax.tree.leaves(jax.tree.map(one, got, want)))


def methods(folder: Path, names: list[str]) -> dict[str, Any]:
    """Optimizers' states on a mesh, and saved there and read back on others."""
    out: dict[str, Any] = {}
    mesh = parallel.make(MIXED)
    for name in names:
        got, want = updated(name, mesh), updated(name, None)
        every = sum(x.nbytes for x in jax.tree.leaves(got))
        numbers = sum(x.nbytes for x in jax.tree.leaves(got) if x.ndim < 2)
        with states.opened(folder / name, keep=1) as saved:
            saved.save(1, got, {})
        back = []
        for other in (None, parallel.make("fsdp=8"), mesh):
            like = first(name, other)
            read = states.restore(folder / name, 1, like)
            same = jax.tree.map(np.array_equal, read, got)
            lies = jax.tree.map(lambda a, b: a.sharding == b.sharding, read, like)
            back.append(all(jax.tree.leaves((same, lies))))
        out[name] = {
            "error": largest_error(got.adapter, want.adapter),
            "bytes": every,
            "numbers": numbers,
            "held": held(got),
            "read_back": back,
        }
    return out


def whole(base: str) -> dict[str, Any]:
    """In mode "full": how a state of the transformer lies, and what is whole."""
    mesh = parallel.make(MIXED)
    settings = dataclasses.replace(config(base, Path(), MIXED), mode="full")
    read = networks.load(base, ("transformer",), mesh=mesh)[1]["transformer"]
    params, frozen = fitting.trained(settings, read, mesh)
    tx = optimizers.make_optimizer(settings.optimizer, STEPS)
    state = training.init(params, frozen, tx, mesh)
    every = rules.flatten(state.adapter)
    return {
        "frozen": len(frozen),
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "whole": 3 * sum(x.nbytes for x in every.values() if x.is_fully_replicated),
        "kernels": [
            path for path, x in every.items() if x.is_fully_replicated and x.ndim > 2
        ],
        "held": held(state),
    }


if __name__ == "__main__":
    base, folder, dump = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    latent_folder.write(folder / "clips", 10, text=(128, 48))
    found: dict[str, Any] = {"full": whole(base)}
    for mesh in ("", *sys.argv[5:]):
        found[mesh] = trained(config(base, folder, mesh), dump)
    found["methods"] = methods(folder, sys.argv[4].split(","))
    print(json.dumps(found))

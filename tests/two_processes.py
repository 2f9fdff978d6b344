"""One of two processes on one machine; its last line is what it saw, as JSON.

The second one then vanishes.

    srun --ntasks 2 python tests/two_processes.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import toy_training as toy

from idlora_jax import (
    diagnosis,
    distributed,
    experiment,
    loop,
    optimizers,
    parallel,
    runs,
    shares,
    states,
    training,
)
from idlora_jax.settings import Distributed

ROWS = np.arange(12.0, dtype=np.float32).reshape(4, 3)


def rows(text: str) -> dict[str, Any]:
    """What this process reads of four rows, and what its device then holds."""
    mesh = parallel.make(text)
    own = parallel.own_rows(mesh, 4)
    made = parallel.from_own_rows({"x": ROWS[own], "n": own}, mesh, 4)
    (part,) = made["n"].addressable_shards
    whole = np.array_equal(shares.seen(made["x"]), ROWS)
    return {"own": own.tolist(), "held": part.data.tolist(), "whole": whole}


def gathered(text: str) -> str:
    """Where a stack comes together, layer by layer."""
    mesh = parallel.make(text)
    kernel = np.arange(3 * 8 * 6, dtype=np.float32).reshape(3, 8, 6)
    tree = {"blocks": {"audio": {"ff": {"up": {"kernel": kernel}}}}}
    placed = shares.made(lambda: jax.tree.map(jnp.asarray, tree), mesh)
    (leaf,) = jax.tree.leaves(placed)
    assert leaf.addressable_data(0).size == leaf.size // 2
    (out,) = jax.tree.leaves(shares.gathered(placed), is_leaf=lambda x: x is None)
    return "nowhere" if out is None else "here" if (out == kernel).all() else "wrong"


def refused(what: Any) -> str:
    try:
        distributed.require_same("things", what)
    except ValueError as error:
        return str(error)
    return ""


def trained(folder: Path, poison: tuple[int, ...] = ()) -> dict[str, Any]:
    """The loop on a stand-in for the network, over batches of two processes."""
    mesh = parallel.make("fsdp=2")
    run = toy.run_in(folder, save_every=2, ema=experiment.Ema(0.5))
    tx = optimizers.make_optimizer(run.config.optimizer, 6, ema=run.config.ema)
    base = parallel.place(toy.base(), mesh)
    state = training.init(shares.made(toy.adapter, mesh), base, tx, mesh)
    places = shares.places_of(state, mesh)
    step = training.make_train_step(toy.task(), tx, jax.random.key(0), places)
    own = parallel.own_rows(mesh, 2)

    def batches(seen: int) -> Any:
        made = toy.batch(seen)
        if seen in poison and not distributed.is_first():
            made = made._replace(audio=made.audio.at[1].set(np.nan))
        return parallel.from_own_rows(jax.tree.map(lambda x: x[own], made), mesh, 2)

    names = lambda seen: [f"a{seen}", f"b{seen}"]

    def explain(state: Any, batch: Any, names: Any) -> str:
        found = diagnosis.first(toy.task(), jax.random.key(0), state, base, batch)
        return diagnosis.told(found, names)

    state = runs.start(run, runs.newest(run), state)
    hooks = loop.Hooks(names=names, explain=explain)
    try:
        state, _ = loop.train(run, step, state, base, batches, hooks)
    except loop.NotFiniteError as error:
        return {"error": str(error)}
    return {"step": int(state.step), "saved": states.latest(run.states)}


if __name__ == "__main__":
    distributed.start(Distributed(timeout=60))
    me, folder = jax.process_index(), Path(sys.argv[1])
    found: dict[str, Any] = {text: rows(text) for text in ("data=2", "tensor=2")}
    found["visible"] = jax.config.read("jax_cuda_visible_devices")
    found["gathered"] = gathered("fsdp=2")
    found["agreed"] = [distributed.agreed(n) for n in (me, 15 * (1 - me), 0)]
    found["refused"] = refused(me), refused({"same": 1})
    found["trained"] = trained(folder / "toy")
    found["poisoned"] = trained(folder / "poisoned", (2, 3, 4))
    # A folder of each, as on hosts that share none.
    alone = toy.run_in(folder / f"alone{me}")
    try:
        runs.start(alone, None, None)
    except ValueError as error:
        found["alone"] = str(error)
    print(json.dumps(found), flush=True)
    if me:
        os._exit(0)  # as if it crashed: the other waits for it
    distributed.run(lambda: distributed.agreed(1))

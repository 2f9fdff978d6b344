"""python -m benchmarks.reading FILE DTYPE: read a transformer, print what it took.

Memory is that of this process that belongs to no file. On a CPU the arrays are in it,
so they are told apart by their sizes.
"""

from __future__ import annotations

import json
import sys
import threading

import jax
import numpy as np

from benchmarks.works import timed
from idlora_jax.memory import size
from idlora_jax.weights import io

EVERY_S = 0.005


def anonymous() -> int:
    """Bytes of this process that belong to no file, now."""
    with open("/proc/self/status", encoding="ascii") as file:
        words = file.read().split()
    return int(words[words.index("RssAnon:") + 1]) * 1024


class Highest(threading.Thread):
    """Looks at the memory now and then, and keeps the most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen, self.done = anonymous(), threading.Event()

    def run(self) -> None:
        """Until `done` is set."""
        while not self.done.wait(EVERY_S):
            self.seen = max(self.seen, anonymous())

    def stop(self) -> int:
        """The most that was seen."""
        self.done.set()
        self.join()
        return max(self.seen, anonymous())


def main(path: str, dtype: str) -> None:
    """Read it once."""
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # the device is there
    before, watch = anonymous(), Highest()
    watch.start()
    tree, took = timed(
        lambda: jax.block_until_ready(
            io.load_network(io.open_base(path), "transformer", dtype)
        )
    )
    peak = watch.stop()
    found = {
        "wall": took.wall,
        "cpu": took.cpu,
        "arrays": size(tree),
        "peak": peak,
        "above": peak - before,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

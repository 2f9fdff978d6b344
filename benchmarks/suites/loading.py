"""Reading a checkpoint: host memory above what the arrays themselves take, and time.

A transformer with random weights is written as an original file, then read by another
process (`python -m benchmarks.reading FILE`), so that nothing else counts.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import ml_dtypes
import numpy as np

from benchmarks import host
from benchmarks.backends.jax import NAME
from benchmarks.configs import Size
from benchmarks.rows import Row
from benchmarks.session import Session
from idlora_jax.config import Generation
from idlora_jax.weights import catalog, io, rules

DTYPES = ("bfloat16", "float32")


def sized(size: Size, generation: Generation, gigabytes: float) -> Size:
    """With as many layers as make a bfloat16 file of about so many 1e9 bytes."""
    bytes_of = lambda layers: sum(
        2 * leaf.size
        for leaf in rules.flatten(
            catalog.shapes_of(
                "transformer",
                dataclasses.replace(size, layers=layers).transformer(generation),
            )
        ).values()
    )
    one, two = bytes_of(1), bytes_of(2)
    layers = 1 + max(0, round((gigabytes * 1e9 - one) / (two - one)))
    return dataclasses.replace(size, layers=layers, stg=0)


def write(path: pathlib.Path, size: Size, generation: Generation) -> int:
    """A bfloat16 checkpoint of random numbers; its bytes."""
    rng, cfg = np.random.default_rng(0), size.transformer(generation)

    def one(leaf: object) -> np.ndarray:
        shape = leaf.shape  # pyright: ignore
        out = np.empty(shape, ml_dtypes.bfloat16)
        rows = out.reshape(shape[0] if shape else 1, -1)
        for row in rows:
            row[:] = rng.standard_normal(row.size, np.float32)
        return out

    flat = rules.flatten(catalog.shapes_of("transformer", cfg))
    tree = rules.nest({p: one(leaf) for p, leaf in flat.items()})
    section = {"transformer": size.section(generation)}
    io.save_original(path, {"transformer": tree}, section)
    return path.stat().st_size


def read(path: pathlib.Path, dtype: str) -> dict:
    """What reading it in a process of its own took."""
    command = [sys.executable, "-m", "benchmarks.reading", str(path), dtype]
    done = subprocess.run(
        command, cwd=host.ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"reading failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(session: Session) -> list[Row]:
    """Rows by dtype of the arrays."""
    options, rows = session.options, []
    base = options.size
    if options.config == "full":
        raise ValueError("load: give --config eighth or quarter, and --gigabytes")
    size = sized(base, options.generation, options.gigabytes)
    with tempfile.TemporaryDirectory(prefix="idlora-load-") as folder:
        path = pathlib.Path(folder, "random.safetensors")
        on_disk = write(path, size, options.generation)
        for dtype in options.variants or DTYPES:
            seen = read(path, dtype)
            row = session.row(
                variant=dtype, backend=NAME, depth=size.layers, n=1, note=seen["device"]
            )
            row.wall_med, row.cpu_med = seen["wall"], seen["cpu"]
            row.ratio_med = row.ratio_min = row.ratio_max = 1.0
            row.peak_bytes = seen["peak"]
            row.extra = {
                "file_bytes": on_disk,
                "array_bytes": seen["arrays"],
                "peak_over_arrays": round(seen["above"] / seen["arrays"], 3),
                "extra_over_file": round((seen["above"] - seen["arrays"]) / on_disk, 3),
            }
            rows.append(session.told(row))
    return rows

"""Resident memory of converting and loading, as the system counts it.

    python tests/weights/test_memory.py 8      loads a random 2.4 GB, and says its peak

Under `/usr/bin/time -v` that is seen from outside, too.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import sparse_files

from idlora_jax.weights import io, leaves

ROOT = pathlib.Path(__file__).parents[2]
PEAK = """
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
"""
# Not ru_maxrss, which a child inherits from the process that started it.
CONVERT = """
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code
print(peak())
"""
LOAD = """
import sys
from idlora_jax.weights import io
base = io.open_base(sys.argv[1])
io.shapes(base, "transformer")
before = peak()
tree = io.load_network(base, "transformer")
print(peak() - before)
"""
pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc"
)


def sparse_base(path, heads):
    """A transformer of 48 layers and `heads` x 128 channels, all zeros, as one hole.

    Returns:
        Bytes of the file's tensors and of the largest stacked one.
    """
    section = dict(sparse_files.config("ltx-2-19b")["transformer"])
    for prefix, width in (("", 128), ("audio_", 64)):
        section[f"{prefix}num_attention_heads"] = heads
        section[f"{prefix}cross_attention_dim"] = heads * width
    cfg = io.read_config("transformer", {"transformer": section}, "2.0")
    shapes = io.shapes_of("transformer", cfg)
    table = io.NETWORKS["transformer"].rules
    needed = leaves.sources("transformer", shapes, table).values()
    tensors = {
        key: {"dtype": "BF16", "shape": [*source.torch_shape]}
        for source in needed
        for key in source.keys
    }
    text = {"config": json.dumps({"transformer": section})}
    head, size = sparse_files.header(tensors, text)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + size)
    return size, max(2 * math.prod(source.shape) for source in needed)


def bytes_said(program, *arguments):
    """Run a program in a process of its own; the number in its last line."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK + program, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def converted(path, made):
    """Peak resident bytes of converting a file."""
    program = (
        f"import sys; sys.argv = ['convert/base.py', {str(path)!r}, {str(made)!r}]"
    )
    return bytes_said(program + CONVERT)


@pytest.mark.slow
def test_a_conversion_holds_far_less_than_its_file(tmp_path):
    path, made = tmp_path / "wide.safetensors", tmp_path / "folder"
    size, stack = sparse_base(path, 10)
    peak = converted(path, made)
    assert peak < stack + 1e9
    assert size > 3.5e9 and peak < size / 4
    assert sum(file.stat().st_size for file in made.iterdir()) > size


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file", "folder"])
def test_loading_holds_the_parameters_and_one_stacked_tensor(tmp_path, form):
    path = tmp_path / "narrow.safetensors"
    size, stack = sparse_base(path, 6)
    if form == "folder":
        converted(path, tmp_path / "folder")
        path = tmp_path / "folder"
    assert size * 0.9 < bytes_said(LOAD, str(path)) < size + stack + 200e6


def random_base(path, heads):
    """`sparse_base` with random numbers, which no system can leave out."""
    size, stack = sparse_base(path, heads)
    rng, left = np.random.default_rng(0), size
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size - size)
        while left:
            # Below 0x7f80 all are finite.
            block = rng.integers(0, 0x3F80, min(left, 1 << 26) // 2, np.uint16)
            file.write(block.tobytes())
            left -= block.nbytes
    return size, stack


@pytest.mark.slow
def test_loading_random_numbers_holds_no_more(tmp_path):
    path = tmp_path / "random.safetensors"
    size, stack = random_base(path, 3)
    assert size > 300e6
    assert size * 0.9 < bytes_said(LOAD, str(path)) < size + stack + 200e6


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "random.safetensors")
        size, stack = random_base(file, int(sys.argv[1]))
        peak = bytes_said(LOAD, str(file))
        print(
            f"parameters {size / 1e9:.3f} GB, largest stacked {stack / 1e9:.3f} GB, "
            f"peak while loading {peak / 1e9:.3f} GB"
        )

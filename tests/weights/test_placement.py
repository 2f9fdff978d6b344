"""Parameters read straight to the devices that hold their parts."""

import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlora_jax.weights import convert, io, leaves, rules

PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from idlora_jax.weights import io, leaves, rules

mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))

def placement(path, shape):
    if path.endswith("kernel") and len(shape) == 3:
        return NamedSharding(mesh, P(None, "fsdp", "tensor"))
    return NamedSharding(mesh, P("fsdp") if path.endswith("table") else P())

held = []
original = leaves.read_part
def spy(leaf, index, dtype):
    out = original(leaf, index, dtype)
    held.append((leaf.spec.shape, out.shape))
    return out
leaves.read_part = spy

for path in sys.argv[1:]:
    base = io.open_base(path)
    placed = rules.flatten(io.load_network(base, "transformer", placement=placement))
    whole = rules.flatten(io.load_network(base, "transformer"))
    assert placed.keys() == whole.keys()
    for name, array in placed.items():
        assert array.sharding == placement(name, array.shape), name
        np.testing.assert_array_equal(np.asarray(array), np.asarray(whole[name]))
kernels = [part for shape, part in held if shape == (4, 64, 64)]
assert set(kernels) == {(4, 32, 32)}, set(kernels)
print("ok", len(held))
"""


@pytest.fixture(scope="module")
def leaf_and_array(checkpoint):
    base = io.open_base(checkpoint)
    found, _ = io.locate(base, "transformer")
    path = "blocks/video/self_attn/q/kernel"
    whole = rules.flatten(io.load_network(base, "transformer"))
    return found[path], np.asarray(whole[path])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_part_is_what_indexing_the_whole_gives(leaf_and_array, data):
    leaf, array = leaf_and_array

    def cut(size):
        ends = st.one_of(st.none(), st.integers(0, size))
        return st.tuples(ends, ends).map(lambda pair: slice(*pair))

    index = data.draw(st.tuples(*map(cut, array.shape)))
    np.testing.assert_array_equal(
        leaves.read_part(leaf, index, leaf.spec.dtype), array[index]
    )


def test_every_device_gets_its_part_and_each_part_is_read_once(checkpoint, tmp_path):
    convert.convert_base(checkpoint, tmp_path / "folder", networks=["transformer"])
    program = textwrap.dedent(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "folder")],
        capture_output=True,
        text=True,
        env={
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
            "PATH": "",
        },
        cwd=pathlib.Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok")

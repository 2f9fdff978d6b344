"""Training on several devices: what lies where, and the same losses.

IDLORA_MESHES=all trains on every kind of mesh, and updates by every optimizer, instead
of one mesh of all kinds and one optimizer.
"""

from __future__ import annotations

import math
import os
from typing import Any

import eight_trainers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import virtual_devices
from jax.sharding import AbstractMesh

from idlora_jax import adapters, config, experiment, optimizers, parallel, shares
from idlora_jax.model import transformer
from idlora_jax.settings import UsageError
from idlora_jax.training import TrainState

ALL = os.environ.get("IDLORA_MESHES") == "all"
MESHES = ["data=8", "fsdp=8", "tensor=4", eight_trainers.MIXED]
METHODS = [*eight_trainers.METHODS]
CHOSEN = (MESHES, METHODS) if ALL else ([eight_trainers.MIXED], ["adamw8bit"])


def abstract(text: str) -> AbstractMesh:
    """A mesh without devices."""
    sizes = parallel.parse(text)
    return AbstractMesh(tuple(sizes.get(a, 1) for a in parallel.AXES), parallel.AXES)


@pytest.fixture(scope="module")
def adapter() -> Any:
    """Shapes of the published adapter."""
    cfg = config.LTX2_19B
    base = jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))
    return jax.eval_shape(lambda k: adapters.init(k, base, 128), jax.random.key(0))


def state(adapter: Any, name: str) -> Any:
    """Shapes of a training state whose averages are kept."""
    cfg = experiment.Optimizer(name=name, **eight_trainers.METHODS[name])
    tx = optimizers.make_optimizer(cfg, 10, ema=experiment.Ema(0.9))
    start = lambda a: TrainState(a, tx.init(a), jnp.zeros((), jnp.int32))
    return jax.eval_shape(start, adapter)


def share(tree: Any, mesh: AbstractMesh) -> float:
    """What part of a tree's bytes one device holds."""
    leaves, places = map(jax.tree.leaves, (tree, shares.places_of(tree, mesh)))
    bytes_of = lambda x, shape: math.prod(shape) * x.dtype.itemsize
    pairs = zip(leaves, places, strict=True)
    own = sum(bytes_of(x, place.shard_shape(x.shape)) for x, place in pairs)
    return own / sum(bytes_of(x, x.shape) for x in leaves)


@pytest.mark.parametrize("name", METHODS)
def test_fsdp_divides_all_of_every_optimizers_state(adapter, name):
    found = state(adapter, name)
    assert share(found.adapter, abstract("fsdp=8")) == 1 / 8
    assert 1 / 8 < share(found, abstract("fsdp=8")) < 1.001 / 8


def test_tensor_divides_the_half_of_an_adapter_that_has_heads(adapter):
    """What is not along heads and inner channels is whole without `fsdp`."""
    assert 0.5 < share(adapter, abstract("tensor=4")) < 0.7
    assert share(adapter, abstract("data=4")) == 1
    fsdp, both = (share(adapter, abstract(t)) for t in ("fsdp=2", "fsdp=2,tensor=4"))
    assert fsdp == 1 / 2
    assert both == pytest.approx(share(adapter, abstract("tensor=4")) / 2, rel=1e-12)


def test_moments_and_averages_lie_as_what_they_belong_to(adapter):
    mesh, found = abstract("data=2,fsdp=2,tensor=2"), state(adapter, "adamw")
    own = shares.places_of(found.adapter, mesh)
    assert shares.places_of(optimizers.averaged(found.opt_state), mesh) == own
    places = shares.places_of(found.opt_state, mesh)
    numbers = [p for p in jax.tree.leaves(places) if p.is_fully_replicated]
    shapes = jax.tree.leaves(found.opt_state)
    assert len(numbers) == sum(x.ndim == 0 for x in shapes) > 0


def test_what_cannot_be_divided_stays_whole():
    mesh = abstract("fsdp=8")
    path = "blocks/audio/self_attn/out/kernel/a"
    assert not shares.place(mesh, path, (2, 32, 4)).is_fully_replicated
    assert shares.place(mesh, path, (2, 30, 4)).is_fully_replicated
    assert shares.place(mesh, "", ()).is_fully_replicated


def test_without_a_mesh_nothing_is_touched():
    x = np.arange(6.0).reshape(3, 2)
    assert shares.places_of({"x": x}, None) is None
    assert shares.everywhere(None) is None
    assert shares.made(lambda a: a, None, x) is x
    assert parallel.from_own_rows(x, None, 3) is x
    np.testing.assert_array_equal(parallel.own_rows(None, 3), [0, 1, 2])
    assert shares.mesh_of("", config.tiny()) is None


def test_one_process_reads_all_rows_and_sees_all_arrays():
    mesh = parallel.make("data=1")
    np.testing.assert_array_equal(parallel.own_rows(mesh, 5), np.arange(5))
    x = np.arange(10.0).reshape(5, 2)
    placed = parallel.from_own_rows({"x": x}, mesh, 5)
    assert placed["x"].sharding.mesh == mesh
    for got in (shares.gathered(placed)["x"], shares.seen(placed["x"])):
        np.testing.assert_array_equal(got, x)
    with pytest.raises(AssertionError, match="4 rows, expected 5"):
        parallel.from_own_rows(x[1:], mesh, 5)


def test_a_mesh_that_does_not_fit_is_wrong_usage():
    with pytest.raises(UsageError, match="expected at most the 1 that there are"):
        shares.mesh_of("data=2", config.tiny())
    with pytest.raises(UsageError, match=r"tensor=3, .* use tensor=1 or 2 or 4"):
        shares.mesh_of("tensor=3", config.tiny())


@pytest.fixture(scope="module")
def seen(tmp_path_factory, tiny_model) -> dict[str, Any]:
    """What a process with eight virtual devices saw."""
    folder = tmp_path_factory.mktemp("eight")
    paths = [str(tiny_model[0]), str(folder), str(folder / virtual_devices.DUMP)]
    meshes, methods = CHOSEN
    given = [*paths, ",".join(methods), *meshes]
    return virtual_devices.seen("eight_trainers.py", folder, "jit_step", *given)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", CHOSEN[0])
def test_a_mesh_gives_the_losses_and_norms_of_one_device(seen, mesh):
    for name in ("loss", "grad_norm", "adapter_norm/audio_self_attn"):
        assert len(seen[mesh][name]) == eight_trainers.STEPS
        np.testing.assert_allclose(seen[mesh][name], seen[""][name], rtol=1e-5)
    assert seen[mesh]["loss"][-1] < 0.9 * seen[mesh]["loss"][0]
    assert seen[mesh]["file"] == seen[""]["file"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", CHOSEN[0])
def test_each_device_holds_its_share_of_base_adapter_and_optimizer(seen, mesh):
    sizes = parallel.parse(mesh)
    fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
    # Of an adapter, about half is along heads and inner channels.
    pair = 1 / fsdp if tensor == 1 else 0.75 / fsdp
    # Of the tiny model, 9 % are norms, tables and ends, which are whole.
    most = {"base": 0.91 / (fsdp * tensor) + 0.09, "adapter": pair, "optimizer": pair}
    for kind, part in most.items():
        assert len(seen[mesh][kind]) == math.prod(sizes.values())
        (own,), (every,) = (set(seen[m][kind].values()) for m in (mesh, ""))
        assert every / (fsdp * tensor) <= own <= every * part + 64, kind


@pytest.mark.slow
@pytest.mark.parametrize("mesh", CHOSEN[0])
def test_steps_leave_the_state_where_it_was_and_compile_once(seen, mesh):
    assert seen[mesh]["kept"]
    assert seen[mesh]["programs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("mesh", CHOSEN[0])
def test_no_stack_of_layers_is_ever_put_together(seen, mesh):
    layers = config.tiny().layers
    assert layers != eight_trainers.BATCH
    assert not [s for s in seen[mesh]["gathers"] if len(s) > 2 and s[0] == layers]
    fetched = "fsdp" in mesh
    assert bool(seen[mesh]["gathers"]) == fetched


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN[1])
def test_an_optimizer_on_a_mesh_updates_as_on_one_device(seen, name):
    found = seen["methods"][name]
    assert found["error"] < 1e-6
    (own,) = set(found["held"].values())
    # Two thirds of the kernels' parts are along tensor, all along fsdp.
    assert own <= found["bytes"] * 0.36 + found["numbers"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN[1])
def test_a_state_is_read_back_bitwise_on_one_device_and_on_other_meshes(seen, name):
    assert seen["methods"][name]["read_back"] == [True, True, True]


@pytest.mark.slow
def test_in_mode_full_all_kernels_and_their_moments_are_divided(seen):
    found = seen["full"]
    assert found["frozen"] == 0
    (own,) = set(found["held"].values())
    most = (found["bytes"] - found["whole"]) / 4 + found["whole"]
    assert own <= most * 1.08  # a few are divided over one axis alone
    assert all(path.endswith("table") for path in found["kernels"])

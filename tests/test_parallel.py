"""Several devices: what is asked for, what lies where, and the same latents."""

from __future__ import annotations

import math
from typing import Any

import eight_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import virtual_devices
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from idlora_jax import adapters, config, hosted, parallel
from idlora_jax.config_text import text_encoder_config
from idlora_jax.model import text_encoder, transformer
from idlora_jax.tiny import gemma_config
from idlora_jax.weights import rules

FULL = {"2.0": config.LTX2_19B, "2.3": config.LTX2_3_22B}


def abstract(text: str) -> AbstractMesh:
    """A mesh without devices."""
    sizes = parallel.parse(text)
    return AbstractMesh(tuple(sizes.get(a, 1) for a in parallel.AXES), parallel.AXES)


def share(tree: Any, mesh: AbstractMesh, network: str) -> float:
    """What part of a tree's numbers one device holds."""
    flat = rules.flatten(tree)
    where = {
        k: parallel.sharding(mesh, f"{network}/{k}", v.shape) for k, v in flat.items()
    }
    own = sum(math.prod(where[k].shard_shape(v.shape)) for k, v in flat.items())
    return own / sum(v.size for v in flat.values())


@pytest.fixture(scope="module", params=FULL)
def shapes(request):
    cfg = FULL[request.param]
    return jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))


@given(
    st.dictionaries(st.sampled_from(parallel.AXES), st.integers(1, 512)),
    st.sampled_from(["", " "]),
)
def test_what_is_written_is_what_is_parsed(sizes, space):
    text = f"{space},".join(f"{space}{k}{space}={space}{v}" for k, v in sizes.items())
    assert parallel.parse(text) == sizes


def test_the_empty_text_names_no_axis():
    assert parallel.parse("") == parallel.parse("  ") == {}
    assert parallel.make("", jax.devices()[:1]).shape == dict.fromkeys(parallel.AXES, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=2", r"each of data, fsdp, tensor, guidance at most once, not 'rows=2'"),
        ("data=2,data=2", "at most once, not 'data=2'"),
        ("data=2;tensor=4", r"got data=2;tensor=4, expected a whole number"),
        ("data=2,", "at most once, not ''"),
        ("data", "got data=, expected a whole number from 1; for instance data=2"),
        ("tensor=0", "got tensor=0, expected a whole number from 1"),
        ("tensor=-4", "got tensor=-4, expected a whole number from 1"),
        ("tensor=2.5", "got tensor=2.5"),
        ("tensor=²", "got tensor=²"),
    ],
)
def test_a_mesh_that_says_nothing_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parallel.parse(text)


def test_a_mesh_larger_than_the_machine_is_refused():
    got = r"got data=2 \* tensor=4 = 8 devices, expected at most the 3 that there are"
    with pytest.raises(ValueError, match=got):
        parallel.make("data=2,tensor=4", [None] * 3)
    with pytest.raises(ValueError, match="not 'rows=2'"):
        parallel.make({"rows": 2})


def test_heads_that_cannot_be_divided_are_refused_with_numbers_that_can():
    parallel.check("tensor=8,data=3", FULL["2.0"])
    with pytest.raises(ValueError, match=r"tensor=3, .* use tensor=1 or 2 or 4 or 8"):
        parallel.check({"tensor": 3}, FULL["2.0"])
    with pytest.raises(ValueError, match=r"4 heads .* use tensor=1 or 2 or 4$"):
        parallel.check("tensor=8", config.tiny())


def test_branches_are_divided_only_where_they_are_rows_of_a_batch():
    parallel.check("guidance=2", config.tiny(), "batch")
    with pytest.raises(ValueError, match=r"guidance=2 with branches='sweep'"):
        parallel.check("guidance=2", config.tiny(), "sweep")


@pytest.mark.parametrize(
    ("text", "part"), [("tensor=4", 4), ("tensor=8", 8), ("fsdp=4,tensor=2", 8)]
)
def test_each_device_holds_its_share_of_the_published_transformers(shapes, text, part):
    assert 1 / part < share(shapes, abstract(text), "transformer") < 1.01 / part


def test_neither_samples_nor_branches_divide_the_weights(shapes):
    assert share(shapes, abstract("data=4,guidance=2"), "transformer") == 1


def test_the_inner_axis_of_two_kernels_in_a_row_is_the_one_divided(shapes):
    mesh, flat = abstract("tensor=2"), rules.flatten(shapes)

    def divided(path: str) -> list[int]:
        shape = flat[path].shape
        shard = parallel.sharding(mesh, f"transformer/{path}", shape).shard_shape(shape)
        return [n for n, (a, b) in enumerate(zip(shape, shard, strict=True)) if a != b]

    for name in ("self_attn", "text_attn", "cross_attn"):
        for own in ("video", "audio"):
            at = f"blocks/{own}/{name}"
            assert all(divided(f"{at}/{n}/kernel") == [2] for n in "qkv")
            assert all(divided(f"{at}/{n}/bias") == [1] for n in "qkv")
            assert divided(f"{at}/q_norm/scale") == divided(f"{at}/k_norm/scale") == [1]
            assert divided(f"{at}/out/kernel") == [1] and not divided(f"{at}/out/bias")
    assert divided("blocks/video/ff/up/kernel") == [2]
    assert (
        divided("blocks/video/ff/down/kernel") == divided("video/ada/up/kernel") == [1]
    )
    assert not divided("blocks/audio/table") and not divided("video/patchify/kernel")


def test_an_adapter_lies_as_its_kernel_does(shapes):
    like = jax.eval_shape(lambda k: adapters.init(k, shapes, 128), jax.random.key(0))
    mesh, flat = abstract("fsdp=2,tensor=2"), rules.flatten(like)
    for path, leaf in flat.items():
        kernel, _, part = path.rpartition("/")
        whole = parallel.sharding(mesh, f"transformer/{kernel}", (48, 64, 64)).spec
        spec = parallel.sharding(mesh, f"transformer/{path}", leaf.shape).spec
        axis = 1 if part == "a" else 2
        assert spec[axis] == whole[axis] is not None
        assert spec[0] is None and spec[3 - axis] is None


def test_parts_of_a_kernel_in_8_bits_lie_as_it_does():
    mesh, path = abstract("tensor=2"), "transformer/blocks/video/ff/up/kernel"
    want = parallel.sharding(mesh, path, (3, 8, 16))
    assert parallel.sharding(mesh, f"{path}/values", (3, 8, 16)) == want
    assert parallel.sharding(mesh, f"{path}/wide", (0, 8, 16)) == want
    assert parallel.sharding(mesh, f"{path}/scale", (3,)).is_fully_replicated
    scales = parallel.sharding(mesh, f"{path}/scales", (3, 1, 16))
    assert (*scales.spec,) == (None, "fsdp", "tensor")  # of size 1 along fsdp
    down = parallel.sharding(mesh, path.replace("up", "down") + "/scales", (3, 1, 16))
    assert down.is_fully_replicated


def test_an_axis_that_cannot_be_divided_stays_whole():
    mesh, path = abstract("tensor=2,fsdp=3"), "transformer/blocks/video/ff/up/kernel"
    spec = parallel.sharding(mesh, path, (4, 8, 16)).spec
    assert (*spec,) == (None, None, "tensor")
    assert parallel.sharding(mesh, path, (4, 8, 15)).is_fully_replicated


def test_all_devices_divide_the_text_encoder_and_none_the_codecs():
    cfg, mesh = text_encoder_config(gemma_config()), abstract("data=2,tensor=4")
    like = jax.eval_shape(lambda key: text_encoder.init(cfg, key), jax.random.key(0))
    assert share(like, mesh, "text_encoder") < 1.1 / 8
    path = "video_vae/decoder/up/kernel"
    assert parallel.sharding(mesh, path, (3, 3, 3, 64, 64)).is_fully_replicated


def test_without_a_mesh_nothing_is_touched():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    tree = {"blocks": x}
    assert parallel.place(tree, None) is tree and parallel.rows(tree, None) is tree
    assert parallel.constrain(x, None, "data") is x
    assert parallel.placement(None, "transformer") is None
    rows = parallel.side_by_side(x, None)
    np.testing.assert_array_equal(rows, x.reshape(6, 2))
    np.testing.assert_array_equal(parallel.apart(rows, 2, None), x)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    """What a process with eight virtual devices saw."""
    folder = tmp_path_factory.mktemp("eight")
    file = eight_devices.write(folder / "small.safetensors")
    given = str(file), str(folder / virtual_devices.DUMP)
    return virtual_devices.seen("eight_devices.py", folder, "jit__all_steps", *given)


@pytest.mark.slow
@pytest.mark.parametrize("name", eight_devices.MESHES)
def test_eight_devices_give_the_latents_of_one(seen, name):
    assert max(seen[name]["errors"]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("weights", 4), ("branches", 2)])
def test_each_device_holds_its_share_as_loaded(seen, name, part):
    got, every = seen[name], seen["bytes"]
    share = (every - got["whole_bytes"]) // part + got["whole_bytes"]
    assert got["held"] == {str(device): share for device in range(8)}
    kernels = {path for path in got["whole"] if path.endswith("kernel")}
    ends = {
        f"{own}/{n}/kernel" for own in ("video", "audio") for n in ("patchify", "out")
    }
    assert kernels == ends
    assert got["placed_as_loaded"]


@pytest.mark.slow
def test_loading_reads_each_number_once_and_no_more_than_a_share_at_a_time(seen):
    read = seen["weights"]["read"]
    assert 4 * sum(part for _, part in read) == seen["bytes"]
    assert max(part for _, part in read) == max(size for size, _ in read) // 4


@pytest.mark.slow
def test_devices_that_divide_heads_exchange_sums_alone(seen):
    assert seen["weights"]["gathers"] == 0 < seen["weights"]["sums"]


@pytest.mark.slow
def test_branches_and_samples_lie_on_different_devices(seen):
    batch, tokens = eight_devices.BATCH, eight_devices.small.TARGETS.video
    inner = 4 * eight_devices.CFG.video.width
    # Three groups (two prompts, no reference) fill two devices as four.
    assert seen["branches"]["hidden"] == (4 // 2) * (batch // 2) * tokens * inner // 2
    assert seen["weights"]["hidden"] == (batch // 2) * tokens * inner // 4


@pytest.mark.slow
def test_kernels_kept_in_8_bits_are_divided_as_bytes(seen):
    assert seen["eight_bits"]["shape"][1] == 4 * seen["eight_bits"]["part"][1]
    assert seen["eight_bits"]["dtype"] == "uint8"
    assert seen["eight_bits"]["same"]


@pytest.mark.slow
def test_kernels_in_int8_are_divided_in_host_memory(seen):
    """Values and scales by columns over four devices; scales stay on these."""
    found = seen["int8"]
    assert max(found["errors"]) < 1e-5
    for whole, part in zip(found["shapes"], found["parts"], strict=True):
        assert whole == [*part[:2], 4 * part[2]]
    assert found["kinds"][0] == hosted.KIND != found["kinds"][1]


@pytest.mark.slow
def test_rows_of_a_device_stay_on_it(seen):
    assert seen["rows"]["moves"] == 0
    assert seen["rows"]["same"]


@pytest.mark.slow
def test_samples_that_cannot_be_divided_are_on_every_device(seen):
    assert seen["rows"]["even"] == [2, 5] and seen["rows"]["odd"] == [3, 5]

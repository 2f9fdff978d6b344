"""Whatever is in a safetensors file: a correct read or one clear error, in bounds."""

import functools
import time
import tracemalloc
import warnings

import codec_sections
import mutations
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from idlora_jax import checkpoints, tiny
from idlora_jax.weights import io, tensorfile
from idlora_jax.weights.identify import identify

SECTION = {"vocoder": codec_sections.TINY_VOCODER}
WIDE = 8
LONGEST_S, MOST = 5.0, 64e6


def fuzz(examples):
    """The same examples every time, and our own limits of time."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def shapes_are_traced_once():
    """Tracing a network's `init` costs more than all the reading here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "shapes_of", functools.cache(io.shapes_of))
        yield


@pytest.fixture(scope="module")
def base_like(tmp_path_factory):
    """A file of one small network with its config."""
    path = tmp_path_factory.mktemp("base") / "x.safetensors"
    shapes = io.shapes_of("vocoder", io.read_config("vocoder", SECTION, "2.0"))
    params = tiny.random_params("vocoder", shapes, 0)
    io.save_original(path, {"vocoder": params}, SECTION, {"model_version": "2.0"})
    return path


@pytest.fixture(scope="module")
def base_shapes():
    """A transformer's parameters, as far as an adapter of its attention asks."""
    kernel = np.zeros((2, WIDE, WIDE), np.float32)
    own = {x: {"kernel": kernel} for x in "qkv"}
    return {"blocks": {"video": {"self_attn": own}}}


@pytest.fixture(scope="module")
def lora_like(tmp_path_factory):
    """An adapter of both layers of such a transformer."""
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    stem = "diffusion_model.transformer_blocks.{}.attn1.to_{}.lora_{}.weight"
    shapes = {"A": (2, WIDE), "B": (WIDE, 2)}
    tensors = {
        stem.format(layer, x, side): np.full(shape, 0.5, np.float32)
        for layer in range(2)
        for x in "qk"
        for side, shape in shapes.items()
    }
    save_file(tensors, path, metadata={"idlora": '{"generation": "2.0"}'})
    return path


def attempt(read, size):
    """What `read` gives, None for a clear ValueError; within time and memory."""
    start = time.process_time()
    tracemalloc.start()
    try:
        return read()
    except ValueError as error:
        text = str(error)
        assert not isinstance(error, UnicodeError) and len(text) < 3000
        assert text.encode("utf-8"), "a message can be printed"
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size + MOST and time.process_time() - start < LONGEST_S


def check_reading(path, content):
    """Every tensor has the bytes that the file's header says, or nothing is read."""
    path.write_bytes(content)
    opened = attempt(lambda: tensorfile.tensors_of(path), len(content))
    if opened is None:
        assert identify(path).kind == "unknown"
        return
    theirs = dict(deserialize(content))
    assert theirs.keys() == opened.specs.keys()
    for name, spec in opened.specs.items():
        array = opened.tensor(name)
        assert (array.shape, array.dtype) == spec
        assert list(array.shape) == theirs[name]["shape"]
        assert tensorfile.NAMES[array.dtype] == theirs[name]["dtype"]
        assert array.tobytes() == bytes(theirs[name]["data"])
    identify(path)


@fuzz(300)
@given(st.data())
def test_tensors_of_a_damaged_file_are_read_rightly_or_not_at_all(lora_like, data):
    content = data.draw(mutations.damaged(mutations.Whole.of(lora_like)))
    check_reading(lora_like.with_name("fuzzed.safetensors"), content)


@fuzz(80)
@given(st.data())
def test_a_damaged_base_is_read_or_refused(base_like, data):
    content = data.draw(mutations.damaged(mutations.Whole.of(base_like)))
    path = base_like.with_name("fuzzed.safetensors")
    path.write_bytes(content)
    base = attempt(lambda: io.open_base(path), len(content))
    if base is not None:
        assert base.generation in ("2.0", "2.3")
        attempt(lambda: io.load_network(base, "vocoder"), len(content))


@fuzz(200)
@given(st.data())
def test_a_damaged_adapter_is_read_or_refused(lora_like, base_shapes, data):
    content = data.draw(mutations.damaged(mutations.Whole.of(lora_like)))
    path = lora_like.with_name("fuzzed.safetensors")
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(lambda: checkpoints.load_adapter(path, base_shapes), len(content))


def test_the_undamaged_files_are_read(base_like, lora_like, base_shapes):
    check_reading(lora_like.with_name("same.safetensors"), lora_like.read_bytes())
    adapter, meta = checkpoints.load_adapter(lora_like, base_shapes)
    assert meta.generation == "2.0"
    assert {*adapter["blocks"]["video"]["self_attn"]} == {"q", "k"}
    assert io.load_network(io.open_base(base_like), "vocoder")


def test_what_safetensors_refuses_we_refuse(lora_like):
    """The other direction is not asked for: we refuse more, names given twice first."""
    whole = mutations.Whole.of(lora_like)

    @fuzz(200)
    @given(mutations.damaged(whole))
    def compare(content):
        path = lora_like.with_name("fuzzed.safetensors")
        path.write_bytes(content)
        try:
            deserialize(content)
        except SafetensorError:
            with pytest.raises(ValueError, match=r"got .*, expected"):
                tensorfile.header(path)

    compare()


@pytest.mark.parametrize("config", ["[" * 100_000, '{"transformer": 3}', "3", "", "\0"])
def test_an_impossible_config_in_a_base_is_refused(config, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"vocoder.conv_pre.weight": np.zeros(3, np.float32)}
    save_file(tensors, path, metadata={"config": config})
    with pytest.raises(ValueError, match=r"expected an? o|no JSON object"):
        io.open_base(path)
    assert identify(path).kind == "base"

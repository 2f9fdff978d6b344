"""Base checkpoints: read whole and unchanged, a little at a time, or refused."""

import json
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idlora_jax.weights import io, rules, tensorfile

QUERY = "model.diffusion_model.transformer_blocks.2.attn1.to_q.weight"


def changed(path, to, drop=(), add=None, **metadata):
    """A copy of a file with other tensors or metadata, written by safetensors."""
    tensors = {k: v for k, v in load_file(path).items() if k not in drop}
    old = {k: v for k, v in tensorfile.header(path).metadata.items()}
    old.pop(tensorfile.HASH)
    save_file(tensors | (add or {}), to, metadata=old | metadata)
    return to


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def test_every_network_is_read_as_it_was_saved(checkpoint, params):
    base = io.open_base(checkpoint)
    assert io.names_in(base) == tuple(io.NETWORKS)
    for name in io.NETWORKS:
        same(io.load_network(base, name), params[name])


def test_opening_tells_config_generation_metadata_and_hash(checkpoint, embedded):
    base = io.open_base(str(checkpoint))
    assert base.config == embedded and base.generation == "2.0"
    assert base.metadata == {"license": "none", "model_version": "2"}
    assert not base.converted
    recorded = tensorfile.header(checkpoint).metadata[tensorfile.HASH]
    assert base.base_hash == recorded and len(recorded) == 64


def test_the_names_and_shapes_in_the_file_are_the_original_ones(checkpoint):
    specs = tensorfile.header(checkpoint).tensors
    assert specs[QUERY].shape == (64, 64)
    assert specs["vocoder.ups.0.weight"].shape == (8, 4, 7)
    names = {name for name, spec in specs.items() if spec.dtype == np.float32}
    assert names == {name for name in specs if "scale_shift_table" in name}
    assert {spec.dtype.name for spec in specs.values()} == {"float32", "bfloat16"}


def test_the_generation_follows_the_model_version(checkpoint, tmp_path):
    newer = changed(checkpoint, tmp_path / "x.safetensors", model_version="2.3.1")
    assert io.open_base(newer).generation == "2.3"


def test_the_number_of_text_states_follows_from_the_projection(checkpoint):
    cfg = io.network_config(io.open_base(checkpoint), "text_connector")
    assert (cfg.text_width, cfg.text_states) == (48, 7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_are_cast_and_float32_tables_kept(checkpoint, params, dtype):
    flat = rules.flatten(
        io.load_network(io.open_base(checkpoint), "transformer", dtype)
    )
    tables = {path for path in flat if path.endswith("table")}
    assert len(tables) == 6
    for path, leaf in flat.items():
        assert leaf.dtype == (jnp.float32 if path in tables else dtype)
    want = rules.flatten(params["transformer"])
    for path, leaf in flat.items():
        np.testing.assert_array_equal(leaf, want[path].astype(leaf.dtype))


def test_a_network_is_read_without_the_others_and_each_tensor_once(
    checkpoint, monkeypatch
):
    read, original = [], tensorfile.Tensors.tensor

    def spy(self, name):
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(tensorfile.Tensors, "tensor", spy)
    base = io.open_base(checkpoint)
    io.shapes(base, "vocoder")
    io.locate(base, "transformer")
    assert read == []
    io.load_network(base, "vocoder")
    keys = [
        k for k in tensorfile.header(checkpoint).tensors if k.startswith("vocoder.")
    ]
    assert sorted(read) == sorted(keys)


def test_reading_holds_the_result_and_one_stacked_tensor(embedded, tmp_path):
    section = embedded["transformer"] | {"num_layers": 40}
    cfg = io.read_config("transformer", {"transformer": section}, "2.0")
    shapes = io.shapes_of("transformer", cfg)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    path = tmp_path / "deep.safetensors"
    io.save_original(path, {"transformer": zeros}, {"transformer": section})
    stack = max(leaf.nbytes for leaf in jax.tree.leaves(zeros))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(zeros))
    base = io.open_base(path)
    io.shapes(base, "transformer")
    tracemalloc.start()
    io.load_network(base, "transformer")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The rest is Python's: names, specs, traces of `init`.
    assert peak < total + stack + 4e6 < 1.5 * total


def test_a_missing_key_is_named_with_its_shape(checkpoint, tmp_path):
    path = changed(checkpoint, tmp_path / "x.safetensors", drop=(QUERY,))
    base = io.open_base(path)
    io.load_network(base, "vocoder")
    with pytest.raises(ValueError, match="1 missing") as caught:
        io.load_network(base, "transformer")
    text = str(caught.value)
    assert f"missing: {QUERY} [64, 64]" in text and "x.safetensors" in text
    assert "ownload" in text


def test_a_wrong_shape_and_an_unexpected_key_are_listed_together(checkpoint, tmp_path):
    odd = "model.diffusion_model.other.weight"
    add = {QUERY: np.zeros((64, 32), np.float32), odd: np.zeros(3, np.float32)}
    path = changed(checkpoint, tmp_path / "x.safetensors", add=add)
    with pytest.raises(ValueError, match="0 missing, 1 of a wrong shape, 1 unex") as e:
        io.load_network(io.open_base(path), "transformer")
    assert f"{QUERY}: got [64, 32], expected [64, 64]" in str(e.value)
    assert f"unexpected: {odd}" in str(e.value)


def test_keys_outside_a_network_s_prefixes_are_not_its_concern(checkpoint, tmp_path):
    add = {"some.other.thing": np.zeros(3, np.float32)}
    path = changed(checkpoint, tmp_path / "x.safetensors", add=add)
    got, want = (
        io.load_network(io.open_base(p), "transformer") for p in (path, checkpoint)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_network_that_is_not_in_the_file_is_missing_key_by_key(checkpoint, tmp_path):
    names = tensorfile.header(checkpoint).tensors
    drop = [name for name in names if name.startswith("vae.")]
    base = io.open_base(changed(checkpoint, tmp_path / "x.safetensors", drop=drop))
    assert "video_vae" not in io.names_in(base)
    with pytest.raises(ValueError, match=r"got 0 tensors.*\n(.*\n)*.*and \d+ more"):
        io.load_network(base, "video_vae")


def test_an_unknown_network_is_refused_with_the_known_ones(checkpoint):
    with pytest.raises(ValueError, match=r"'vea'.*video_vae"):
        io.load_network(io.open_base(checkpoint), "vea")


def test_a_truncated_file_is_refused_with_both_sizes(checkpoint, tmp_path):
    whole, path = checkpoint.read_bytes(), tmp_path / "x.safetensors"
    path.write_bytes(whole[:-1000])
    sizes = rf"{len(whole) - 1000:,} bytes.*{len(whole):,} bytes.*again"
    with pytest.raises(ValueError, match=sizes):
        io.open_base(path)
    path.write_bytes(whole[:500])
    with pytest.raises(ValueError, match="header cut off"):
        io.open_base(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04" + b"x" * 99],
)
def test_another_kind_of_file_is_refused(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        io.open_base(path)


def test_absent_files_and_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        io.open_base(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match=r"without config\.json and manifest\.json"):
        io.open_base(tmp_path)


def test_files_without_a_config_are_refused(tmp_path):
    path, adapter = tmp_path / "x.safetensors", tmp_path / "lora.safetensors"
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="no 'config'"):
        io.open_base(path)
    save_file({"diffusion_model.x.lora_A.weight": np.zeros(1)}, adapter)
    with pytest.raises(ValueError, match="an adapter"):
        io.open_base(adapter)
    for bad in ("{", "[1]"):
        save_file({"a": np.zeros(1)}, path, metadata={"config": bad})
        with pytest.raises(ValueError, match="no JSON object"):
            io.open_base(path)


def test_a_foreign_file_has_a_fingerprint_that_follows_header_and_data(
    checkpoint, tmp_path
):
    path = changed(checkpoint, tmp_path / "a.safetensors")
    again = shutil.copy(path, tmp_path / "b.safetensors")
    other = changed(checkpoint, tmp_path / "c.safetensors", note="x")
    hashes = [io.open_base(p).base_hash for p in (path, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert hashes[0].startswith("sampled:")


def test_saving_again_gives_the_same_bytes(checkpoint, params, embedded, tmp_path):
    path = tmp_path / "again.safetensors"
    metadata = {"license": "none", "model_version": "2"}
    shuffled = {name: params[name] for name in reversed(params)}
    assert io.save_original(path, shuffled, embedded, metadata) == (
        io.open_base(checkpoint).base_hash
    )
    assert path.read_bytes() == checkpoint.read_bytes()


def test_saving_refuses_a_parameter_without_a_name(embedded, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match="vocoder/other: matched by 0 rules"):
        io.save_original(path, {"vocoder": {"other": np.zeros(2)}}, embedded)
    assert not any(tmp_path.iterdir())


def test_the_config_survives_as_json(checkpoint, embedded):
    assert json.loads(tensorfile.header(checkpoint).metadata["config"]) == embedded

"""Original file -> folder -> original file, all or nothing; and the two scripts."""

import functools
import importlib.util
import json
import pathlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import adapters, checkpoints
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.weights import convert, io, rules, tensorfile

SCRIPTS = pathlib.Path(__file__).parents[2] / "convert"


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    made = tmp_path_factory.mktemp("converted") / "small"
    assert convert.convert_base(checkpoint, made, say=lambda line: None)
    return made


@functools.cache
def script(name):
    spec = importlib.util.spec_from_file_location(
        f"script_{name}", SCRIPTS / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stamps(folder):
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def test_a_converted_folder_gives_the_same_parameters(checkpoint, folder):
    original, converted = io.open_base(checkpoint), io.open_base(folder)
    assert converted.converted and converted.config == original.config
    assert converted.generation == original.generation
    assert converted.metadata == original.metadata
    assert converted.base_hash == original.base_hash
    assert io.names_in(converted) == tuple(io.NETWORKS)
    for name in io.NETWORKS:
        assert io.network_config(converted, name) == io.network_config(original, name)
        got, want = (io.load_network(base, name) for base in (converted, original))
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_folder_is_a_file_of_stacks_per_network_and_a_manifest(checkpoint, folder):
    networks = {f"{name}.safetensors" for name in io.NETWORKS}
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "manifest.json",
    } | networks
    specs = tensorfile.header(folder / "transformer.safetensors").tensors
    assert specs["blocks/video/self_attn/q/kernel"].shape == (4, 64, 64)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == checkpoint.name and manifest["generation"] == "2.0"
    assert manifest["base_hash"] == io.open_base(checkpoint).base_hash
    for name, digest in manifest["networks"].items():
        path = folder / f"{name}.safetensors"
        assert tensorfile.verify(path)
        assert tensorfile.header(path).metadata[tensorfile.HASH] == digest


def test_exporting_gives_back_the_original_file_bit_for_bit(
    checkpoint, folder, tmp_path
):
    path, lines = tmp_path / "back.safetensors", []
    digest = convert.export_base(folder, path, say=lines.append)
    assert path.read_bytes() == checkpoint.read_bytes()
    assert digest == io.open_base(checkpoint).base_hash
    assert str(path) in lines[0]


def test_converting_again_says_so_and_changes_nothing(checkpoint, folder):
    before, lines = stamps(folder), []
    assert not convert.convert_base(checkpoint, folder, say=lines.append)
    assert "already" in lines[0] and len(lines) == 1
    assert stamps(folder) == before


def test_a_destination_with_something_else_is_left_alone(checkpoint, folder, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        convert.convert_base(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="float32"):
        convert.convert_base(checkpoint, folder, jnp.float32)
    with pytest.raises(ValueError, match="a converted folder"):
        convert.convert_base(folder, tmp_path / "x")
    with pytest.raises(ValueError, match="an original file"):
        convert.export_base(checkpoint, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_a_manifest_of_something_else_is_refused(checkpoint, tmp_path):
    for name in ("config.json", "manifest.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="expected one with generation"):
        io.open_base(tmp_path)


def test_an_empty_folder_may_be_the_destination(checkpoint, tmp_path):
    networks = ("vocoder",)
    assert convert.convert_base(checkpoint, tmp_path / "a", networks=networks)
    (tmp_path / "b").mkdir()
    assert convert.convert_base(checkpoint, tmp_path / "b", networks=networks)
    assert io.names_in(io.open_base(tmp_path / "b")) == networks


def test_casting_keeps_float32_tables(checkpoint, tmp_path):
    convert.convert_base(
        checkpoint, tmp_path / "x", jnp.float32, networks=["transformer"]
    )
    flat = rules.flatten(io.load_network(io.open_base(tmp_path / "x"), "transformer"))
    assert {leaf.dtype.name for leaf in flat.values()} == {"float32"}


def test_a_network_that_was_not_converted_is_named(checkpoint, folder, tmp_path):
    convert.convert_base(checkpoint, tmp_path / "x", networks=["vocoder"])
    with pytest.raises(ValueError, match=r"audio_vae.*\['vocoder'\].*convert again"):
        io.load_network(io.open_base(tmp_path / "x"), "audio_vae")
    with pytest.raises(ValueError, match=r"expected also \['nonsense'\]"):
        convert.convert_base(checkpoint, tmp_path / "y", networks=["nonsense"])


def test_a_failure_half_way_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    written, original = [], tensorfile.write

    def failing(path, *rest):
        if len(written) == 2:
            raise OSError(28, "no space left on device")
        written.append(path)
        return original(path, *rest)

    monkeypatch.setattr(tensorfile, "write", failing)
    with pytest.raises(OSError, match="no space left"):
        convert.convert_base(checkpoint, tmp_path / "x")
    assert len(written) == 2 and not any(tmp_path.iterdir())


def test_an_incomplete_source_is_refused_before_anything_is_written(
    checkpoint, tmp_path
):
    (tmp_path / "x.safetensors").write_bytes(checkpoint.read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes"):
        convert.convert_base(tmp_path / "x.safetensors", tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_converting_holds_far_less_than_the_file(embedded, tmp_path):
    section = embedded["transformer"] | {"num_layers": 40}
    cfg = io.read_config("transformer", {"transformer": section}, "2.0")
    shapes = io.shapes_of("transformer", cfg)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
    path = tmp_path / "deep.safetensors"
    io.save_original(path, {"transformer": zeros}, {"transformer": section})
    tracemalloc.start()
    convert.convert_base(path, tmp_path / "x", say=lambda line: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6 < path.stat().st_size / 2.5


def test_the_script_converts_and_exports(checkpoint, tmp_path, capsys):
    run = script("base").main
    folder, back = str(tmp_path / "x"), str(tmp_path / "back.safetensors")
    assert run([str(checkpoint), folder, "--networks", "vocoder"]) == 0
    assert run([folder, back, "--export"]) == 0
    assert capsys.readouterr().out.count("wrote ") == 2
    assert run([str(tmp_path / "absent"), folder]) == 1
    assert "no such file" in capsys.readouterr().err
    for wrong in (
        [],
        ["a", "b", "--dtype", "int"],
        ["a", "b", "--export", "--dtype", "f32"],
    ):
        with pytest.raises(SystemExit) as exit_:
            run(wrong)
        assert exit_.value.code == 2


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """Path of an adapter of rank 2 with metadata, and its tree."""
    shapes = io.shapes(io.open_base(checkpoint), "transformer")
    tree = jax.tree.map(jnp.ones_like, adapters.init(jax.random.key(0), shapes, 2))
    path = tmp_path_factory.mktemp("adapter") / "lora.safetensors"
    meta = AdapterMeta(generation="2.0", base_hash="abc", rank=2, step=7)
    checkpoints.save_adapter(path, tree, meta)
    return path, tree


def test_the_script_checks_an_adapter_and_prints_counts(checkpoint, adapter, capsys):
    assert script("lora").main([str(adapter[0]), str(checkpoint)]) == 0
    assert "144 keys matched, 0 unmatched, 0 of a wrong" in capsys.readouterr().out


def test_the_script_folds_strength_and_alpha_and_keeps_metadata(
    checkpoint, adapter, tmp_path
):
    path, tree = adapter
    out = tmp_path / "new.safetensors"
    options = ["--output", str(out), "--strength", "0.5", "--alpha", "8"]
    assert script("lora").main([str(path), str(checkpoint), *options]) == 0
    base = io.open_base(checkpoint)
    new, meta = checkpoints.load_adapter(out, io.shapes(base, "transformer"))
    jax.tree.map(np.testing.assert_array_equal, new, adapters.scale(tree, 2.0))
    assert (meta.step, meta.base_hash, meta.alpha) == (7, "abc", 8.0)
    assert meta.extra == {"checked_against": base.base_hash, "strength": "0.5"}
    again = ["--output", str(out), "--alpha", "8"]
    assert script("lora").main([str(out), str(checkpoint), *again]) == 1


def test_the_script_refuses_what_does_not_fit(checkpoint, adapter, tmp_path, capsys):
    run, out = script("lora").main, tmp_path / "x.safetensors"
    tensors, _ = checkpoints.read_tensors(adapter[0])
    odd = {"diffusion_model.other.lora_A.weight": np.zeros((2, 4), np.float32)}
    bad = tmp_path / "bad.safetensors"
    tensorfile.write(bad, [tensorfile.entry(k, v) for k, v in (tensors | odd).items()])
    assert run([str(bad), str(checkpoint), "--output", str(out)]) == 1
    printed = capsys.readouterr()
    assert "144 keys matched, 1 unmatched" in printed.out
    assert "diffusion_model.other" in printed.err and "Traceback" not in printed.err
    assert not out.exists()
    with pytest.raises(SystemExit) as exit_:
        run([str(bad), str(checkpoint), "--strength", "2"])
    assert exit_.value.code == 2


def test_an_adapter_of_the_other_generation_is_refused(
    checkpoint, adapter, tmp_path, capsys
):
    tensors, _ = checkpoints.read_tensors(adapter[0])
    path = tmp_path / "x.safetensors"
    entries = [tensorfile.entry(k, v) for k, v in tensors.items()]
    fields = json.dumps({"generation": "2.3"})
    tensorfile.write(path, entries, {"idlora": fields})
    assert script("lora").main([str(path), str(checkpoint)]) == 1
    assert "an adapter of 2.3" in capsys.readouterr().err

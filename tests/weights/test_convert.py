"""Original file -> folder -> original file, all or nothing; and the two scripts."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax import adapters, checkpoints
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.weights import convert, io, rules, shards, tensorfile

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
    assert tuple(manifest["networks"]) == tuple(io.NETWORKS)
    for name, hashes in manifest["networks"].items():
        path = folder / f"{name}.safetensors"
        assert tensorfile.verify(path)
        digest = tensorfile.header(path).metadata[tensorfile.HASH]
        assert hashes == {path.name: digest}


def test_exporting_gives_back_the_original_file_bit_for_bit(
    checkpoint, folder, tmp_path
):
    path, lines = tmp_path / "back.safetensors", []
    digest = convert.export_base(folder, path, say=lines.append)
    assert path.read_bytes() == checkpoint.read_bytes()
    assert digest == io.open_base(checkpoint).base_hash
    assert str(path) in lines[0]


def test_exporting_again_says_so_and_another_file_stays(checkpoint, folder, tmp_path):
    path, lines = tmp_path / "back.safetensors", []
    digest = convert.export_base(folder, path, say=lines.append)
    stamp = path.stat().st_mtime_ns
    assert convert.export_base(folder, path, say=lines.append) == digest
    assert "already" in lines[-1] and path.stat().st_mtime_ns == stamp
    rewritten(checkpoint, path, lambda name, array: array + 1)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"another file.*choose another name"):
        convert.export_base(folder, path)
    assert path.read_bytes() == content


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
    with pytest.raises(ValueError, match="expected one of format 2"):
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
    with pytest.raises(ValueError, match=r"\['vocoder'\].*audio_vae.*convert again"):
        io.load_network(io.open_base(tmp_path / "x"), "audio_vae")
    with pytest.raises(ValueError, match=r"expected also \['nonsense'\]"):
        convert.convert_base(checkpoint, tmp_path / "y", networks=["nonsense"])


def test_small_shards_hold_the_same_parameters(checkpoint, folder, tmp_path):
    made = tmp_path / "x"
    convert.convert_base(checkpoint, made, limit=200_000, say=lambda line: None)
    assert len(list(made.glob("transformer-*-of-*.safetensors"))) > 2
    for name in io.NETWORKS:
        got, want = (io.load_network(io.open_base(f), name) for f in (made, folder))
        jax.tree.map(np.testing.assert_array_equal, got, want)
    convert.export_base(made, tmp_path / "back.safetensors", say=lambda line: None)
    assert (tmp_path / "back.safetensors").read_bytes() == checkpoint.read_bytes()


def stop_after(count, monkeypatch, error):
    """The third and later files are refused; the names of those written."""
    written, original = [], tensorfile.write

    def failing(path, *rest):
        if len(written) == count:
            raise error
        written.append(pathlib.Path(path).name)
        return original(path, *rest)

    monkeypatch.setattr(tensorfile, "write", failing)
    return written


@pytest.mark.parametrize("error", [OSError(28, "no space left"), KeyboardInterrupt()])
def test_a_conversion_that_was_stopped_goes_on(
    checkpoint, folder, tmp_path, monkeypatch, error
):
    lines, made = [], tmp_path / "x"
    with monkeypatch.context() as patch:
        first = stop_after(2, patch, error)
        with pytest.raises(type(error)):
            convert.convert_base(checkpoint, made, say=lines.append)
    assert "2 finished files stay" in lines[-1]
    assert [p.name for p in tmp_path.iterdir()] == [".x.partial"]
    second = stop_after(99, monkeypatch, None)
    assert convert.convert_base(checkpoint, made, say=lines.append)
    assert any("2 of 5 files are there already" in line for line in lines)
    assert len(second) == 3 and not set(first) & set(second)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    for path in folder.iterdir():
        assert (made / path.name).read_bytes() == path.read_bytes()


def test_what_another_source_or_dtype_began_is_not_gone_on_with(
    checkpoint, tmp_path, monkeypatch
):
    made = tmp_path / "x"
    with monkeypatch.context() as patch:
        stop_after(2, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert.convert_base(checkpoint, made)
    written = stop_after(99, monkeypatch, None)
    convert.convert_base(checkpoint, made, jnp.bfloat16)
    assert len(written) == len(io.NETWORKS)


def test_a_failure_before_the_first_file_leaves_nothing(
    checkpoint, tmp_path, monkeypatch
):
    stop_after(0, monkeypatch, OSError(28, "no space left on device"))
    with pytest.raises(OSError, match="no space left"):
        convert.convert_base(checkpoint, tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_a_disk_without_room_is_named_before_anything_is_written(
    checkpoint, tmp_path, monkeypatch
):
    usage = type("Usage", (), {"free": 1_000_000})()
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"0\.00 GB free.*free some space"):
        convert.convert_base(checkpoint, tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_two_runs_do_not_write_the_same_folder(checkpoint, tmp_path):
    growing = shards.partial(tmp_path / "x")
    growing.mkdir()
    with shards.locked(growing), pytest.raises(ValueError, match="another run"):
        convert.convert_base(checkpoint, tmp_path / "x")


def rewritten(checkpoint, path, change):
    """A copy of a checkpoint whose tensors went through `change(name, array)`."""
    head, tensors = tensorfile.header(checkpoint), tensorfile.tensors_of(checkpoint)
    arrays = {name: change(name, tensors.tensor(name)) for name in head.tensors}
    metadata = {k: v for k, v in head.metadata.items() if k != tensorfile.HASH}
    tensorfile.write(path, [tensorfile.entry(*i) for i in arrays.items()], metadata)
    return path


def test_a_stack_of_several_dtypes_comes_back_as_it_was(checkpoint, tmp_path):
    def change(name, array):
        if "blocks.1.attn1.to_q" in name:  # beside float32
            return array.astype(jnp.bfloat16)
        if "attn2.to_q.weight" in name and ".audio" not in name:
            return array.astype(np.float16 if "blocks.2" in name else jnp.bfloat16)
        return array

    source = rewritten(checkpoint, tmp_path / "a.safetensors", change)
    convert.convert_base(source, tmp_path / "x", say=lambda line: None)
    convert.export_base(tmp_path / "x", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == source.read_bytes()


def test_tensors_of_no_network_are_not_left_out_silently(checkpoint, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = tensorfile.tensors_of(checkpoint)
    entries = [tensorfile.entry(n, tensors.tensor(n)) for n in tensors.specs]
    odd = tensorfile.entry("ema.decay", np.ones(3, np.float32))
    tensorfile.write(path, [*entries, odd], tensorfile.header(checkpoint).metadata)
    with pytest.raises(ValueError, match=r"1 tensors that belong.*ema\.decay"):
        convert.convert_base(path, tmp_path / "x")
    assert convert.convert_base(path, tmp_path / "x", networks=["vocoder"])


def test_a_finetune_of_the_same_shape_is_another_source(checkpoint, tmp_path):
    import safetensors.numpy

    config = tensorfile.header(checkpoint).metadata["config"]
    tensors = tensorfile.tensors_of(checkpoint)
    arrays = {name: tensors.tensor(name) for name in tensors.specs}
    for name, factor in (("a", 1.0), ("b", 1.01)):
        scaled = {
            key: (array * factor).astype(array.dtype) for key, array in arrays.items()
        }
        path = tmp_path / f"{name}.safetensors"
        safetensors.numpy.save_file(scaled, path, metadata={"config": config})
    convert.convert_base(tmp_path / "a.safetensors", tmp_path / "x")
    with pytest.raises(ValueError, match="a conversion with"):
        convert.convert_base(tmp_path / "b.safetensors", tmp_path / "x")


def test_an_incomplete_source_is_refused_before_anything_is_written(
    checkpoint, tmp_path
):
    (tmp_path / "x.safetensors").write_bytes(checkpoint.read_bytes()[:-8])
    with pytest.raises(ValueError, match="bytes"):
        convert.convert_base(tmp_path / "x.safetensors", tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


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
        ["a"],
        ["a", "b", "--check"],
        ["a", "--check", "--dtype", "f32"],
        ["a", "b", "--dtype", "int"],
        ["a", "b", "--export", "--dtype", "f32"],
        ["a", "b", "--format", "diffusers"],
        ["a", "b", "--export", "--distilled"],
        ["a", "b", "--export", "--format", "diffusers", "--weights", "keep"],
    ):
        with pytest.raises(SystemExit) as exit_:
            run(wrong)
        assert exit_.value.code == 2


def test_the_script_checks_and_verifies(checkpoint, tmp_path, capsys):
    run, folder = script("base").main, tmp_path / "x"
    assert run([str(checkpoint), str(folder)]) == 0
    assert run([str(folder), "--verify"]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    assert run([str(checkpoint), "--check"]) == 0
    assert "parameters  complete" in capsys.readouterr().out
    (folder / "vocoder.safetensors").unlink()
    assert run([str(folder), "--check"]) == 1
    assert "vocoder.safetensors" in capsys.readouterr().err


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
    checked = {"checked_against": base.base_hash, "checked_name": checkpoint.name}
    assert meta.extra == {**checked, "strength": "0.5"}
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

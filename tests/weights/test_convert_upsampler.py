"""The script convert/upsampler.py: what it prints, writes and returns."""

import importlib.util
import pathlib

import jax
import pytest
import sparse_files

from idlora_jax.config_upsampler import UpsamplerConfig
from idlora_jax.model import upsampler
from idlora_jax.weights import upsampler_files

CFG = UpsamplerConfig(4, 32, 0, 3, (2, 1), 1, False)


@pytest.fixture(scope="module")
def run():
    path = pathlib.Path(__file__).parents[2] / "convert" / "upsampler.py"
    spec = importlib.util.spec_from_file_location("script_upsampler", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *argv: module.main([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("upsampler") / "x2.safetensors"
    params = upsampler.init(CFG, jax.random.key(0))
    upsampler_files.save_upsampler(path, CFG, params)
    return path


def test_the_script_converts_once_and_exports(run, original, tmp_path, capsys):
    made, back = tmp_path / "made.safetensors", tmp_path / "back.safetensors"
    assert run(original, made) == 0
    assert run(original, made) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert run("--export", made, back) == 0
    assert back.read_bytes() == original.read_bytes()
    assert run(original, tmp_path / "half", "--dtype", "bf16") == 0
    assert run("--check", tmp_path / "half") == 0
    out = capsys.readouterr().out
    assert "converted file" in out and "height and width x2," in out


def test_the_script_checks_a_file_of_published_size(run, tmp_path, capsys):
    name = "ltx-2-spatial-upscaler-x2-1.0"
    path = sparse_files.write(tmp_path / "x.safetensors", name)
    assert run("--check", path) == 0
    out = capsys.readouterr().out
    assert "73 tensors 497,867,929 parameters  complete" in out
    assert "x2 (rational form)" in out
    keep = lambda key: key != "final_conv.bias"
    path = sparse_files.write(tmp_path / "y.safetensors", name, only=keep)
    assert run("--check", path) == 1
    out = capsys.readouterr().out
    assert "INCOMPLETE" in out and "missing: final_conv.bias [128]" in out


@pytest.mark.parametrize(
    ("published", "got"),
    [("ltx-2-19b-dev", "a base checkpoint"), ("id-lora-19b", "an adapter (LoRA)")],
)
def test_another_published_file_is_one_message(run, published, got, tmp_path, capsys):
    path = sparse_files.write(tmp_path / "x.safetensors", published)
    assert run("--check", path) == 1
    assert run(path, tmp_path / "y") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and errors[0] == errors[1]
    assert got in errors[0] and "expected a latent upsampler" in errors[0]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_script_finds_a_changed_byte(run, original, tmp_path, capsys):
    assert run("--verify", original) == 0
    assert "every byte" in capsys.readouterr().out
    changed, raw = tmp_path / "x.safetensors", bytearray(original.read_bytes())
    raw[-1] ^= 1
    changed.write_bytes(raw)
    assert run("--check", changed) == 0
    assert run("--verify", changed) == 1
    assert "got other bytes" in capsys.readouterr().err
    name = "ltx-2-spatial-upscaler-x2-1.0"
    foreign = sparse_files.write(tmp_path / "y.safetensors", name)
    assert run("--verify", foreign) == 1
    assert "without a recorded hash" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["a"],
        ["a", "b", "--check"],
        ["a", "b", "--verify"],
        ["a", "b", "--dtype", "int"],
        ["a", "b", "--export", "--dtype", "f32"],
        ["a", "b", "--export", "--check"],
    ],
)
def test_wrong_usage_is_status_two(run, argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(*argv)
    assert exit_.value.code == 2
    assert "usage:" in capsys.readouterr().err

"""convert/lora.py: every format to every other, refusals, and what is recorded."""

import functools
import importlib.util
import json
import pathlib
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import sparse_files
from safetensors.numpy import load_file, save_file

from idlora_jax import checkpoints
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.weights import (
    adapter_files,
    convert,
    io,
    lora_files,
    lora_match,
    lora_names,
)
from idlora_jax.weights.lora_names import FORMATS

SCRIPT = pathlib.Path(__file__).parents[2] / "convert" / "lora.py"
QUERY = "diffusion_model.transformer_blocks.{}.audio_attn1.to_q"
TEXT = "text_embedding_projection.aggregate_embed"


@functools.cache
def script():
    spec = importlib.util.spec_from_file_location("script_lora_files", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(checkpoint, capsys):
    """The script on a file and the checkpoint: (status, what it printed, errors)."""

    def call(source, *options):
        status = script().main([str(source), str(checkpoint), *map(str, options)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def bases(checkpoint):
    base = io.open_base(checkpoint)
    return {n: io.shapes(base, n) for n in lora_files.NETWORKS}


def random_file(bases, dtype=ml_dtypes.bfloat16, *, text=True, step=7):
    """Every `step`-th module of both networks, of several ranks."""
    rng, out = np.random.default_rng(0), {}
    for n, slot in enumerate(lora_names.slots(bases)):
        wanted = slot.module.network == "transformer" or text
        if (n % step and slot.name != TEXT) or not wanted:
            continue
        rank = 2 + n % 3
        a, b = rng.normal(size=(rank, slot.wide)), rng.normal(size=(slot.out, rank))
        out[f"{slot.name}.lora_A.weight"] = a.astype(dtype)
        out[f"{slot.name}.lora_B.weight"] = b.astype(dtype)
    return out


def same(got, want):
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert got[key].dtype == tensor.dtype
        np.testing.assert_array_equal(got[key], tensor)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("format", FORMATS)
def test_there_and_back_is_bit_exact(format, dtype, run, bases, tmp_path):
    tensors = random_file(bases, dtype, text=format != "kohya")
    source = tmp_path / "in.safetensors"
    save_file(tensors, source)
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    status, out, _ = run(source, "--output", there, "--format", format)
    assert status == 0 and "rank 2 (" in out
    assert (there.is_dir(), back.exists()) == (format == "peft", False)
    status, out, _ = run(there, "--output", back)
    assert status == 0 and f"{format} keys" in out
    same(load_file(back), tensors)


@pytest.mark.parametrize("format", ["comfyui", "diffusers", "peft"])
def test_both_networks_parts_are_loaded(format, run, bases, tmp_path):
    source, there = tmp_path / "in.safetensors", tmp_path / "there"
    save_file(random_file(bases), source)
    assert run(source, "--output", there, "--format", format)[0] == 0
    with pytest.raises(ValueError, match=r"text_connector, which was not asked for"):
        checkpoints.load_adapter(there, bases["transformer"])
    got, meta = checkpoints.load_adapters(there, bases)
    want, _ = checkpoints.load_adapters(source, bases)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert set(got) == {"transformer", "text_connector"} and meta.rank == 4
    part, meta = checkpoints.load_adapter(
        there, bases["transformer"], allow_partial=True
    )
    jax.tree.map(np.testing.assert_array_equal, part, want["transformer"])
    assert len(json.loads(meta.extra["left_out"])) == len(load_text(source))


def load_text(path):
    mine = ("text_embedding", "diffusion_model.video_emb", "diffusion_model.audio_emb")
    return [key for key in load_file(path) if key.startswith(mine)]


def test_kohya_refuses_the_text_projection_or_leaves_it_out_and_says_so(
    run, bases, tmp_path
):
    source, there = tmp_path / "in.safetensors", tmp_path / "there.safetensors"
    save_file(random_file(bases), source)
    options = ("--output", there, "--format", "kohya")
    status, _, err = run(source, *options)
    assert status == 1 and "no name for text_embedding_projection" in err
    assert not there.exists()
    status, out, _ = run(source, *options, "--allow-partial")
    assert status == 0 and "left out 2 keys" in out
    _, meta = checkpoints.load_adapters(there, bases)
    left = json.loads(meta.extra["left_out"])
    assert left == [f"{TEXT}.lora_A.weight", f"{TEXT}.lora_B.weight"]
    save_file({k: v for k, v in load_file(source).items() if TEXT in k}, source)
    status, _, err = run(
        source, "--output", tmp_path / "x", *options[2:], "--allow-partial"
    )
    assert status == 1 and "modules without a name in it" in err


def test_alphas_are_folded_and_recorded(run, bases, tmp_path):
    source, there = tmp_path / "in.safetensors", tmp_path / "there.safetensors"
    tensors = random_file(bases, np.float32, text=False)
    names = {key.partition(".lora_")[0] for key in tensors}
    alphas = {f"{name}.alpha": np.float32(6) for name in names}
    save_file(tensors | {k: np.array(v) for k, v in alphas.items()}, source)
    assert run(source, "--output", there)[0] == 0
    for key, tensor in load_file(there).items():
        rank = min(tensor.shape)
        factor = np.float32(6 / rank) if "lora_B" in key else 1
        np.testing.assert_array_equal(tensor, tensors[key] * factor)
    meta = checkpoints.load_adapters(there, bases)[1]
    assert (meta.alpha, meta.rank, meta.generation) == (6.0, 4, "2.0")
    again = tmp_path / "again.safetensors"
    status, _, err = run(source, "--output", again, "--alpha", 8)
    assert status == 1 and "says its alpha, 6" in err and "leave out --alpha" in err
    status, _, err = run(there, "--output", again, "--alpha", 8)
    assert status == 1 and not again.exists()


def test_what_training_recorded_stays_and_what_is_unknown_is_not_invented(
    run, bases, tmp_path
):
    source, there = tmp_path / "in.safetensors", tmp_path / "there"
    adapter, _ = checkpoints.load_adapters(_saved(bases, source), bases)
    meta = AdapterMeta(
        generation="2.0",
        base_name="some-base",
        base_hash="ab",
        alpha=3.0,
        targets=("x",),
        numerics="reference",
        reference_gap_s=0.08,
        video_sees_ref=False,
        fps=24.0,
        reference_s=4.84,
    )
    ours = tmp_path / "ours.safetensors"
    checkpoints.save_adapter(ours, adapter["transformer"], meta)
    assert run(ours, "--output", there, "--format", "peft", "--strength", 0.5)[0] == 0
    _, found = checkpoints.load_adapters(there, bases)
    kept = {f: getattr(meta, f) for f in meta.__dataclass_fields__}
    for name in ("rank", "extra", "content_hash"):
        kept.pop(name)
    assert kept == {name: getattr(found, name) for name in kept}
    assert found.extra["strength"] == "0.5" and len(found.content_hash) == 64
    text = json.loads((there / "adapter_config.json").read_text())
    assert text["base_model_name_or_path"] == "some-base"
    foreign = tmp_path / "foreign.safetensors"
    assert run(source, "--output", foreign)[0] == 0
    recorded = lora_files.open_lora(foreign).recorded
    assert not {"fps", "numerics", "base_hash", "alpha", "step"} & recorded.keys()
    assert recorded["extra"]["checked_name"] == "small.safetensors"
    assert "blocks/audio/self_attn/q" in recorded["targets"]
    odd = json.dumps({"extra": {"strength": "strong"}})
    save_file(load_file(source), source, {"idlora": odd})
    status, _, err = run(source, "--output", tmp_path / "x", "--strength", 2)
    assert status == 1 and "a recorded strength of 'strong'" in err


def _saved(bases, path, **kinds):
    save_file(random_file(bases, text=False, step=1, **kinds), path)
    return path


def test_dtype_is_of_the_output(run, bases, tmp_path):
    source = _saved(bases, tmp_path / "in.safetensors", dtype=np.float32)
    for name, dtype in {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}.items():
        out = tmp_path / f"{name}.safetensors"
        assert run(source, "--output", out, "--dtype", name)[0] == 0
        assert {t.dtype.name for t in load_file(out).values()} == {dtype}


def test_a_finished_output_is_left_alone_and_another_s_is_refused(run, bases, tmp_path):
    source, there = _saved(bases, tmp_path / "in.safetensors"), tmp_path / "there"
    for format in ("peft", "comfyui"):
        there = tmp_path / format
        options = ("--output", there, "--format", format, "--dtype", "f32")
        assert run(source, *options)[0] == 0
        stamp = there.stat().st_mtime_ns
        status, out, _ = run(source, *options)
        assert status == 0 and "nothing to do" in out
        assert there.stat().st_mtime_ns == stamp
        status, _, err = run(source, *options, "--strength", 2)
        assert status == 1 and "got something else" in err
    status, _, err = run(source, "--output", source)
    assert status == 1 and "got something else" in err
    changed = {k: v + 1 for k, v in load_file(source).items()}
    time.sleep(0.01)
    save_file(changed, source)
    assert run(source, *options)[0] == 1
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"in.safetensors", "peft", "comfyui"}


def test_a_partial_match_must_be_allowed_and_is_recorded(run, bases, tmp_path):
    source, there = tmp_path / "in.safetensors", tmp_path / "there.safetensors"
    tensors = random_file(bases, text=False)
    odd = {
        f"{QUERY.format(77)}.lora_A.weight": np.ones((2, 4), np.float32),
        f"{QUERY.format(77)}.lora_B.weight": np.ones((4, 2), np.float32),
    }
    save_file(tensors | odd, source)
    for options in ((), ("--check",), ("--output", there)):
        status, out, err = run(source, *options)
        assert status == 1 and "2 unmatched" in out and "layer 77 of a base" in err
        assert "--allow-partial" in err
    assert not there.exists()
    assert run(source, "--check", "--allow-partial")[0] == 0
    status, out, _ = run(source, "--output", there, "--allow-partial")
    assert status == 0 and "left out 2 keys" in out
    assert load_file(there).keys() == tensors.keys()
    _, meta = checkpoints.load_adapters(there, bases)
    assert json.loads(meta.extra["left_out"]) == [*odd]
    save_file(odd, source)
    status, _, err = run(source, "--output", there, "--allow-partial")
    assert status == 1 and "0 keys matched" in err


def test_an_adapter_of_zeros_gets_a_warning(run, bases, tmp_path):
    source = tmp_path / "in.safetensors"
    tensors = random_file(bases, text=False)
    zero = {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}
    save_file(zero, source)
    status, out, _ = run(source)
    assert status == 0 and "this adapter changes nothing" in out
    with pytest.warns(UserWarning, match="every lora_B is zero, it changes nothing"):
        checkpoints.load_adapter(source, bases["transformer"])
    assert "changes nothing" not in run(_saved(bases, source))[1]


def test_values_are_checked_without_an_output_too(run, bases, tmp_path):
    source = tmp_path / "in.safetensors"
    tensors = random_file(bases, text=False)
    [*tensors.values()][3][0, 0] = np.nan
    save_file(tensors, source)
    assert run(source, "--check")[0] == 0
    status, _, err = run(source)
    assert status == 1 and f"NaN or infinity in {[*tensors][3]}" in err


@pytest.mark.parametrize("partial", [False, True])
def test_the_other_generation_is_refused(partial, run, bases, tmp_path):
    source = tmp_path / "in.safetensors"
    gate = "diffusion_model.transformer_blocks.0.attn1.to_gate_logits"
    extra = {
        f"{gate}.lora_A.weight": np.ones((2, 64), np.float32),
        f"{gate}.lora_B.weight": np.ones((4, 2), np.float32),
    }
    options = ("--allow-partial",) if partial else ()
    tensors = random_file(bases, text=False)
    save_file(tensors | extra, source)
    status, _, err = run(source, *options)
    assert (
        status == 1 and "an adapter of 2.3 by its modules, expected one of 2.0" in err
    )
    save_file(tensors, source, {"idlora": json.dumps({"generation": "2.3"})})
    status, _, err = run(source, *options)
    assert status == 1 and "an adapter of 2.3, expected one of 2.0" in err


@pytest.mark.parametrize(
    "options",
    [
        ["--check", "--output", "x"],
        ["--format", "peft"],
        ["--dtype", "f16"],
        ["--alpha", "2"],
        ["--output", "x", "--format", "lycoris"],
        ["--output", "x", "--dtype", "int8"],
    ],
)
def test_wrong_usage_ends_with_status_2(options, run):
    with pytest.raises(SystemExit) as exit_:
        run("a", *options)
    assert exit_.value.code == 2


def test_a_base_or_rubbish_given_as_a_lora_is_named(run, checkpoint, tmp_path):
    status, _, err = run(checkpoint)
    assert status == 1 and "got a base checkpoint" in err and "convert/base.py" in err
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"<!DOCTYPE html>")
    status, _, err = run(path)
    assert status == 1 and "x.safetensors" in err


def test_the_base_may_be_a_converted_folder(checkpoint, bases, run, tmp_path):
    source = tmp_path / "in.safetensors"
    save_file(random_file(bases), source)
    names = ("transformer", "text_connector")
    for networks, status in ((names, 0), (names[:1], 1), (names[1:], 1)):
        folder = tmp_path / "-".join(networks)
        convert.convert_base(checkpoint, folder, networks=networks, say=lambda _: None)
        assert script().main([str(source), str(folder)]) == status


def test_a_full_disk_leaves_nothing_behind(run, bases, tmp_path, monkeypatch):
    def full(entry):
        raise OSError(28, "No space left on device")
        yield

    source = _saved(bases, tmp_path / "in.safetensors")
    monkeypatch.setattr(adapter_files.lora_formats.tensorfile, "_data", full)
    for format in FORMATS:
        out = tmp_path / format
        status, _, err = run(source, "--output", out, "--format", format)
        assert status == 1 and "No space left" in err
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("id-lora-22b", "ltx-2.3-22b-dev"),
        ("ltx-2-19b-distilled-lora-384", "ltx-2-19b-dev"),
    ],
)
def test_a_check_of_gigabytes_reads_headers_alone(name, model, tmp_path):
    lora = sparse_files.write(tmp_path / "lora.safetensors", name)
    base = sparse_files.write(tmp_path / "base.safetensors", model)
    lines = []
    start = time.process_time()
    found = adapter_files.check(lora, base, say=lines.append)
    assert time.process_time() - start < 15
    count = len(sparse_files.manifest(name))
    assert f"{count} keys matched, 0 unmatched, 0 of a wrong shape" in lines[0]
    assert isinstance(found.report, lora_match.Report) and "bfloat16" in lines[1]

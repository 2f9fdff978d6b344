"""Opening LoRA files: settings beside them, factors, values that are no numbers."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import sparse_files
from safetensors.numpy import save_file

from idlora_jax import config
from idlora_jax.weights import io, lora_files, lora_match

NAME = "transformer_blocks.{}.audio_attn1.to_q"
BASES = {"transformer": io.shapes_of("transformer", config.tiny())}


def pair(prefix, layer=0, rank=4):
    name = prefix + NAME.format(layer)
    return {
        f"{name}.lora_A.weight": np.ones((rank, 32), np.float32),
        f"{name}.lora_B.weight": np.ones((32, rank), np.float32),
    }


def peft(folder, settings, tensors=None):
    folder.mkdir(exist_ok=True)
    found = pair("base_model.model.") if tensors is None else tensors
    save_file(found, folder / "adapter_model.safetensors")
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (folder / "adapter_config.json").write_text(text)
    return folder


def factors(path):
    file = lora_files.open_lora(path)
    report = lora_match.match(file.tensors.specs, BASES)
    return [lora_files.factor(file, pair) for pair in report.pairs]


SETTINGS = {
    "nothing said": ({}, 8 / 4),
    "alpha": ({"r": 4, "lora_alpha": 6}, 6 / 4),
    "root": ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 6 / 2),
    "end": ({"lora_alpha": 6, "alpha_pattern": {"audio_attn1.to_q": 2}}, 2 / 4),
    "whole": ({"lora_alpha": 6, "alpha_pattern": {f"^{NAME.format(0)}": 2}}, 2 / 4),
    "half a word": ({"lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 2}}, 6 / 4),
    "anchored end": ({"lora_alpha": 6, "alpha_pattern": {"^to_q": 2}}, 6 / 4),
    "pattern": ({"lora_alpha": 6, "alpha_pattern": {r".*\.to_[qk]": 2}}, 2 / 4),
    "first": ({"alpha_pattern": {"to_q": 2, NAME.format(0): 3}}, 2 / 4),
    "rank": ({"r": 8, "lora_alpha": 6, "rank_pattern": {"to_q": 4}}, 6 / 4),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_s_settings_give_the_factor(name, tmp_path):
    settings, factor = SETTINGS[name]
    folder = peft(tmp_path / "a", settings)
    for path in (folder, folder / "adapter_model.safetensors"):
        assert factors(path) == [pytest.approx(factor)]


WRONG = {
    "another rank": ({"r": 8}, "got rank 8 of .*to_q, expected 4"),
    "DoRA": ({"use_dora": True}, "'use_dora': True"),
    "biases": ({"bias": "all"}, "'bias': 'all'"),
    "IA3": ({"peft_type": "IA3"}, "'peft_type': 'IA3'"),
    "text": ({"lora_alpha": "many"}, "is no number"),
    "infinity": ({"lora_alpha": math.inf}, "is no number"),
    "a list": ({"alpha_pattern": [1]}, "is no number"),
    "no JSON": ("{", "no JSON object"),
    "an odd pattern": ({"alpha_pattern": {"(": 2}}, "is no pattern"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_cannot_be_are_refused(name, tmp_path):
    settings, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        factors(peft(tmp_path / "a", settings))


def test_without_settings_alpha_is_the_rank_and_that_is_said(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(pair("base_model.model."), path)
    assert factors(path) == [1.0]
    assert "alpha is taken as the rank" in lora_files.open_lora(path).notes[0]


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_diffusers_keeps_the_settings_in_the_metadata(prefix, tmp_path):
    settings = {f"{prefix}r": 4, f"{prefix}lora_alpha": 6}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    for tensors in (pair("transformer."), pair("")):
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
        assert factors(tmp_path) == factors(path) == [1.5]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_an_alpha_in_the_file_goes_before_everything(dtype, tmp_path):
    path = tmp_path / "a.safetensors"
    alpha = {f"transformer.{NAME.format(0)}.alpha": np.array(3, dtype)}
    settings = json.dumps({"transformer.lora_alpha": 6, "transformer.use_rslora": True})
    tensors = pair("transformer.") | alpha
    save_file(tensors, path, {"lora_adapter_metadata": settings})
    assert factors(path) == [3 / 4]
    alpha = {f"transformer.{NAME.format(0)}.alpha": np.array(np.nan, dtype)}
    save_file(pair("transformer.") | alpha, path)
    with pytest.raises(ValueError, match=r"\.alpha: got nan"):
        factors(path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_values_that_are_no_numbers_are_named(dtype, value, side, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {k: v.astype(dtype) for k, v in pair("diffusion_model.").items()}
    (key,) = (k for k in tensors if side in k)
    tensors[key][1, 2] = value
    save_file(tensors, path)
    file = lora_files.open_lora(path)
    (found,) = lora_match.match(file.tensors.specs, BASES).pairs
    with pytest.raises(ValueError, match=f"NaN or infinity in .*{side}"):
        lora_files.pair_tensors(file, found)


def test_folding_rounds_once_and_is_exact_for_one():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(ml_dtypes.bfloat16)
    assert lora_files.folded(x, 1.0, x.dtype, "x") is x
    want = (x.astype(np.float32) * np.float32(0.3)).astype(x.dtype)
    np.testing.assert_array_equal(lora_files.folded(x, 0.3, x.dtype, "x"), want)
    wide = np.full((2, 2), 1e5, np.float32)
    with pytest.raises(ValueError, match="x: a value is too large for float16"):
        lora_files.folded(wide, 1.0, np.float16, "x")


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without adapter_model\.safetensors"):
        lora_files.open_lora(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"a pickle \(adapter_model\.bin\)"):
        lora_files.open_lora(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        lora_files.open_lora(tmp_path / "none.safetensors")


def test_one_key_in_two_files_is_refused(tmp_path):
    folder = peft(tmp_path / "a", {"r": 4})
    peft(folder / "connectors", {"r": 4})
    with pytest.raises(ValueError, match=r"which .* has, too"):
        lora_files.open_lora(folder)


def test_no_tensors_are_no_adapter(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    file = lora_files.open_lora(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        lora_match.match(file.tensors.specs, BASES)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ltx-2-19b-dev", r"a base checkpoint of generation 2\.0.*convert/base\.py"),
        ("ltx-2-spatial-upscaler-x2-1.0", r"a latent upsampler.*convert/upsampler"),
    ],
)
def test_what_is_no_lora_at_all_is_named(tmp_path, name, what):
    path = sparse_files.write(tmp_path / "x.safetensors", name)
    with pytest.raises(ValueError, match=what):
        lora_files.open_lora(path)

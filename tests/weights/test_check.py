"""The report of a checkpoint from its headers, and the check of every byte."""

import json
import time

import numpy as np
import pytest
import sparse_files

from idlora_jax.weights import bases, check, convert, io, tensorfile

INDEX = json.loads((sparse_files.MANIFESTS / "index.json").read_text("utf-8"))
BASES = ["ltx-2-19b-dev", "ltx-2-19b-dev-fp8", "ltx-2.3-22b-dev"]


@pytest.mark.parametrize("name", BASES)
def test_a_published_file_is_complete_and_its_totals_are_the_published(name, tmp_path):
    path = sparse_files.write(tmp_path / f"{name}.safetensors", name)
    assert path.stat().st_size > 27e9 and path.stat().st_blocks < 10_000
    start = time.process_time()
    found = check.report(path)
    assert time.process_time() - start < 40
    assert found.complete, str(found)
    assert found.tensors == INDEX[name]["tensors"]
    assert found.parameters == INDEX[name]["params"]
    assert found.generation == ("2.3" if "2.3" in name else "2.0")
    text = str(found)
    assert f"{INDEX[name]['params']:,} parameters  complete" in text
    assert "transformer" in text and f"{path.stat().st_size / 1e9:.2f} GB" in text


def test_what_is_missing_wrong_or_foreign_is_named_by_network(tmp_path):
    lacking = "model.diffusion_model.transformer_blocks.7.attn1.to_q.weight"
    path = sparse_files.write(
        tmp_path / "a.safetensors", "ltx-2-19b-dev", only=lambda key: key != lacking
    )
    found = check.report(path)
    assert not found.complete
    wrong = {part.name: part.problem for part in found.parts if part.problem}
    assert [*wrong] == ["transformer"] and f"missing: {lacking}" in wrong["transformer"]
    assert "INCOMPLETE" in str(found) and lacking in str(found)


def test_the_config_of_another_generation_is_no_match(tmp_path):
    path = sparse_files.write(
        tmp_path / "a.safetensors", "ltx-2-19b-dev", "ltx-2.3-22b"
    )
    found = check.report(path)
    assert not found.complete
    assert {part.name for part in found.parts if part.problem} >= {"transformer"}


def test_a_converted_folder_has_the_parameters_of_its_source(checkpoint, tmp_path):
    convert.convert_base(checkpoint, tmp_path / "x", say=lambda line: None)
    before, after = check.report(checkpoint), check.report(tmp_path / "x")
    assert before.complete and after.complete
    assert before.parameters == after.parameters > 0
    assert [part.parameters for part in before.parts] == [
        part.parameters for part in after.parts
    ]


def test_every_byte_is_verified(checkpoint, tmp_path):
    convert.convert_base(checkpoint, tmp_path / "x", say=lambda line: None)
    base, read = io.open_base(tmp_path / "x"), []
    check.verify(base, read.append)
    total = sum(path.stat().st_size for path in bases.files_of(base))
    assert 0.9 * total < sum(read) <= total
    check.verify(io.open_base(checkpoint))
    path = tmp_path / "x" / "vocoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other bytes in vocoder\.safetensors"):
        check.verify(base)


def test_a_file_swapped_for_another_intact_one_is_noticed(checkpoint, tmp_path):
    convert.convert_base(checkpoint, tmp_path / "x", say=lambda line: None)
    path = tmp_path / "x" / "vocoder.safetensors"
    tensors = tensorfile.tensors_of(path)
    entries = [
        tensorfile.entry(name, np.zeros(spec.shape, spec.dtype))
        for name, spec in tensors.specs.items()
    ]
    tensorfile.write(path, entries, {"network": "vocoder"})
    assert tensorfile.verify(path)
    with pytest.raises(ValueError, match="other bytes in vocoder"):
        check.verify(io.open_base(tmp_path / "x"))


def test_a_file_of_others_has_nothing_to_compare_with(tmp_path):
    path = sparse_files.write(tmp_path / "a.safetensors", "ltx-2-19b-dev")
    with pytest.raises(ValueError, match=r"no recorded hash.*convert/base\.py"):
        check.verify(io.open_base(path))

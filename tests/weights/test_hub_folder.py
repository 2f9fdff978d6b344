"""Shards and their index: what a folder says is checked before a tensor is read."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from idlora_jax.weights import hub_folder

NAMES = ("a", "b", "c")


def tensors(*names):
    return {name: np.full(3, ord(name[0]), np.float32) for name in names}


def write_index(folder, weight_map, name="model"):
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{name}.safetensors.index.json").write_text(text)


@pytest.fixture
def folder(tmp_path):
    """Three tensors in two shards."""
    save_file(tensors("a", "b"), tmp_path / "1.safetensors")
    save_file(tensors("c"), tmp_path / "2.safetensors")
    files = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    write_index(tmp_path, files)
    return tmp_path


def test_the_shards_of_an_index_are_one_view(folder):
    save_file(tensors("d"), folder / "unrelated.safetensors")
    found = hub_folder.tensors_in(folder)
    assert sorted(found.specs) == [*NAMES]
    for name in NAMES:
        np.testing.assert_array_equal(found.tensor(name), tensors(name)[name])


def test_renamed_tensors_read_the_same_bytes(folder):
    found = hub_folder.tensors_in(folder).renamed({"x": "c", "y": "a"})
    again = found.renamed({"z": "x"})
    assert sorted(found.specs) == ["x", "y"] and [*again.specs] == ["z"]
    np.testing.assert_array_equal(found.tensor("y"), tensors("a")["a"])
    np.testing.assert_array_equal(again.tensor("z"), tensors("c")["c"])


def test_a_folder_without_index_holds_what_its_files_hold(tmp_path):
    save_file(tensors("a"), tmp_path / "model.safetensors")
    assert [*hub_folder.tensors_in(tmp_path).specs] == ["a"]


@pytest.mark.parametrize(
    "name",
    [
        "../1.safetensors",
        "/tmp/1.safetensors",
        "sub/1.safetensors",
        "..\\1.safetensors",
        "C:1.safetensors",
        "1.bin",
        "",
        7,
        None,
        ["1.safetensors"],
    ],
)
def test_an_index_cannot_name_files_elsewhere(folder, name):
    write_index(folder, {"a": name})
    with pytest.raises(ValueError, match=r"names of \.safetensors files in its"):
        hub_folder.tensors_in(folder)


def test_missing_shards_are_listed(folder):
    (folder / "2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without \['2\.safetensors'\].*the rest"):
        hub_folder.tensors_in(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    save_file(tensors("a", "c"), folder / "2.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors in two files: \['a'\]"):
        hub_folder.tensors_in(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(folder):
    save_file(tensors("c", "d"), folder / "2.safetensors")
    with pytest.raises(ValueError, match=r"its index does not name: \['d'\]"):
        hub_folder.tensors_in(folder)


def test_a_tensor_elsewhere_than_the_index_says_is_refused(folder):
    files = {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    write_index(folder, files)
    with pytest.raises(ValueError, match=r"absent from the file.*\['a'\]"):
        hub_folder.tensors_in(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "{" * 9999])
def test_a_damaged_index_is_one_message(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: got"):
        hub_folder.tensors_in(folder)


def test_two_indices_are_refused(folder):
    write_index(folder, {"a": "1.safetensors"}, name="model.fp16")
    with pytest.raises(ValueError, match="keep one variant"):
        hub_folder.tensors_in(folder)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        hub_folder.tensors_in(tmp_path)


def test_a_digest_follows_the_weights_and_not_the_place(folder, tmp_path_factory):
    (folder / "config.json").write_text("{}")
    copy = tmp_path_factory.mktemp("copy") / "other"
    shutil.copytree(folder, copy)
    before = hub_folder.sampled(folder)
    assert hub_folder.sampled(copy) == before and before.startswith("sampled:")
    save_file({"c": np.zeros(3, np.float32)}, copy / "2.safetensors")
    assert hub_folder.sampled(copy) != before

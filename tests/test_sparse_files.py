"""Stand-ins for published files: of the published size, and without weight on disk."""

import json

import cpu_time
import pytest
import sparse_files
from safetensors import safe_open

INDEX = json.loads((sparse_files.MANIFESTS / "index.json").read_text("utf-8"))


@pytest.mark.parametrize("name", sparse_files.NAMES)
def test_a_file_has_its_full_size_and_costs_only_its_header(name, tmp_path):
    path = tmp_path / "x.safetensors"
    took = cpu_time.best(lambda: sparse_files.write(path, name))
    assert took < 30 * cpu_time.of_json(path)
    stat, facts = path.stat(), INDEX[name]
    assert stat.st_size > facts["data_bytes"] and stat.st_blocks * 512 < 3e6
    with safe_open(path, framework="numpy") as file:
        assert len(file.keys()) == facts["tensors"]


def test_sizes_are_those_that_follow_from_the_published_files(tmp_path):
    predicted = {name: facts.get("predicted") for name, facts in INDEX.items()}
    del predicted["id-lora-19b"]  # Published without metadata: 16 bytes less.
    for name, facts in predicted.items():
        if facts:
            size = sparse_files.write(tmp_path / "x", name).stat().st_size
            assert size == facts["file_bytes"], name


def test_config_and_metadata_can_be_chosen(tmp_path):
    write = lambda *args, **kw: sparse_files.write(tmp_path / "x", *args, **kw)
    name = "ltx-2-19b-distilled-lora-384"
    with safe_open(write(name, "", {"a": "b"}), framework="numpy") as file:
        assert file.metadata() == {"a": "b"}
    some = write("ltx-2-19b-dev", "ltx-2.3-22b", only=lambda k: k.startswith("vae."))
    with safe_open(some, framework="numpy") as file:
        assert all(key.startswith("vae.") for key in file.keys())
        found = json.loads(file.metadata()["config"])
    assert found == sparse_files.config("ltx-2.3-22b")

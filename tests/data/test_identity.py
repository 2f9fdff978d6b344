import os
import shutil

import numpy as np
import pytest

from idlora_jax.data import identity


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.mp4"
    path.write_bytes(np.random.default_rng(0).bytes(5 * identity.SAMPLE))
    return path


def test_a_digest_follows_content_and_not_names_or_times(large):
    digest = identity.of_file(large)
    copy = shutil.copy(large, large.with_name("copy.mp4"))
    os.utime(copy, (1, 1))
    assert identity.of_file(copy) == digest


@pytest.mark.parametrize("at", [0, 2.5, 4.99])
def test_a_change_at_either_end_in_the_middle_or_of_the_size_is_seen(large, at):
    digest, data = identity.of_file(large), bytearray(large.read_bytes())
    data[int(at * identity.SAMPLE)] ^= 1
    large.write_bytes(data)
    changed = identity.of_file(large)
    large.write_bytes(data + b"x")
    assert len({digest, changed, identity.of_file(large)}) == 3


def test_small_and_empty_files_have_digests(tmp_path):
    for name, data in {"a": b"", "b": b"1", "c": b"2"}.items():
        (tmp_path / name).write_bytes(data)
    assert len({identity.of_file(tmp_path / name) for name in "abc"}) == 3


def test_a_folders_digest_follows_its_weights_and_settings_alone(tmp_path):
    (tmp_path / "a" / "sub").mkdir(parents=True)
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "sub" / "x.safetensors").write_bytes(b"1")
    digest = identity.of_folder(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("words")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert identity.of_folder(tmp_path / "b") == digest
    (tmp_path / "b" / "config.json").write_text("[]")
    assert identity.of_folder(tmp_path / "b") != digest
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "other.json")
    assert identity.of_folder(tmp_path / "a") != digest


def test_parts_do_not_run_together():
    assert identity.of("ab", "c") != identity.of("a", "bc")
    assert identity.of(1, None) != identity.of("1", "null")

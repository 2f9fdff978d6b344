"""Compiled programs on disk: found again, and never what stops a run."""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys
from typing import Any

import jax
import pytest

from idlora_jax import compile_cache
from idlora_jax.experiment import TrainConfig
from idlora_jax.sample_config import SampleConfig

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = """
import collections, pathlib, resource, signal, sys
import jax, jax.numpy as jnp
from idlora_jax import compile_cache

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
print(compile_cache.start(pathlib.Path(sys.argv[1]), lambda s: print("said:", s)))
if sys.argv[2:]:  # as a full disk: no file may grow further
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
f = jax.jit(lambda x: jnp.sin(x @ x).sum() + jnp.linalg.norm(jnp.sort(x)))
print(float(f(jnp.ones((64, 64)))))
names = "cache_hits", "cache_misses"
print(*(counts[f"/jax/compilation_cache/{name}"] for name in names))
"""


def run(folder: pathlib.Path, *options: str, **variables: str) -> list[str]:
    """What the script prints; it must end well, and not say more on stderr."""
    command = [sys.executable, "-c", SCRIPT, str(folder), *options]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_PERS")}
    kept |= {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=kept)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*-cache"))


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max(entries(folder), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[pathlib.Path, list[str]]:
    folder = tmp_path_factory.mktemp("programs") / "deeper" / "still"
    return folder, run(folder)


def test_a_second_process_compiles_nothing(first):
    folder, (on, number, counted) = first
    hits, misses = map(int, counted.split())
    assert on == "True" and (hits, misses) == (0, len(entries(folder)))
    assert run(folder) == ["True", number, f"{misses} 0"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "unrecorded"])
def test_a_damaged_entry_is_said_and_compiled_again(first, damage):
    folder, (_, number, counted) = first
    path, misses = largest(folder), int(counted.split()[1])
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        at = random.Random(0).randrange(64, len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    else:
        path.with_name(path.name.removesuffix("-cache") + "-crc32").unlink()
    said, on, again, counted = run(folder)
    assert (on, again, counted) == ("True", number, f"{misses - 1} 1")
    assert said.startswith("said: program cache: 1 damaged or unfinished in")
    assert run(folder) == ["True", number, f"{misses} 0"]


def test_a_full_disk_is_said_once_and_the_run_goes_on(tmp_path):
    on, said, number, counted = run(tmp_path, "100")
    assert on == "True" and int(counted.split()[1]) > 1
    assert said.startswith("said: ") and "going on without it" in said
    # What was begun is not believed afterwards.
    begun = len(entries(tmp_path))
    said, _, again, counted = run(tmp_path)
    assert begun > 0 and f" {begun} damaged" in said
    assert again == number and counted.startswith("0 ")


def test_what_was_not_used_for_longest_is_removed_beyond_the_limit(first, tmp_path):
    size = sum(path.stat().st_size for path in entries(first[0]))
    limit = size - 1
    on, _, counted = run(tmp_path, JAX_COMPILATION_CACHE_MAX_SIZE=str(limit))
    assert on == "True" and counted == first[1][2]
    assert 0 < sum(path.stat().st_size for path in entries(tmp_path)) <= limit


def test_a_folder_that_cannot_be_used_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    before, said = jax.config.jax_compilation_cache_dir, []
    assert not compile_cache.start(tmp_path / "file" / "cache", said.append)
    assert jax.config.jax_compilation_cache_dir == before
    (line,) = said
    assert "cannot use" in line and "\n" not in line and "turns the cache off" in line


def test_left_over_files_are_removed_and_others_kept(tmp_path):
    for name in ("a-atime", "b-crc32", "notes.txt"):
        (tmp_path / name).write_text("")
    assert compile_cache.tidy(tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def configs(**changes: Any) -> list[Any]:
    path = pathlib.Path("x")
    return [
        SampleConfig(base=path, text_encoder=path, **changes),
        TrainConfig(base=path, data=path, output=path, **changes),
    ]


def test_settings_decide_then_our_variable_then_that_of_jax(monkeypatch, tmp_path):
    def folders(**changes: Any) -> set[pathlib.Path | None]:
        found = {compile_cache.folder_of(c) for c in configs(**changes)}
        return {None if path is None else path.parent for path in found}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compile_cache.VARIABLE, "off")
    assert folders() == {None}
    given = tmp_path / "given"
    assert folders(program_cache=given) == {given}
    assert folders(program_cache=given, use_program_cache=False) == {None}
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "said"))
    assert folders() == {tmp_path / "said"}
    monkeypatch.delenv(compile_cache.VARIABLE)
    assert folders() == {tmp_path / "idlora_jax" / "programs"}
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
        assert folders() == {None}
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_nothing_else_sets_up_the_cache():
    found = [
        path.name
        for path in (ROOT / "idlora_jax").rglob("*.py")
        if "jax_compilation_cache" in path.read_text(encoding="utf-8")
    ]
    assert found == ["compile_cache.py"]

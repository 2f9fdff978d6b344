"""Prompts on disk: equal, found again, never in the way."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import new_arrays
import numpy as np
import pytest
import sparse_files

from idlora_jax import adapters, prompt_cache, prompts
from idlora_jax.data import tokenize
from idlora_jax.sample_config import SampleConfig
from idlora_jax.types import AV, Prompt
from idlora_jax.weights import io, networks, tensorfile

TEXTS = ["[VISUAL]: a face [SPEECH]: hello [SOUNDS]: a voice", "worst quality"]
ROOT = Path(__file__).parents[1]
SHAPES = AV((1, 4, 3), (1, 4, 2))


def key(n: int) -> str:
    return f"{n:064x}"


def made(texts: list[str]) -> list[Prompt]:
    """Prompts that differ from text to text."""
    return [
        Prompt(*(jnp.full(s, float(len(t)), jnp.bfloat16) for s in SHAPES))
        for t in texts
    ]


def never(*args, **kwargs):
    raise AssertionError("must not be called")


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Folders, with prompts that cost nothing.


def test_what_is_lacking_is_made_in_one_call_and_kept(tmp_path):
    calls = []

    def make(texts):
        calls.append(texts)
        return made(texts)

    keys = {"a": key(1), "bb": key(2)}
    first = prompt_cache.cached(tmp_path / "new", keys, make, shapes=SHAPES)
    keys |= {"ccc": key(3)}
    again = prompt_cache.cached(tmp_path / "new", keys, make, shapes=SHAPES)
    assert calls == [["a", "bb"], ["ccc"]]
    assert [*again] == ["a", "bb", "ccc"]
    chex.assert_trees_all_equal(first, {t: again[t] for t in first})
    assert again["bb"].video.dtype == jnp.bfloat16
    assert again["bb"].mask is None


def test_texts_of_one_key_are_made_once(tmp_path):
    keys = {"a": key(1), "a ": key(1)}
    found = prompt_cache.cached(
        tmp_path, keys, lambda t: made(t[:1]), shapes=SHAPES, note=never
    )
    assert found["a"] is found["a "]
    assert len(files_in(tmp_path)) == 1


def test_without_a_folder_all_is_made_and_nothing_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        found = prompt_cache.cached(None, {"a": key(1)}, made, shapes=SHAPES)
        assert found["a"].audio.shape == SHAPES.audio
    assert files_in(tmp_path) == []


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


def exchanged(path: Path) -> None:
    prompt_cache.cached(path.parent, {"bb": key(2)}, made, shapes=SHAPES)
    os.replace(path.parent / f"{key(2)}.safetensors", path)


def reshaped(path: Path) -> None:
    arrays = {"video": np.zeros((1, 5, 3)), "audio": np.zeros((1, 5, 2))}
    entries = [tensorfile.entry(*item) for item in arrays.items()]
    tensorfile.write(path, entries, {"key": key(1)})


def foreign(path: Path) -> None:
    path.write_bytes(b"<html>" * 99)


@pytest.mark.parametrize(
    "damage", [truncated, emptied, flipped, exchanged, reshaped, foreign]
)
def test_a_damaged_file_is_made_again_with_one_note(tmp_path, damage):
    keys, path, notes = {"a": key(1)}, tmp_path / f"{key(1)}.safetensors", []
    want = prompt_cache.cached(tmp_path, keys, made, shapes=SHAPES)
    whole = path.read_bytes()
    damage(path)
    got = prompt_cache.cached(tmp_path, keys, made, shapes=SHAPES, note=notes.append)
    chex.assert_trees_all_equal(got, want)
    (line,) = notes
    assert "damaged" in line and key(1) in line
    assert path.read_bytes() == whole
    prompt_cache.cached(tmp_path, keys, never, shapes=SHAPES, note=never)


def test_a_folder_that_cannot_be_written_to_costs_one_note(tmp_path):
    (tmp_path / "file").touch()
    keys, notes = {"a": key(1), "bb": key(2)}, []
    folder = tmp_path / "file" / "cache"
    got = prompt_cache.cached(folder, keys, made, shapes=SHAPES, note=notes.append)
    assert [*got] == ["a", "bb"]
    (line,) = notes
    assert str(folder) in line and "not kept" in line


def test_a_full_disk_costs_one_note_and_leaves_nothing(tmp_path, monkeypatch):
    def full(array):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensorfile, "_data", full)
    keys, notes = {"a": key(1), "bb": key(2)}, []
    got = prompt_cache.cached(tmp_path, keys, made, shapes=SHAPES, note=notes.append)
    assert [*got] == ["a", "bb"] and files_in(tmp_path) == []
    assert len(notes) == 1 and "No space left" in notes[0]


def test_what_was_not_used_for_longest_goes_and_other_files_stay(tmp_path):
    def age(number: int, seconds: float) -> None:
        os.utime(tmp_path / f"{key(number)}.safetensors", (seconds, seconds))

    keys = {"a" * n: key(n) for n in (1, 2, 3)}
    prompt_cache.cached(tmp_path, keys, made, shapes=SHAPES)
    for number in (1, 2, 3):
        age(number, 100.0 * number)
    size = (tmp_path / f"{key(1)}.safetensors").stat().st_size
    for name in ("gemma.safetensors", f"{key(1)}.txt"):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (1, 1))
    left = tmp_path / f".{key(4)}.77.tmp.safetensors"
    left.write_bytes(b"x")
    os.utime(left, (2, 2))
    used = {"a": key(1)}
    prompt_cache.cached(tmp_path, used, never, shapes=SHAPES)
    new = {"aaaaa": key(5)}
    prompt_cache.cached(tmp_path, new, made, shapes=SHAPES, limit=int(2.5 * size))
    ours = {f"{key(n)}.safetensors" for n in (1, 5)}
    assert {*files_in(tmp_path)} == {*ours, "gemma.safetensors", f"{key(1)}.txt"}


WRITER = """
import sys
import numpy as np
from idlora_jax import prompt_cache
from idlora_jax.types import AV, Prompt
folder, key = sys.argv[1:]
shapes = AV((1, 64, 32), (1, 64, 16))
make = lambda texts: [Prompt(*(np.ones(s, np.float32) for s in shapes))]
for n in range(60):
    # A new file in every round, which the other process may be reading.
    prompt_cache._store(prompt_cache.Path(folder, key + ".safetensors"), key, "a",
                        make([])[0], prompt_cache.LIMIT)
    prompt_cache.cached(folder, {"a": key}, make, shapes=shapes, note=sys.exit)
"""


def test_two_processes_leave_a_good_file_and_never_read_a_bad_one(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path), key(1)]
    running = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert files_in(tmp_path) == [f"{key(1)}.safetensors"]
    shapes = AV((1, 64, 32), (1, 64, 16))
    found = prompt_cache.cached(tmp_path, {"a": key(1)}, never, shapes=shapes)
    assert found["a"].video.min() == 1


def test_prompts_lie_in_the_users_cache_folder_unless_told_otherwise(monkeypatch):
    config = SampleConfig(base=Path("b"), text_encoder=Path("t"))
    inside = Path("idlora_jax/prompts")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert prompt_cache.folder_of(config) == Path("/there") / inside
    monkeypatch.setenv("HOME", "/home/me")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert prompt_cache.folder_of(config) == Path("/home/me/.cache") / inside
    own = dataclasses.replace(config, text_cache=Path("x"))
    assert prompt_cache.folder_of(own) == Path("x")
    off = dataclasses.replace(own, use_text_cache=False)
    assert prompt_cache.folder_of(off) is None


# The tiny model's real files.


@pytest.fixture(scope="module")
def nets(tiny_model):
    base, text_encoder = tiny_model
    return networks.load(base, (), text_encoder_path=text_encoder)[0]


@pytest.fixture
def config(tiny_model, tmp_path):
    base, text_encoder = tiny_model
    return SampleConfig(
        base=base, text_encoder=text_encoder, text_cache=tmp_path, dtype="float32"
    )


@pytest.fixture(scope="module")
def change(tiny_model):
    """What an adapter changes in the text connector."""
    shapes = io.shapes(io.open_base(tiny_model[0]), "text_connector")
    target = ("video/blocks/attn/q",)
    lora = adapters.init(jax.random.key(0), shapes, 2, target)
    return jax.tree.map(lambda x: jnp.full(x.shape, 0.05), lora)


def test_prompts_are_equal_bit_by_bit_made_kept_and_read(
    config, nets, change, monkeypatch
):
    base, text_encoder = config.base, config.text_encoder
    left = new_arrays.since_now()
    first = prompt_cache.encoded(config, nets, [*TEXTS, TEXTS[0]], note=never)
    # Results are in host memory, so that nothing at all is left.
    assert not left()
    merged = prompt_cache.encoded(config, nets, TEXTS[:1], [change], note=never)
    assert len(files_in(config.text_cache)) == 3
    _, params = networks.load(
        base, prompt_cache.TEXT_SIDE, text_encoder_path=text_encoder
    )
    both = prompts.encode(nets, params, tokenize.load(text_encoder), TEXTS)
    for row, text in enumerate(TEXTS):
        want = jax.tree.map(lambda x, row=row: x[row : row + 1], both)
        chex.assert_trees_all_equal(first[text], want)
    changed = adapters.merge(params["text_connector"], change)
    params = {**params, "text_connector": changed}
    want = prompts.encode(nets, params, tokenize.load(text_encoder), TEXTS[:1])
    chex.assert_trees_all_equal(merged[TEXTS[0]], want)
    assert np.any(merged[TEXTS[0]].video != first[TEXTS[0]].video)

    monkeypatch.setattr(io, "read_all", never)
    monkeypatch.setattr(networks, "load", never)
    again = prompt_cache.encoded(config, nets, TEXTS, note=never)
    chex.assert_trees_all_equal(again, first)
    again = prompt_cache.encoded(config, nets, TEXTS[:1], [change], note=never)
    chex.assert_trees_all_equal(again, merged)
    off = dataclasses.replace(config, use_text_cache=False)
    with pytest.raises(AssertionError, match="must not be called"):
        prompt_cache.encoded(off, nets, TEXTS)


def test_bfloat16_prompts_lose_nothing_on_disk(config, nets, monkeypatch):
    config = dataclasses.replace(config, dtype="bfloat16", numerics="reference")
    off = dataclasses.replace(config, use_text_cache=False)
    fresh = prompt_cache.encoded(off, nets, TEXTS[:1])
    assert files_in(config.text_cache) == []
    prompt_cache.encoded(config, nets, TEXTS[:1])
    monkeypatch.setattr(networks, "load", never)
    again = prompt_cache.encoded(config, nets, TEXTS[:1], note=never)
    chex.assert_trees_all_equal(again, fresh)
    assert again[TEXTS[0]].video.dtype == fresh[TEXTS[0]].video.dtype


def altered(folder: Path, name: str, tmp_path: Path) -> Path:
    """A copy of a safetensors file's folder with other values in one tensor."""
    made = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = made / "model.safetensors"
    head = tensorfile.header(path)
    with open(path, "r+b") as file:
        file.seek(head.starts[name])
        file.write(np.ones(head.tensors[name].nbytes // 2, np.float16).tobytes())
    return made


def test_whatever_changes_the_numbers_has_another_key(config, nets, change, tmp_path):
    base, folder = config.base, config.text_encoder
    plain = {"numerics": "exact", "dtype": "float32"}
    tokenizer = tokenize.load(folder)

    def of(folder=folder, changes=(), nets=nets, tokenizer=tokenizer, **other) -> str:
        origin = prompt_cache.origin(base, folder, nets, changes, **(plain | other))
        return prompt_cache.keys_of(tokenizer, ["a face"], origin)["a face"]

    names = sorted(tensorfile.header(folder / "model.safetensors").tensors)
    norm = next(name for name in names if name.endswith("input_layernorm.weight"))
    other = altered(folder, norm, tmp_path)
    wide = dataclasses.replace(nets.text_connector, max_pos=77.0)
    twice = adapters.scale(change, 2.0)
    found = [
        of(),
        of(numerics="reference"),
        of(dtype="bfloat16"),
        of(mesh="data=2"),
        of(changes=[change]),
        of(changes=[twice]),
        of(changes=[change, twice]),
        of(folder=other),
        of(nets=dataclasses.replace(nets, text_connector=wide)),
        of(tokenizer=dataclasses.replace(tokenizer, length=256)),
        of(tokenizer=dataclasses.replace(tokenizer, pad=5)),
    ]
    assert len({*found}) == len(found)
    with jax.default_matmul_precision("highest"):
        assert of() != found[0]


def test_another_connector_has_another_key(config, nets, tmp_path):
    base = tmp_path / config.base.name
    shutil.copy(config.base, base)
    options = {"numerics": "exact", "dtype": "float32"}

    def origin(path) -> str:
        return prompt_cache.origin(path, config.text_encoder, nets, **options)

    want = origin(config.base)
    assert origin(base) == want
    head = tensorfile.header(base)
    name = next(n for n in sorted(head.tensors) if io.owner(n) == "text_connector")
    with open(base, "r+b") as file:
        file.seek(head.starts[name])
        file.write(b"\1" * 2)
    assert origin(base) != want


def test_a_copy_of_the_text_encoder_has_the_same_key(config, nets, tmp_path):
    made = Path(shutil.copytree(config.text_encoder, tmp_path / "copy"))
    os.utime(made / "model.safetensors", (1, 1))
    found = [
        prompt_cache.origin(config.base, path, nets, numerics="exact", dtype="float32")
        for path in (config.text_encoder, made)
    ]
    assert found[0] == found[1]


def test_networks_of_full_size_are_told_apart_by_little_of_them(tmp_path, monkeypatch):
    folder, read, preadv = tmp_path / "gemma", [], os.preadv
    folder.mkdir()
    base = sparse_files.write(tmp_path / "base.safetensors", "ltx-2-19b-dev")
    sparse_files.write(folder / "model.safetensors", "gemma-3-12b-it")
    found = sparse_files.config("gemma-3-12b-it")
    (folder / "config.json").write_text(json.dumps(found))
    nets, _ = networks.load(base, (), text_encoder_path=folder)

    def counted(*args):
        read.append(preadv(*args))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    prompt_cache.origin(base, folder, nets, numerics="exact", dtype="bfloat16")
    assert 20e6 < sum(read) < 30e6


def test_texts_of_the_same_tokens_have_the_same_key(config):
    tokenizer = tokenize.load(config.text_encoder)
    keys = prompt_cache.keys_of(tokenizer, ["a face", " a face\n", "a voice"], "")
    assert keys["a face"] == keys[" a face\n"] != keys["a voice"]
    # Padding is told from tokens by the mask alone, if it has a token's number.
    odd = dataclasses.replace(tokenizer, pad=tokenizer.tokenizer.token_to_id("<bos>"))
    ids, masks = tokenize.encode(odd, ["face", "<bos>face"])
    assert (ids[0] == ids[1]).all() and (masks[0] != masks[1]).any()
    assert len({*prompt_cache.keys_of(odd, ["face", "<bos>face"], "").values()}) == 2

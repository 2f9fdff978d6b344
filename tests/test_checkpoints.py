"""Adapter files: exact round trips, recorded facts, and refusals that name the file."""

import jax
import numpy as np
import pytest
import small_transformer as small
from safetensors.numpy import load_file, save_file

from idlora_jax import adapters, checkpoints
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.weights import tensorfile


@pytest.fixture(scope="module")
def base():
    return small.base("2.0")


@pytest.fixture
def adapter(base):
    shapes = jax.eval_shape(lambda k: adapters.init(k, base, 3), jax.random.key(0))
    return small.random_like(shapes, 1)


def test_a_saved_adapter_comes_back_with_what_was_recorded(tmp_path, base, adapter):
    meta = AdapterMeta(
        generation="2.0", base_hash="ab", rank=3, alpha=6.0, targets=("x",), step=7
    )
    saved = checkpoints.save_adapter(tmp_path / "a.safetensors", adapter, meta)
    loaded, about = checkpoints.load_adapter(tmp_path / "a.safetensors", base)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert about == saved
    assert (about.step, about.targets, len(about.content_hash)) == (7, ("x",), 64)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_the_hash_is_that_of_the_tensors_alone(tmp_path, adapter):
    first, second = (
        checkpoints.save_adapter(tmp_path / f"{n}.safetensors", adapter, AdapterMeta(n))
        for n in ("2.0", "2.3")
    )
    assert first.content_hash == second.content_hash
    changed = adapters.scale(adapter, 2.0)
    third = checkpoints.save_adapter(tmp_path / "c", changed, AdapterMeta())
    assert third.content_hash != first.content_hash


def test_the_keys_are_those_other_tools_read(tmp_path, adapter):
    checkpoints.save_adapter(tmp_path / "a.safetensors", adapter, AdapterMeta())
    keys = load_file(tmp_path / "a.safetensors").keys()
    assert "diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_A.weight" in keys
    assert "diffusion_model.transformer_blocks.1.audio_ff.net.2.lora_B.weight" in keys
    assert len(keys) == 18 * 2 * small.LAYERS


@pytest.mark.parametrize("recorded", ["not json", "[1, 2]", '{"unknown": 1}', None])
def test_files_of_others_and_odd_metadata_are_read(tmp_path, base, adapter, recorded):
    path = tmp_path / "a.safetensors"
    checkpoints.save_adapter(path, adapter, AdapterMeta())
    meta = None if recorded is None else {"idlora": recorded}
    save_file(load_file(path), path, metadata=meta)
    _, about = checkpoints.load_adapter(path, base)
    assert (about.rank, about.generation) == (3, "")
    assert about.content_hash == checkpoints.file_hash(path)


@pytest.mark.parametrize("format", ["comfyui", "diffusers", "peft", "kohya"])
def test_every_format_comes_back_with_what_was_recorded(
    format, tmp_path, adapter, base
):
    meta = AdapterMeta("2.0", "some-base", rank=3, reference_s=4.84)
    path = tmp_path / "a"
    saved = checkpoints.save_adapter(path, adapter, meta, format=format)
    loaded, about = checkpoints.load_adapter(path, base)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    assert about == saved and about.base_name == "some-base"


@pytest.mark.parametrize("format", ["comfyui", "peft"])
def test_a_changed_byte_is_found_when_asked_for(format, tmp_path, adapter, base):
    checkpoints.save_adapter(tmp_path / "a", adapter, AdapterMeta(), format=format)
    bases = {"transformer": base}
    checkpoints.load_adapters(tmp_path / "a", bases, verify=True)
    (path,) = [*tmp_path.rglob("*.safetensors")] or [tmp_path / "a"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="got other bytes"):
        checkpoints.load_adapters(tmp_path / "a", bases, verify=True)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="without a recorded hash"):
        checkpoints.load_adapters(tmp_path / "a", bases, verify=True)


def test_recorded_facts_of_another_kind_are_not_believed():
    odd = {"rank": "4", "fps": 24, "targets": "x", "extra": [1], "alpha": None}
    about = checkpoints.meta_of(odd | {"step": 3, "video_sees_ref": False})
    known = AdapterMeta(fps=24.0, step=3, video_sees_ref=False)
    assert about == known and isinstance(about.fps, float)


def test_of_recorded_lists_only_the_strings_are_believed():
    odd = {"targets": ["q", 1, None], "extra": {"a": 4.0e16, "b": "c"}}
    odd |= {"alpha": float("nan"), "fps": 10**400, "rank": True}
    known = AdapterMeta(targets=("q",), extra={"b": "c"})
    assert checkpoints.meta_of(odd) == known


def test_an_adapter_that_changes_nothing_is_told(tmp_path, base, adapter):
    path = tmp_path / "a.safetensors"
    nothing = adapters.scale(adapter, 0.0)
    checkpoints.save_adapter(path, nothing, AdapterMeta())
    with pytest.warns(UserWarning, match=r"a\.safetensors: .*it changes nothing"):
        checkpoints.load_adapter(path, base)


def test_a_truncated_absent_or_unfitting_file_is_named(tmp_path, base, adapter):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match=r"a\.safetensors: got no such file"):
        checkpoints.load_adapter(path, base)
    checkpoints.save_adapter(path, adapter, AdapterMeta())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.safetensors: got .* bytes"):
        checkpoints.load_adapter(path, base)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a\.safetensors: .*does not fit"):
        checkpoints.load_adapter(path, {**base, **_one()})
    tensors = load_file(path)
    save_file({**tensors, "diffusion_model.nose.lora_A.weight": np.ones(2)}, path)
    with pytest.raises(ValueError, match=r"diffusion_model\.nose\.lora_A\.weight"):
        checkpoints.load_adapter(path, base)


def _one():
    return {"blocks": {"audio": {"ff": {"up": {"kernel": np.ones((2, 16, 64))}}}}}


def test_a_full_disk_leaves_nothing_behind(tmp_path, adapter, monkeypatch):
    def full(entry):
        yield b"half"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile, "_data", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_adapter(tmp_path / "a.safetensors", adapter, AdapterMeta())
    assert not list(tmp_path.iterdir())

"""Clips of several sizes, in folders of sizes or in one folder."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import latent_folder
import numpy as np
import pytest

from idlora_jax.data import collection, latents, sources, tfds_writer
from idlora_jax.data.tfds_plan import Options
from idlora_jax.types import AV, Prompt

SIZES = {"64x64x17": (3, 2, 2), "64x32x17": (3, 2, 1)}


def connect(features: AV, mask: Any) -> Prompt:
    return Prompt(*(jnp.asarray(f, jnp.float32) for f in features))


def folders(root: pathlib.Path, count: int = 4, **options: Any) -> pathlib.Path:
    for name, size in SIZES.items():
        latent_folder.write(root / name, count, size=size, **options)
    return root


def mixed(root: pathlib.Path, **others: Any) -> pathlib.Path:
    """Four clips, and one of another kind."""
    latent_folder.write(root)
    latent_folder.write_clip(root, "odd", latent_folder.tensors(9, **others))
    return root


def test_folders_of_sizes_become_buckets_of_clips_named_after_them(tmp_path):
    found = collection.index(folders(tmp_path))
    assert [b.clips[0].video for b in found.buckets] == [(3, 2, 1), (3, 2, 2)]
    assert found.counts == (4, 4)
    assert found.clips[0].name == "64x32x17/speaker0/clip0"
    batch = latents.whole(found.buckets[1], connect)
    alone = latents.whole(latents.index(tmp_path / "64x64x17"), connect)
    jax.tree.map(np.testing.assert_array_equal, batch, alone)


def test_a_folder_of_one_size_is_one_bucket_with_its_names(tmp_path):
    found = collection.index(latent_folder.write(tmp_path))
    (bucket,) = found.buckets
    assert bucket.clips == found.clips == latents.index(tmp_path).clips
    assert (found.fps, found.reference) == (25.0, 5)


def test_data_sets_of_several_sizes_are_read_from_folders_of_sizes(tmp_path):
    source = folders(tmp_path / "in")
    for name in SIZES:
        opened = sources.open_source(source / name)
        tfds_writer.convert(opened, Options(tmp_path / "tfds" / name))
    found, want = collection.index(tmp_path / "tfds"), collection.index(source)
    assert found.clips == want.clips
    pairs = zip(found.buckets, want.buckets, strict=True)
    for got, bucket in pairs:
        both = latents.whole(got, connect), latents.whole(bucket, connect)
        jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.parametrize("others", [{"size": (3, 2, 4)}, {"fps": 24.0}])
def test_clips_of_another_size_or_rate_are_a_bucket_of_their_own(tmp_path, others):
    found = collection.index(mixed(tmp_path, **others))
    assert sorted(found.counts) == [1, 4]
    rates = [latents.whole(b, connect).rate for b in found.buckets]
    assert {rate.fps for rate in rates if rate} == {25.0, others.get("fps", 25.0)}
    assert found.fps == 25.0


def test_video_references_of_another_size_are_a_bucket_of_their_own(tmp_path):
    for name, seen in {"a": (2, 1, 1), "b": (2, 1, 1), "c": (2, 2, 2)}.items():
        clip = latent_folder.tensors(0, seen=seen)
        latent_folder.write_clip(tmp_path, name, clip)
    found = collection.index(tmp_path, (*latents.FOLDERS, latents.VIDEO_REFERENCE))
    assert [[c.name for c in b.clips] for b in found.buckets] == [["a", "b"], ["c"]]


def test_sounds_are_padded_to_the_longest_of_their_bucket(tmp_path):
    latent_folder.write(tmp_path / "64x64x17", 2, audio=17)
    clip = latent_folder.tensors(5, audio=16)
    latent_folder.write_clip(tmp_path / "64x64x17", "short", clip)
    latent_folder.write(tmp_path / "64x32x17", 2, audio=9, size=(3, 2, 1))
    even, ragged = collection.index(tmp_path).buckets
    assert (even.audio, even.ragged) == (9, (False, False))
    assert (ragged.audio, ragged.ragged) == (17, (True, False))
    assert latents.whole(even, connect).audio_length is None
    batch = latents.whole(ragged, connect)
    assert sorted(np.asarray(batch.audio_length).tolist()) == [16, 17, 17]


def test_latents_beside_folders_of_sizes_are_refused(tmp_path):
    latent_folder.write(folders(tmp_path))
    with pytest.raises(ValueError, match=r"latents/ and folders of sizes \(64x32x17, "):
        collection.index(tmp_path)


def test_missing_and_empty_folders_say_what_belongs_there(tmp_path):
    with pytest.raises(ValueError, match=r"no such folder.*audio_latents"):
        collection.index(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no \.pt or \.safetensors files in"):
        collection.index(tmp_path)
    (folders(tmp_path) / "32x32x9").mkdir()
    with pytest.raises(ValueError, match=r"files in .*32x32x9/latents"):
        collection.index(tmp_path)


def test_a_clip_that_a_size_lacks_a_file_of_names_folder_and_clip(tmp_path):
    folders(tmp_path)
    gone = tmp_path / "64x64x17" / latents.AUDIO / "speaker0/clip2.safetensors"
    gone.unlink()
    with pytest.raises(ValueError, match=r"1 of 4 clips in .*64x64x17 ") as caught:
        collection.index(tmp_path)
    assert "speaker0/clip2: missing in audio_latents" in str(caught.value)


def test_held_out_clips_are_spread_and_leave_training(tmp_path):
    found = collection.index(latent_folder.write(tmp_path, 8))
    clips, held = collection.split(found, 2)
    names = [c.name for c in found.clips]
    assert [c.name for c in held.clips] == [names[2], names[6]]
    assert len(clips.clips) == 6
    assert not set(clips.clips) & set(held.clips)
    nothing = collection.split(found, 0)
    assert nothing[0] == found and nothing[1].buckets == ()
    with pytest.raises(ValueError, match="at least one to train on"):
        collection.split(found, 8)


def test_held_out_clips_are_spread_over_sizes_too(tmp_path):
    found = collection.index(folders(tmp_path, 6))
    clips, held = collection.split(found, 4)
    assert (clips.counts, held.counts) == ((4, 4), (2, 2))
    # Padded as all clips of their size are, so that shapes stay.
    assert [b.audio for b in held.buckets] == [b.audio for b in found.buckets]
    _, one = collection.split(found, 1)
    assert one.counts == (1,)


def test_a_size_may_not_lose_its_last_clip_to_the_held_out_ones(tmp_path):
    found = collection.index(mixed(tmp_path, size=(3, 2, 4)))
    assert collection.split(found, 1)[1].clips[0].name != "odd"
    with pytest.raises(ValueError, match=r"all 1 clips of latents \(3, 2, 4\) at 25"):
        collection.split(found, 3)


def test_sizes_with_fewer_clips_than_a_batch_are_listed(tmp_path):
    found = collection.index(mixed(tmp_path, size=(3, 2, 4)))
    collection.require_batches(found, 1)
    with pytest.raises(ValueError, match="1 of 2 sizes have fewer") as caught:
        collection.require_batches(found, 2)
    assert "\n  latents (3, 2, 4) at 25 fps: 1\n" in str(caught.value)
    assert "lower batch_size" in str(caught.value)

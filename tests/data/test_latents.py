"""Reading preprocessed clips."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import latent_folder
import numpy as np
import pytest

from idlora_jax.data import latents
from idlora_jax.types import AV, Prompt


def connect(features: AV, mask: Any) -> Prompt:
    """Features as they are: a stand-in for the connectors."""
    return Prompt(*(jnp.asarray(f, jnp.float32) for f in features))


def one(folder: pathlib.Path, name: str = "clip", **options: Any) -> None:
    latent_folder.write_clip(folder, name, latent_folder.tensors(0, **options))


def test_an_index_lists_names_sizes_and_rate_from_headers(tmp_path: pathlib.Path):
    index = latents.index(latent_folder.write(tmp_path))
    assert [c.name for c in index.clips] == [
        "speaker0/clip0", "speaker0/clip2", "speaker1/clip1", "speaker1/clip3",
    ]  # fmt: skip
    assert index.clips[0] == latents.Clip("speaker0/clip0", (3, 2, 2), 25.0, 9, 5)
    assert (index.fps, index.audio, index.reference) == (25.0, 9, 5)
    assert index.ragged == (False, False)


def test_a_precomputed_folder_inside_is_entered(tmp_path: pathlib.Path):
    latent_folder.write(tmp_path / ".precomputed")
    assert len(latents.index(tmp_path).clips) == 4


def test_clips_that_are_not_in_every_folder_are_listed(tmp_path: pathlib.Path):
    latent_folder.write(tmp_path)
    (tmp_path / latents.AUDIO / "speaker0/clip2.safetensors").unlink()
    one(tmp_path / "other")
    (tmp_path / "other" / latents.VIDEO / "clip.safetensors").rename(
        tmp_path / latents.VIDEO / "stray.safetensors"
    )
    with pytest.raises(ValueError, match="2 of 5 clips") as caught:
        latents.index(tmp_path)
    message = str(caught.value)
    assert "speaker0/clip2: missing in audio_latents" in message
    gone = "conditions, audio_latents, reference_audio_latents"
    assert f"stray: missing in {gone}" in message


def test_a_mode_without_reference_ignores_its_folder(tmp_path: pathlib.Path):
    latent_folder.write(tmp_path)
    (tmp_path / latents.REFERENCE / "speaker0/clip2.safetensors").unlink()
    folders = (latents.VIDEO, latents.TEXT, latents.AUDIO)
    index = latents.index(tmp_path, folders)
    assert index.reference == 0
    assert latents.whole(index, connect).reference is None


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"size": (3, 2, 4)}, r"odd: latents \(3, 2, 4\) at 25 fps"),
        ({"fps": 24.0}, r"odd: latents \(3, 2, 2\) at 24 fps"),
    ],
)
def test_clips_of_another_size_or_rate_are_listed(
    tmp_path: pathlib.Path, other: Any, shown: str
):
    latent_folder.write(tmp_path)
    one(tmp_path, "odd", **other)
    with pytest.raises(ValueError, match=shown):
        latents.index(tmp_path)


def test_missing_and_empty_folders_say_what_belongs_there(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"no such folder.*audio_latents"):
        latents.index(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no \.pt or \.safetensors files in"):
        latents.index(tmp_path)


def test_tensors_are_read_channel_last(tmp_path: pathlib.Path):
    files = latent_folder.tensors(0)
    latent_folder.write_clip(tmp_path, "clip", files)
    index = latents.index(tmp_path)
    sample = latents.read(index, index.clips[0], connect)
    stored = files[latents.VIDEO]["latents"]
    np.testing.assert_array_equal(sample.video, np.moveaxis(stored, 0, -1))
    stored = files[latents.REFERENCE]["latents"]
    np.testing.assert_array_equal(sample.reference, np.moveaxis(stored, 0, -1))
    assert sample.prompt.video.shape == (4, 20)


def test_the_older_token_form_of_video_latents_is_understood(tmp_path: pathlib.Path):
    files = latent_folder.tensors(0)
    new = files[latents.VIDEO]["latents"]
    tokens = np.ascontiguousarray(new.reshape(128, -1).T)
    files[latents.VIDEO]["latents"] = tokens
    latent_folder.write_clip(tmp_path, "clip", files)
    index = latents.index(tmp_path)
    assert index.clips[0].video == (3, 2, 2)
    sample = latents.read(index, index.clips[0], connect)
    np.testing.assert_array_equal(sample.video, np.moveaxis(new, 0, -1))


@pytest.mark.parametrize("shared", [True, False])
def test_features_of_both_generations_reach_the_connectors(
    tmp_path: pathlib.Path, shared: bool
):
    one(tmp_path, shared=shared)
    seen: list[Any] = []

    def listening(features: AV, mask: Any) -> Prompt:
        seen.append((features, mask))
        return connect(features, mask)

    index = latents.index(tmp_path)
    latents.read(index, index.clips[0], listening)
    ((features, mask),) = seen
    assert features.video.shape == features.audio.shape == (1, 4, 20)
    assert np.array_equal(features.video, features.audio) == shared
    np.testing.assert_array_equal(mask, [[False, True, True, True]])


def test_every_epoch_is_a_permutation_of_its_own():
    rows = np.concatenate([latents.chosen(7, 2, step, seed=0) for step in range(7)])
    epochs = rows.reshape(2, 7)
    np.testing.assert_array_equal(np.sort(epochs, 1), [range(7)] * 2)
    assert not np.array_equal(*epochs)


def test_a_steps_clips_depend_on_seed_and_step_alone():
    for step in (0, 3, 50):
        first = latents.chosen(7, 2, step, seed=0)
        np.testing.assert_array_equal(first, latents.chosen(7, 2, step, seed=0))
    orders = [
        np.concatenate([latents.chosen(7, 2, s, seed) for s in range(7)])
        for seed in (0, 1)
    ]
    assert not np.array_equal(*orders)


def test_a_batch_may_be_larger_than_the_folder(tmp_path: pathlib.Path):
    index = latents.index(latent_folder.write(tmp_path, 2))
    batch = latents.batches(index, connect, 5)(0)
    assert batch.video.shape == (5, 3, 2, 2, 128)
    assert batch.audio.shape == (5, 9, 16, 8)
    assert batch.prompt.video.shape == (5, 4, 20)
    assert batch.audio_length is None
    assert batch.reference_length is None


def test_connectors_run_once_per_clip(tmp_path: pathlib.Path):
    calls: list[int] = []

    def counting(features: AV, mask: Any) -> Prompt:
        calls.append(1)
        return connect(features, mask)

    index = latents.index(latent_folder.write(tmp_path))
    batches = latents.batches(index, counting, 2)
    first = [batches(step) for step in range(4)]
    again = [batches(step) for step in range(4)]
    assert len(calls) == 4
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_references_of_different_lengths_are_padded_to_the_longest_of_all(
    tmp_path: pathlib.Path,
):
    latent_folder.write(tmp_path, 2)
    one(tmp_path, "long", reference=8)
    index = latents.index(tmp_path)
    assert index.reference == 8
    assert index.ragged == (False, True)
    batch = latents.whole(index, connect)
    np.testing.assert_array_equal(batch.reference_length, [8, 5, 5])
    assert batch.audio_length is None
    assert batch.reference.shape == (3, 8, 16, 8)
    assert (batch.reference[1:, 5:] == 0).all()
    # One shape and one structure for every batch, so that the step compiles once.
    short = latents.batches(index, connect, 1)
    shapes = {str(jax.tree.map(jnp.shape, short(step))) for step in range(3)}
    assert len(shapes) == 1


def test_sounds_of_different_lengths_carry_their_lengths(tmp_path: pathlib.Path):
    latent_folder.write(tmp_path, 1)
    one(tmp_path, "short", audio=7)
    batch = latents.whole(latents.index(tmp_path), connect)
    np.testing.assert_array_equal(batch.audio_length, [7, 9])
    assert batch.audio.shape[1] == 9


def test_collating_videos_of_two_sizes_is_refused(tmp_path: pathlib.Path):
    latent_folder.write(tmp_path / "a", 1)
    one(tmp_path / "b", size=(2, 2, 2))
    indices = [latents.index(tmp_path / name) for name in "ab"]
    samples = [latents.read(i, i.clips[0], connect) for i in indices]
    with pytest.raises(ValueError, match="videos of one size, got latents"):
        latents.collate(samples, indices[0])


def test_held_out_clips_are_spread_and_leave_training(tmp_path: pathlib.Path):
    index = latents.index(latent_folder.write(tmp_path, 8))
    clips, held = latents.split(index, 2)
    names = [c.name for c in index.clips]
    assert [c.name for c in held.clips] == [names[2], names[6]]
    assert len(clips.clips) == 6
    assert not set(clips.clips) & set(held.clips)
    assert latents.split(index, 0) == (index, latents.split(index, 0)[1])
    with pytest.raises(ValueError, match="at least one to train on"):
        latents.split(index, 8)


def test_values_that_are_not_finite_name_their_file(tmp_path: pathlib.Path):
    files = latent_folder.tensors(0)
    files[latents.AUDIO]["latents"][0, 0, 0] = np.nan
    latent_folder.write_clip(tmp_path, "clip", files)
    index = latents.index(tmp_path)
    with pytest.raises(ValueError, match=r"audio_latents/clip.*not finite"):
        latents.read(index, index.clips[0], connect)


def test_damaged_and_incomplete_files_name_themselves(tmp_path: pathlib.Path):
    one(tmp_path)
    path = tmp_path / latents.VIDEO / "clip.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"latents/clip\.safetensors is damaged"):
        latents.index(tmp_path)
    files = latent_folder.tensors(0)
    del files[latents.VIDEO]["fps"]
    latent_folder.write_clip(tmp_path, "clip", files)
    with pytest.raises(ValueError, match=r"latents/clip.*got fps None"):
        latents.index(tmp_path)
    files = latent_folder.tensors(0)
    del files[latents.TEXT]["prompt_attention_mask"]
    latent_folder.write_clip(tmp_path, "clip", files)
    index = latents.index(tmp_path)
    with pytest.raises(ValueError, match="expected prompt_embeds"):
        latents.read(index, index.clips[0], connect)


EVERY = (*latents.FOLDERS, latents.VIDEO_REFERENCE)


def test_video_references_are_read_where_they_are_asked_for(tmp_path: pathlib.Path):
    latent_folder.write(tmp_path, 2, seen=(2, 1, 1))
    index = latents.index(tmp_path, EVERY)
    assert index.video_reference == index.clips[0].video_reference == (2, 1, 1)
    batch = latents.whole(index, connect)
    assert batch.video_reference is not None
    assert batch.video_reference.shape == (2, 2, 1, 1, 128)
    stored = index.load(index.clips[1]).video_reference
    np.testing.assert_array_equal(batch.video_reference[1], stored)
    plain = latents.index(tmp_path)
    assert plain.video_reference == ()
    assert latents.whole(plain, connect).video_reference is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seen": (2, 2, 1)}, r"clip\.safetensors: video reference: its sides are 2 x"),
        ({"seen": None}, "reference_latents"),
    ],
)
def test_video_references_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, tmp_path: pathlib.Path
):
    one(tmp_path, **change)
    with pytest.raises(ValueError, match=message):
        latents.index(tmp_path, EVERY)


def test_a_video_reference_of_another_frame_rate_is_refused(tmp_path: pathlib.Path):
    files = latent_folder.tensors(0, seen=(2, 1, 1))
    files[latents.VIDEO_REFERENCE]["fps"] = np.array(24, np.float32)
    latent_folder.write_clip(tmp_path, "clip", files)
    with pytest.raises(ValueError, match="24 frames per second, its clip 25"):
        latents.index(tmp_path, EVERY)


def test_video_references_of_several_sizes_are_refused(tmp_path: pathlib.Path):
    one(tmp_path, "a", seen=(2, 1, 1))
    one(tmp_path, "b", seen=(2, 1, 1))
    one(tmp_path, "c", seen=(2, 2, 2))
    with pytest.raises(ValueError, match=r"c: latents .* references \(2, 2, 2\)"):
        latents.index(tmp_path, EVERY)

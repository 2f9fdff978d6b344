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
    read = [latents.read(index, clip, connect) for clip in index.clips]
    single = [latents.collate([sample], index) for sample in read]
    assert len({str(jax.tree.map(jnp.shape, batch)) for batch in single}) == 1


def test_sounds_of_different_lengths_carry_their_lengths(tmp_path: pathlib.Path):
    latent_folder.write(tmp_path, 1)
    one(tmp_path, "short", audio=7)
    batch = latents.whole(latents.index(tmp_path), connect)
    np.testing.assert_array_equal(batch.audio_length, [7, 9])
    assert batch.audio.shape[1] == 9


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"size": (2, 2, 2)}, "videos of one size, got latents"),
        (
            {"text": (8, 20)},
            r"texts of one length, got features \[\(4, 20\), \(8, 20\)\]",
        ),
    ],
)
def test_collating_videos_or_texts_of_two_sizes_is_refused(
    tmp_path: pathlib.Path, other: Any, message: str
):
    latent_folder.write(tmp_path / "a", 1)
    one(tmp_path / "b", **other)
    indices = [latents.index(tmp_path / name) for name in "ab"]
    samples = [latents.read(i, i.clips[0], connect) for i in indices]
    with pytest.raises(ValueError, match=message):
        latents.collate(samples, indices[0])


def test_batches_lie_on_the_host(tmp_path: pathlib.Path):
    batch = latents.whole(latents.index(latent_folder.write(tmp_path)), connect)
    assert {type(x) for x in jax.tree.leaves(batch)} == {np.ndarray}
    assert batch.rate is not None and batch.rate.fps == 25.0


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

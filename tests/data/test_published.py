"""Reading published folders: .pt files, pairs, older forms."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import latent_folder
import numpy as np
import pt_files
import published_folder
import pytest

from idlora_jax.data import latents, published, stored
from idlora_jax.data.stored import AUDIO, REFERENCE, TEXT, VIDEO
from idlora_jax.types import AV, Prompt
from idlora_jax.weights.header import Spec


def connect(features: AV, mask: Any) -> Prompt:
    return Prompt(*(jnp.asarray(f, jnp.float32) for f in features))


@pytest.mark.parametrize("shared", [True, False])
def test_a_published_folder_is_trained_on_like_our_own(
    tmp_path: pathlib.Path, shared: bool
):
    ours = latents.index(latent_folder.write(tmp_path / "ours", shared=shared))
    theirs = latents.index(published_folder.write(tmp_path / "theirs", shared=shared))
    assert theirs.clips == ours.clips
    batches = [latents.whole(index, connect) for index in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert batches[1].video.dtype == jnp.bfloat16


def test_features_keep_their_bits_and_their_padding_on_the_left(tmp_path):
    contents = published_folder.files(0)
    published_folder.write_clip(tmp_path, "clip", contents)
    index = latents.index(tmp_path)
    found = index.load(index.clips[0])
    features = contents[TEXT]["prompt_embeds"]
    assert found.features.video is found.features.audio
    np.testing.assert_array_equal(found.features.video, features)
    assert found.features.video.dtype == features.dtype
    assert found.mask.tolist() == [False, True, True, True]


@pytest.mark.parametrize("inner", [".precomputed", "precomputed"])
def test_a_folder_of_precomputed_latents_inside_is_entered(tmp_path, inner):
    published_folder.write(tmp_path / inner, 2)
    assert len(latents.index(tmp_path).clips) == 2


def test_latents_stored_as_tokens_are_unfolded(tmp_path):
    contents = published_folder.files(0)
    new = contents[VIDEO]["latents"]
    contents[VIDEO]["latents"] = np.ascontiguousarray(new.reshape(128, -1).T)
    published_folder.write_clip(tmp_path, "clip", contents)
    index = latents.index(tmp_path)
    assert index.clips[0].video == (3, 2, 2)
    found = index.load(index.clips[0]).video
    np.testing.assert_array_equal(found, np.moveaxis(new, 0, -1))


def test_tokens_that_do_not_make_up_the_sizes_are_refused(tmp_path):
    contents = published_folder.files(0)
    contents[VIDEO]["latents"] = np.zeros((11, 128), np.float32)
    published_folder.write_clip(tmp_path, "clip", contents)
    with pytest.raises(ValueError, match=r"11 tokens, expected F, H, W = \(3, 2, 2\)"):
        latents.index(tmp_path)


def test_latent_x_is_paired_with_condition_x(tmp_path):
    contents = published_folder.files(0)
    text = contents.pop(TEXT)
    published_folder.write_clip(tmp_path, "a/latent_1", contents)
    published_folder.write_clip(tmp_path, "a/condition_1", {TEXT: text})
    index = latents.index(tmp_path)
    assert [clip.name for clip in index.clips] == ["a/latent_1"]
    assert index.load(index.clips[0]).mask.sum() == 3


def test_pairs_prefer_equal_names_then_the_same_folder_then_a_flat_one():
    names = {
        VIDEO: {"latent_1", "a/latent_2", "a/latent_3", "b/latent_3", "condition_4"},
        TEXT: {"condition_1", "latent_1", "condition_2", "a/condition_3",
               "b/condition_3", "condition_4", "condition_5"},
    }  # fmt: skip
    assert published.pair(names)[TEXT] == {
        "latent_1": "latent_1",
        "a/latent_2": "condition_2",
        "a/latent_3": "a/condition_3",
        "b/latent_3": "b/condition_3",
        "condition_4": "condition_4",
        "latent_5": "condition_5",
    }


def test_clips_without_a_partner_are_listed(tmp_path):
    published_folder.write(tmp_path, 2)
    (tmp_path / published_folder.CLEAN / "speaker0/clip0.pt").unlink()
    with pytest.raises(ValueError, match=f"clip0: missing in {REFERENCE}"):
        latents.index(tmp_path)


def test_one_name_in_two_folders_of_one_kind_is_refused(tmp_path):
    published_folder.write(tmp_path, 1)
    contents = published_folder.files(0)
    name = latent_folder.names(1)[0]
    pt_files.save(tmp_path / REFERENCE / f"{name}.pt", contents[AUDIO])
    with pytest.raises(ValueError, match="are the same clip's"):
        latents.index(tmp_path)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("latents/a.pt", (VIDEO, "a")),
        ("x/precomputed/audio_latents_clean/b/c.d.pt", (REFERENCE, "b/c.d")),
        ("conditions/latents/a.safetensors", (TEXT, "latents/a")),
        ("latents/a.json", None),
        ("latents/._a.pt", None),
        ("latents.pt", None),
        ("readme.md", None),
    ],
)
def test_paths_say_folder_and_name(path, found):
    assert published.split_path(path) == found


@pytest.mark.parametrize("fps", [25.0, 25, np.array(25.0), np.array([25])])
def test_numbers_may_be_tensors(tmp_path, fps):
    contents = published_folder.files(0)
    contents[VIDEO]["fps"] = fps
    published_folder.write_clip(tmp_path, "clip", contents)
    assert latents.index(tmp_path).fps == 25.0


def test_specs_of_both_forms_agree(tmp_path):
    ours = latent_folder.write(tmp_path / "ours", 1) / VIDEO
    theirs = published_folder.write(tmp_path / "theirs", 1) / VIDEO
    specs = [published.specs(next(root.rglob("clip*"))) for root in (ours, theirs)]
    assert specs[0] == specs[1]
    assert specs[1]["latents"] == Spec((128, 3, 2, 2), np.dtype("bfloat16"))


BROKEN = {
    "a list": ([1], "holds a list"),
    "no latents": ({"fps": 25.0}, "no tensor"),
    "a flat tensor": ({"latents": np.zeros(3), "fps": 25.0}, r"shape \(3,\)"),
    "no rate": ({"latents": np.zeros((4, 1, 1, 1))}, "got fps None"),
    "a rate of zero": ({"latents": np.zeros((4, 1, 1, 1)), "fps": 0.0}, "got 0.0 fr"),
    "an infinite size": (
        {
            "latents": np.zeros((4, 2)),
            "fps": 25.0,
            "num_frames": float("inf"),
            "height": 1,
            "width": 1,
        },
        "got num_frames inf",
    ),
    "negative sizes": (
        {
            "latents": np.zeros((4, 2)),
            "fps": 25.0,
            "num_frames": -2,
            "height": -2,
            "width": 1,
        },
        r"expected F, H, W = \(-2, -2, 1\)",
    ),
    "a text as rate": (
        {"latents": np.zeros((4, 1, 1, 1)), "fps": "25"},
        "got fps '25'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_of_another_form_say_what_they_hold(tmp_path, case):
    content, said = BROKEN[case]
    published_folder.write_clip(tmp_path, "clip", published_folder.files(0))
    pt_files.save(tmp_path / VIDEO / "clip.pt", content)
    with pytest.raises(ValueError, match=said):
        latents.index(tmp_path)


def test_conditions_of_another_form_say_what_they_hold(tmp_path):
    contents = published_folder.files(0)
    contents[TEXT]["prompt_attention_mask"] = np.ones(3)
    published_folder.write_clip(tmp_path, "clip", contents)
    index = latents.index(tmp_path)
    with pytest.raises(ValueError, match=r"prompt_attention_mask \[3\]"):
        index.load(index.clips[0])


def test_values_that_are_not_finite_name_their_file(tmp_path):
    contents = published_folder.files(0)
    contents[AUDIO]["latents"][0, 0, 0] = np.inf
    published_folder.write_clip(tmp_path, "clip", contents)
    index = latents.index(tmp_path)
    with pytest.raises(ValueError, match=r"audio_latents/clip\.pt holds values"):
        index.load(index.clips[0])


def test_finite_looks_at_every_dtype():
    bits = np.array([1, 0x7F80], np.uint16).view("bfloat16")
    assert stored.finite({"a": bits[:1], "b": np.ones(2, bool), "c": 3})
    assert not stored.finite({"a": bits})

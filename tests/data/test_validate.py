import latent_folder
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from idlora_jax.data import latents, layout, validate


@pytest.fixture
def folder(tmp_path):
    """Two clips of 17 frames: 0.68 s, so 17 audio latents."""
    latent_folder.write(tmp_path / "a", 2, audio=17)
    return tmp_path / "a"


def change(path, **changes):
    save_file(load_file(path) | changes, path)


def test_a_sound_folder_has_nothing_wrong(folder, capsys):
    text, wrong = validate.check(folder)
    assert not wrong and "pairs: 2" in text
    assert validate.run(folder)
    assert capsys.readouterr().out.endswith("a: sound\n")


def test_a_sound_of_another_length_than_its_video_is_told(tmp_path):
    latent_folder.write(tmp_path, 2, audio=30)
    _, wrong = validate.check(tmp_path)
    assert wrong == [
        f"{name}: 30 audio latents, its video has 17" for name in latent_folder.names(2)
    ]


def test_values_that_are_not_finite_are_told(folder):
    name = latent_folder.names(2)[1]
    path = layout.file_of(folder, latents.AUDIO, name)
    change(path, latents=np.full((8, 17, 16), np.nan, np.float32))
    text, wrong = validate.check(folder)
    assert "not finite" in text and wrong[0] == "something is broken, see above"


def test_clips_of_two_sizes_in_one_folder_are_no_fault(folder):
    latent_folder.write(folder, 1, audio=25, size=(4, 2, 2))
    text, wrong = validate.check(folder)
    assert not wrong
    assert "latents [F H W C]: [4, 2, 2, 128] (1), [3, 2, 2, 128] (1)" in text


def test_a_folder_without_sound_is_told(folder):
    for kind in (latents.AUDIO, latents.REFERENCE):
        for path in (folder / kind).rglob("*.safetensors"):
            path.unlink()
    _, wrong = validate.check(folder)
    assert wrong == ["no clip has sound: audio_latents/ is missing or empty"]


def test_each_bucket_is_checked_by_itself(tmp_path, capsys):
    for name, size in {"64x64x17": (3, 2, 2), "64x32x17": (3, 2, 1)}.items():
        latent_folder.write(tmp_path / name, 2, audio=17, size=size)
    assert [path.name for path in validate.folders(tmp_path)] == [
        "64x32x17",
        "64x64x17",
    ]
    assert validate.run(tmp_path)
    layout.file_of(tmp_path / "64x32x17", latents.TEXT, "speaker0/clip0").unlink()
    assert not validate.run(tmp_path)
    text = capsys.readouterr().out
    assert "speaker0/clip0: missing in conditions" in text and "broken\n" in text

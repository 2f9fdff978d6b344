"""The demo, end to end (slow), and what it refuses (quick)."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from safetensors import safe_open

from idlora_jax import commandline, demo, media, presets
from idlora_jax.data import latents

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo.run(demo.Options(output=folder, steps=60))


@pytest.mark.slow
def test_the_held_out_audio_loss_falls(made):
    _, result = made
    assert result.after["audio_loss"] < result.before["audio_loss"]
    assert int(result.state.step) == 60


@pytest.mark.slow
def test_all_clips_are_generated_and_encoded(made):
    folder, _ = made
    assert len(list((folder / "clips").glob("*.mp4"))) == 16
    index = latents.index(folder / "latents")
    assert len(index.clips) == 16 and index.clips[0].video == (3, 2, 2)
    assert (index.audio, index.reference) == (17, 17)


@pytest.mark.slow
def test_the_sample_is_h264_and_aac_of_the_requested_length(made):
    folder, _ = made
    config = presets.tiny_sample(folder)
    path, length = folder / "sample/sample.mp4", config.frames / config.fps
    found = media.probe(path)
    assert (found.video_codec, found.audio_codec) == ("h264", "aac")
    assert (found.fps, found.height, found.width) == (25.0, 64, 64)
    assert found.video_s == pytest.approx(length, abs=0.01)
    assert found.audio_s == pytest.approx(length, abs=0.05)
    assert media.read_video(path).shape == (config.frames, 64, 64, 3)
    assert media.read_audio(path, 24000).shape[1] == pytest.approx(24000, abs=1200)
    record = json.loads((folder / "sample/sample.json").read_text())
    assert record["synthetic"] is True
    assert record["adapters"][0]["step"] == 60
    (reference,) = record["settings"]["reference_audio"]
    assert reference.endswith("reference.wav")


@pytest.mark.slow
def test_the_adapter_is_a_lora_file_with_comfyui_keys(made):
    _, result = made
    with safe_open(result.adapter, framework="numpy") as file:
        keys = list(file.keys())
    assert all(key.startswith("diffusion_model.transformer_blocks.") for key in keys)
    assert {key.rsplit(".", 2)[1] for key in keys} == {"lora_A", "lora_B"}
    assert len(keys) == 2 * 18 * 4


@pytest.mark.slow
def test_the_sheet_shows_the_training_clips_and_the_output(made):
    folder, _ = made
    sheet = media.read_image(folder / "contact_sheet.png")
    rows = 4 + 2
    assert sheet.shape[0] > rows * 2 * 64 and sheet.shape[1] >= demo.COLUMNS * 2 * 64
    first = media.read_video(folder / "clips/speaker0_clip3.mp4")[0]
    shown = sheet[33 : 33 + 128 : 2, :128:2]
    assert np.abs(shown.astype(int) - first).mean() < 1


@pytest.mark.slow
def test_the_summary_says_that_the_weights_are_random(made):
    folder, result = made
    text = demo.summary(folder)
    assert "weights are random" in text and "noise" in text
    for name in demo.MADE:
        assert f"{folder / name}: " in text
    table = demo.compared(result)
    assert f"{result.before['audio_loss']:.5f}" in table
    assert f"{result.after['audio_loss']:.5f}" in table


@pytest.mark.slow
def test_the_readmes_python_samples_a_clip(made, tmp_path, monkeypatch):
    folder, _ = made
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("outputs/demo", str(folder)).replace("steps=30", "steps=3"), {})
    found = media.probe(tmp_path / "clip.mp4")
    assert (found.video_codec, found.audio_codec) == ("h264", "aac")
    assert media.read_video(tmp_path / "clip.mp4").shape == (25, 64, 64, 3)


def test_a_folder_that_the_demo_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        commandline.guarded(lambda: demo.main(["--output", str(tmp_path)]))
    assert ended.value.code == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["train", "mine.txt"]


def test_what_an_earlier_demo_made_is_replaced_and_nothing_else(tmp_path):
    folder = tmp_path / "new"
    demo.fresh(folder)
    (folder / "train/state").mkdir(parents=True)
    (folder / "contact_sheet.png").touch()
    (folder / "notes.txt").touch()
    demo.fresh(folder)
    assert {p.name for p in folder.iterdir()} == {demo.MARK, "notes.txt"}


@pytest.mark.parametrize(
    ("option", "message"),
    [(("--steps", "0"), "steps: got 0"), (("--stesp", "9"), "--steps")],
)
def test_wrong_usage_ends_before_any_work(tmp_path, capsys, option, message):
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        demo.main(["--output", str(output), *option])
    assert ended.value.code == 2 and not output.exists()
    assert message in capsys.readouterr().err


def test_a_clip_that_is_not_what_was_asked_for_is_refused(tmp_path):
    path = tmp_path / "clip.mp4"
    tone = np.sin(np.arange(24000) / 9).astype(np.float32)
    frames = np.zeros((25, 64, 64, 3), np.uint8)
    media.write_video(path, frames, np.stack([tone, tone]), 24000)
    config = presets.tiny_sample(tmp_path)
    assert demo.check(path, config).startswith("h264 64x64 25 fps, 25 frames; aac")
    for change in ({"frames": 33}, {"fps": 24.0}, {"height": 96}):
        with pytest.raises(ValueError, match="expected h264, aac"):
            demo.check(path, dataclasses.replace(config, **change))

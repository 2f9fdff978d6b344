"""`sample.py`: wrong input before any weights are read, and one clip end to end."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from sample_files import CONFIG, arguments, config, run

from idlora_jax import (
    adapters,
    checkpoints,
    commandline,
    guidance,
    jobs,
    media,
    pipeline,
    sampling,
    trajectories,
)
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.pipeline import Media
from idlora_jax.sample_config import Guidance, SampleConfig
from idlora_jax.types import AV
from idlora_jax.weights import io

RATE = 24000


def sound(path: pathlib.Path, wave: np.ndarray) -> pathlib.Path:
    media.write_wav(path, wave.astype(np.float32), RATE)
    return path


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (2, samples))


def test_good_inputs_pass_the_check_without_weights(no_weights, files, tmp_path):
    job, inputs = sampling.check(config(files, tmp_path / "out"))
    assert job.nets.transformer.layers == 4
    assert inputs.waves[0].shape[0] == 2 and inputs.image.shape == (64, 64, 3)
    assert [*inputs.adapters] == [*job.adapters]
    assert not list((tmp_path / "out").iterdir())


def test_reference_picture_and_adapter_may_all_be_left_out(files, tmp_path):
    nothing = {"lora": (), "reference_audio": (), "first_frame": None}
    job, inputs = sampling.check(config(files, tmp_path, **nothing))
    assert (inputs.waves, inputs.image, inputs.adapters) == ((), None, {})
    assert job.hashes == {}


def test_the_plan_has_the_configurations_scales_and_strengths(files, tmp_path):
    scales = Guidance(1.0, 5.0, 2.0, 0.0, 3, 1.0)
    c = config(files, tmp_path, guidance=scales, lora_strength=(0.5,))
    (stage,) = sampling.plan_of(c).stages
    assert [t.name for t in stage.terms] == ["text", "identity"]
    want = [[[0, 4], [0, 2]]]
    np.testing.assert_array_equal(stage.weights(np.array([1.0, 0.0])), want)
    assert [strength for _, strength in stage.adapters] == [0.5]


def test_one_file_may_be_used_twice(files, tmp_path):
    twice = (files["lora"],) * 2
    _, inputs = sampling.check(config(files, tmp_path, lora=twice))
    assert len(inputs.adapters) == 2


WRONG = {
    "no reference": (
        lambda f, p: {"reference_audio": (p / "none.wav",)},
        r"none.wav: got no such file, expected a sound or video file",
    ),
    "silent reference": (
        lambda f, p: {"reference_audio": (sound(p / "s.wav", np.zeros((2, 9000))),)},
        r"s.wav: got silent audio .* choose another recording",
    ),
    "empty reference": (
        lambda f, p: {"reference_audio": (sound(p / "e.wav", np.zeros((2, 0))),)},
        r"e.wav: got empty audio",
    ),
    "short reference": (
        lambda f, p: {"reference_audio": (sound(p / "t.wav", noise(500)),)},
        r"log_mel: got 334 samples .* give a longer recording",
    ),
    "picture as reference": (
        lambda f, p: {"reference_audio": (f["first_frame"],)},
        r"face.png: got no audio stream",
    ),
    "no first frame": (
        lambda f, p: {"first_frame": p / "none.png"},
        r"none.png: got no such file, expected a picture",
    ),
    "sound as first frame": (
        lambda f, p: {"first_frame": f["reference_audio"][0]},
        r"ref.wav: got no video stream",
    ),
    "no adapter": (
        lambda f, p: {"lora": (p / "none.safetensors",)},
        r"none.safetensors: got no such file",
    ),
    "no base": (
        lambda f, p: {"base": p / "none.safetensors"},
        r"none.safetensors.* no such file",
    ),
    "an adapter as base": (
        lambda f, p: {"base": f["lora"]},
        r"got an adapter .*, expected a base checkpoint",
    ),
    "no text encoder": (
        lambda f, p: {"text_encoder": p / "gemma"},
        r"tokenizer.json not found in .*gemma",
    ),
    "layer outside": (
        lambda f, p: {"guidance": Guidance(stg_layer=29)},
        r"layer 29 is outside of a model of 4 layers",
    ),
    "no prompt": (lambda f, p: {"prompt": " "}, r"prompt: got none, expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_message_before_weights(name, no_weights, files, tmp_path):
    change, message = WRONG[name]
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=message) as caught:
        sampling.check(config(files, output, **change(files, tmp_path)))
    assert str(caught.value).count("\n") == 0
    assert not output.exists()


def saved(path: pathlib.Path, lora: Any, **fields: Any) -> pathlib.Path:
    checkpoints.save_adapter(path, lora, AdapterMeta(**fields))
    return path


def test_an_adapter_s_part_for_the_text_connector_changes_the_prompts(files, tmp_path):
    shapes = io.shapes(io.open_base(files["base"]), "text_connector")
    part = adapters.init(jax.random.key(0), shapes, 2, ("projection/*",))
    part = jax.tree.map(lambda a: np.full(a.shape, 0.05, np.float32), part)
    path = tmp_path / "a.safetensors"
    checkpoints.save_adapter(path, {}, AdapterMeta(), text_connector=part)
    given = config(files, tmp_path, lora=(path,), lora_strength=(0.5,))
    _, inputs = sampling.check(given)
    (text,) = inputs.text
    half = adapters.scale(part, 0.5)
    jax.tree.map(np.testing.assert_array_equal, text, half)
    nets = sampling.check(given)[0].nets
    plain, changed = (
        sampling.texts([given], nets, parts)["a person"] for parts in ((), inputs.text)
    )
    assert not np.allclose(plain.video, changed.video, rtol=1e-2)


@pytest.mark.parametrize("fault", ["width", "keys", "generation"])
def test_an_adapter_of_another_model_is_refused(fault, no_weights, files, tmp_path):
    shapes = io.shapes(io.open_base(files["base"]), "transformer")
    lora, _ = checkpoints.load_adapter(files["lora"], shapes)
    messages = {
        "width": "does not fit the base",
        "keys": "other",
        "generation": "trained on generation 2.3, but the base .* of generation 2.0",
    }
    if fault == "width":
        lora = jax.tree.map(lambda a: np.tile(a, (1, 2, 2)), lora)
    path = saved(tmp_path / "a.safetensors", lora, generation="2.0")
    if fault == "generation":
        path = saved(tmp_path / "a.safetensors", lora, generation="2.3")
    if fault == "keys":
        from safetensors.numpy import load_file, save_file

        tensors = load_file(path)
        name = "diffusion_model.transformer_blocks.0.other.lora_A.weight"
        save_file(tensors | {name: np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(ValueError, match=messages[fault]):
        sampling.check(config(files, tmp_path / "out", lora=(path,)))


def test_an_output_folder_that_cannot_be_is_refused(no_weights, files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir: cannot write to .*file"):
        sampling.check(config(files, tmp_path / "file" / "out"))


RANGES = {
    "--frames 120": "frames: got 120, expected 8k+1 (use 121)",
    "--height 100": "height: got 100, expected a multiple of 32 (use 96)",
    "--width 0": "width: got 0, expected a multiple of 32 (use 32)",
    "--fps 0": "fps: got 0.0, expected above 0 (use 25)",
    "--steps 0": "steps: got 0, expected 1 or more",
    "--name a/b": "name: got 'a/b', expected a file name without folder or ending",
    "--name ..": "name: got '..', expected a file name without folder or ending",
    "--lora-strength 1 2": "expected 0 factors, one per file",
    "--first-fram x": "the nearest name is --first-frame",
    "--guidance.identify 3": "the nearest name is --guidance.identity",
}


@pytest.mark.parametrize("options", RANGES)
def test_wrong_usage_ends_with_status_2_and_one_line(options, monkeypatch, capsys):
    assert run(monkeypatch, "--config", str(CONFIG), *options.split()) == 2
    error = capsys.readouterr().err
    assert RANGES[options] in error
    assert error.count("\n") == 1


def test_a_failure_ends_with_status_1_and_one_line(
    monkeypatch, capsys, files, tmp_path
):
    c = config(files, tmp_path, reference_audio=(tmp_path / "none.wav",))
    status = run(monkeypatch, *arguments(c), "--no-progress")
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def result(frames: int = 9, samples: int = 8000) -> Media:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (1, frames, 64, 32, 3), dtype=np.uint8)
    return Media(video, noise(samples).astype(np.float32)[None], AV(None, None))


def test_the_shipped_configuration_is_the_published_one_at_a_tiny_size():
    c = commandline.load_config(CONFIG, SampleConfig)
    assert c.steps == 30
    (stage,) = sampling.plan_of(c).stages
    scales = dict(zip((t.name for t in stage.terms), stage.scales, strict=True))
    want = {"text": (3, 7), "identity": (0, 3), "stg": (1, 1), "bimodal": (3, 3)}
    assert scales == want
    assert guidance.branches(stage.terms, 4)


@pytest.mark.slow
def test_a_clip_end_to_end(monkeypatch, capsys, files, tmp_path):
    c = config(files, tmp_path)
    line = arguments(c)
    assert run(monkeypatch, *line) == 0
    assert "2/2" in capsys.readouterr().err
    film = media.probe(tmp_path / "sample.mp4")
    assert (film.video_codec, film.audio_codec, film.fps) == ("h264", "aac", 25)
    assert (film.height, film.width) == (64, 32)
    assert film.video_s == pytest.approx(9 / 25, abs=1e-3)
    assert film.audio_s == pytest.approx(9 / 25, abs=0.03)
    assert len(media.read_video(tmp_path / "sample.mp4")) == 9
    assert np.abs(media.read_audio(tmp_path / "sample.mp4")).max() > 0
    again = [*line, "--name", "again", "--no-progress"]
    assert run(monkeypatch, *again) == 0
    other = [*line, "--name", "other", "--no-progress", "--seed", "7"]
    assert run(monkeypatch, *other) == 0
    waves = {n: (tmp_path / f"{n}.wav").read_bytes() for n in ("again", "other")}
    assert waves["again"] != waves["other"]
    third = [*line, "--name", "third", "--no-progress"]
    assert run(monkeypatch, *third) == 0
    assert (tmp_path / "third.wav").read_bytes() == waves["again"]


@pytest.mark.parametrize(
    ("plan", "strengths"),
    [
        ("two_stage", ((0.5, 0.0), (0.0, 0.8))),
        ("two_stage_hq", ((0.5, 0), (0.25, 0.5))),
    ],
)
def test_a_refining_plan_uses_its_files_in_their_stages(
    files, larger, tmp_path, plan, strengths
):
    given = {"plan": plan, "upsampler": larger, "distilled_lora": files["lora"]}
    job, inputs = sampling.check(config(files, tmp_path, lora_strength=(0.5,), **given))
    assert job.nets.upsampler is not None and len(inputs.adapters) == 2
    entry = sampling.record(job, result(), {})
    found = tuple(tuple(adapter["strength"]) for adapter in entry["adapters"])
    assert found == strengths


def test_a_refining_plan_asks_for_its_files(files, tmp_path):
    with pytest.raises(ValueError, match=r"upsampler.*a file, for plan 'two_stage'"):
        config(files, tmp_path, plan="two_stage")


@pytest.mark.slow
@pytest.mark.parametrize("plan", jobs.PLANS)
def test_every_plan_gives_in_python_what_the_command_gives(
    monkeypatch, files, larger, tmp_path, plan
):
    """The command goes step by step, Python all at once: one body, equal latents."""
    given = {"plan": plan, "upsampler": larger, "distilled_lora": files["lora"]}
    scales = Guidance(identity=0.0, stg=0.0, bimodal=1.0)
    c = config(files, tmp_path, guidance=scales, **given)
    extra = ["--plan", plan, "--upsampler", str(larger), "--save-trajectory"]
    extra += ["--distilled-lora", str(files["lora"]), "--no-contact-sheet"]
    extra += ["--guidance.identity", "0", "--guidance.stg", "0"]
    extra += ["--guidance.bimodal", "1"]
    assert run(monkeypatch, *arguments(c), *extra) == 0
    parts = trajectories.read(tmp_path / "sample.trajectory.safetensors").parts
    assert [part.stage for part in parts] == [s.name for s in jobs.plan_of(c).stages]
    job, inputs = sampling.check(dataclasses.replace(c, overwrite=True))
    texts = sampling.texts((c,), job.nets, inputs.text)
    params = sampling.load(c, job.nets)
    asked = sampling.request(job, inputs, params, texts)
    args = (job.plan, job.nets, params, inputs.adapters, asked, jax.random.key(c.seed))
    found = [*pipeline.stages(*args, layout=job.layout)]
    for part, latents in zip(parts, found, strict=True):
        for ours, theirs in zip(latents, part.latents, strict=True):
            scale = np.abs(ours).max()
            np.testing.assert_allclose(theirs[-1], ours[0], atol=1e-5 * scale)
    # What is refined is the picture; the sound stays, bit by bit.
    np.testing.assert_array_equal(found[-1].audio, found[0].audio)
    twice = len(found)
    assert media.probe(tmp_path / "sample.mp4").height == 64 * twice


def test_without_a_size_the_clip_has_the_first_frames_aspect(files, tmp_path):
    wide = tmp_path / "wide.png"
    media.write_png(wide, np.zeros((54, 96, 3), np.uint8))
    free = {"height": None, "width": None}
    job, _ = sampling.check(config(files, tmp_path, first_frame=wide, **free))
    assert (job.layout.video.height, job.layout.video.width) == (288, 512)
    job, _ = sampling.check(config(files, tmp_path, first_frame=None, **free))
    assert (job.layout.video.height, job.layout.video.width) == (512, 512)
    with pytest.raises(ValueError, match="height and width together"):
        config(files, tmp_path, height=None)


def test_the_used_part_of_a_recording_is_measured_and_recorded(files, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 5 * RATE))
    long = np.concatenate([np.zeros((2, 6 * RATE)), noise], axis=1)
    given = {"reference_audio": (sound(tmp_path / "long.wav", long),)}
    job, inputs = sampling.check(config(files, tmp_path, **given))
    assert inputs.waves[0].shape == (2, 11 * 16000)
    faults = [line for line in job.warnings if line.startswith("long.wav: ")]
    assert len(faults) == 2 and "11.0 s" in faults[0] and "55% " in faults[1]
    given["reference_crop"] = "loudest"
    job, inputs = sampling.check(config(files, tmp_path, **given))
    assert inputs.waves[0].shape == (2, 5 * 16000)
    assert not [line for line in job.warnings if line.startswith("long.wav: ")]
    (entry,) = sampling.record(job, result(), {})["references"]
    assert (entry["file"], entry["seconds"]) == ("long.wav", 5.0)
    assert entry["silent_share"] < 0.01 and abs(entry["rms_db"] + 22) < 0.5


def test_a_clip_goes_on_from_a_file_and_may_be_joined_to_it(files, tmp_path):
    path, rng = tmp_path / "before.mp4", np.random.default_rng(0)
    frames = rng.integers(0, 256, (25, 32, 64, 3), np.uint8)
    wave = rng.normal(0, 0.1, (2, RATE)).astype(np.float32)
    media.write_video(path, frames, wave, RATE)
    free = {"height": None, "width": None, "first_frame": None}
    given = {"continue_from": path, "overlap": 9, "frames": 17, **free}
    job, inputs = sampling.check(config(files, tmp_path, **given))
    assert inputs.ending.frames.shape == (9, 32, 64, 3)
    assert inputs.ending.wave.shape == (2, round((9 / 25 - 0.03) * 16000))
    assert (job.layout.video.height, job.layout.video.width) == (256, 512)
    assert job.hashes["continue_from"] == checkpoints.file_hash(path)
    made = result()._replace(
        video=np.zeros((1, 17, 32, 64, 3), np.uint8),
        wave=np.ones((1, 2, RATE), np.float32),
    )
    written = sampling.single(job, made)
    assert written.video.shape[1] == 8
    assert written.wave.shape == (1, 2, 8 * RATE // 25)
    job, _ = sampling.check(config(files, tmp_path, joined=True, **given))
    written = sampling.single(job, made)
    np.testing.assert_array_equal(written.video[0, :25], media.read_video(path))
    assert written.video.shape[1] == 25 + 8
    assert written.wave.shape == (1, 2, 33 * RATE // 25)


def test_a_prompt_that_makes_a_bad_clip_is_warned_of(files, tmp_path):
    long = "[VISUAL]: a [SPEECH]: " + "word " * 40 + "[SOUNDS]: b"
    c = config(files, tmp_path, prompt=long, reference_audio=())
    job, _ = sampling.check(c)
    (line,) = job.warnings
    assert "shorten it" in line
    assert sampling.record(job, result(), {})["warnings"] == [line]

"""`sample.py`: wrong input before any weights are read, and one clip end to end."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import sys
import wave as wave_file
from typing import Any

import jax
import numpy as np
import pytest

from idlora_jax import (
    adapters,
    checkpoints,
    commandline,
    guidance,
    media,
    sampling,
)
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.config_upsampler import upsampler_config
from idlora_jax.data import synthetic
from idlora_jax.model import upsampler
from idlora_jax.pipeline import Media
from idlora_jax.sample_config import Guidance, SampleConfig
from idlora_jax.types import AV
from idlora_jax.weights import io
from idlora_jax.weights.upsampler_files import save_upsampler

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs/tiny_sample.py"
RATE = 24000


def script() -> Any:
    spec = importlib.util.spec_from_file_location("sample_script", ROOT / "sample.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    """Paths of a whole set of good inputs."""
    folder = tmp_path_factory.mktemp("inputs")
    base, text_encoder = tiny_model
    opened = io.open_base(base)
    shapes = io.shapes(opened, "transformer")
    lora = adapters.init(jax.random.key(0), shapes, 2)
    lora = jax.tree.map(lambda a: np.full(a.shape, 0.01, np.float32), lora)
    meta = AdapterMeta(generation="2.0", base_hash=opened.base_hash, rank=2, alpha=2.0)
    checkpoints.save_adapter(folder / "lora.safetensors", lora, meta)
    clip = synthetic.clip(0, 0, 0)
    media.write_wav(folder / "ref.wav", clip.wave, clip.rate)
    media.write_png(folder / "face.png", clip.frames[0])
    return {
        "base": base,
        "text_encoder": text_encoder,
        "lora": folder / "lora.safetensors",
        "reference_audio": folder / "ref.wav",
        "first_frame": folder / "face.png",
    }


def config(files: dict[str, pathlib.Path], output: pathlib.Path, **changes: Any):
    given = files | {"lora": (files["lora"],), "output_dir": output}
    options = {"frames": 9, "height": 64, "width": 32, "steps": 2, "dtype": "float32"}
    options["guidance"] = Guidance(stg_layer=3)
    options["prompt"] = "a person"
    return SampleConfig(**(given | options | changes))


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(io, "read_all", refuse)


def sound(path: pathlib.Path, wave: np.ndarray) -> pathlib.Path:
    media.write_wav(path, wave.astype(np.float32), RATE)
    return path


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (2, samples))


def test_good_inputs_pass_the_check_without_weights(no_weights, files, tmp_path):
    job, inputs = sampling.check(config(files, tmp_path / "out"))
    assert job.nets.transformer.layers == 4
    assert inputs.wave.shape[0] == 2 and inputs.image.shape == (64, 64, 3)
    assert [*inputs.adapters] == [*job.adapters]
    assert not list((tmp_path / "out").iterdir())


def test_reference_picture_and_adapter_may_all_be_left_out(files, tmp_path):
    nothing = {"lora": (), "reference_audio": None, "first_frame": None}
    job, inputs = sampling.check(config(files, tmp_path, **nothing))
    assert (inputs.wave, inputs.image, inputs.adapters) == (None, None, {})
    assert job.hashes == {}


def test_the_plan_has_the_configurations_scales_and_strengths(files, tmp_path):
    scales = Guidance(1.0, 5.0, 2.0, 0.0, 3, 1.0)
    c = config(files, tmp_path, guidance=scales, lora_strength=(0.5,))
    (stage,) = sampling.plan_of(c).stages
    assert [t.name for t in stage.terms] == ["text", "identity"]
    want = [[[0, 4], [0, 2]]]
    np.testing.assert_array_equal(stage.weights(1), want)
    assert [strength for _, strength in stage.adapters] == [0.5]


def test_one_file_may_be_used_twice(files, tmp_path):
    twice = (files["lora"],) * 2
    _, inputs = sampling.check(config(files, tmp_path, lora=twice))
    assert len(inputs.adapters) == 2


WRONG = {
    "no reference": (
        lambda f, p: {"reference_audio": p / "none.wav"},
        r"none.wav: got no such file, expected a sound or video file",
    ),
    "silent reference": (
        lambda f, p: {"reference_audio": sound(p / "s.wav", np.zeros((2, 9000)))},
        r"s.wav: got silent audio .* choose another recording",
    ),
    "empty reference": (
        lambda f, p: {"reference_audio": sound(p / "e.wav", np.zeros((2, 0)))},
        r"e.wav: got empty audio",
    ),
    "short reference": (
        lambda f, p: {"reference_audio": sound(p / "t.wav", noise(500))},
        r"log_mel: got 334 samples .* give a longer recording",
    ),
    "picture as reference": (
        lambda f, p: {"reference_audio": f["first_frame"]},
        r"face.png: got no audio stream",
    ),
    "no first frame": (
        lambda f, p: {"first_frame": p / "none.png"},
        r"none.png: got no such file, expected a picture",
    ),
    "sound as first frame": (
        lambda f, p: {"first_frame": f["reference_audio"]},
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
    plain, changed = (sampling._texts(given, parts) for parts in ((), inputs.text))
    assert not np.allclose(plain[0].video, changed[0].video, rtol=1e-2)


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
    "--lora-strength 1 2": "expected 0 factors, one per file",
    "--first-fram x": "the nearest name is --first-frame",
    "--guidance.identify 3": "the nearest name is --guidance.identity",
}


def run(monkeypatch: Any, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sample.py", *arguments])
    with pytest.raises(SystemExit) as end:
        commandline.guarded(script().main)
    return end.value.code


@pytest.mark.parametrize("options", RANGES)
def test_wrong_usage_ends_with_status_2_and_one_line(options, monkeypatch, capsys):
    assert run(monkeypatch, "--config", str(CONFIG), *options.split()) == 2
    error = capsys.readouterr().err
    assert RANGES[options] in error
    assert error.count("\n") == 1


def arguments(c: SampleConfig) -> list[str]:
    given = {
        "base": c.base,
        "text-encoder": c.text_encoder,
        "lora": c.lora[0],
        "reference-audio": c.reference_audio,
        "first-frame": c.first_frame,
        "prompt": c.prompt,
        "output-dir": c.output_dir,
        "frames": c.frames,
        "height": c.height,
        "width": c.width,
        "steps": c.steps,
    }
    return [part for k, v in given.items() for part in (f"--{k}", str(v))]


def test_a_failure_ends_with_status_1_and_one_line(
    monkeypatch, capsys, files, tmp_path
):
    c = config(files, tmp_path, reference_audio=tmp_path / "none.wav")
    status = run(monkeypatch, "--config", str(CONFIG), *arguments(c), "--no-progress")
    assert status == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def result(frames: int = 9, samples: int = 8000) -> Media:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (1, frames, 64, 32, 3), dtype=np.uint8)
    return Media(video, noise(samples).astype(np.float32)[None], AV(None, None))


def test_a_sample_is_written_with_all_it_was_made_from(files, tmp_path):
    job, _ = sampling.check(config(files, tmp_path, lora_strength=(0.5,)))
    video, sound, sidecar = sampling.write(job, result(), {"sample": 1.0})
    assert sorted(tmp_path.iterdir()) == sorted([video, sound, sidecar])
    entry = json.loads(sidecar.read_text())
    assert entry["synthetic"] is True
    assert entry["model"]["hash"] == io.open_base(files["base"]).base_hash
    hashes = {k: checkpoints.file_hash(files[k]) for k in entry["inputs"]}
    assert entry["inputs"] == {k: hashes[k] for k in ("reference_audio", "first_frame")}
    (adapter,) = entry["adapters"]
    tensors, _ = checkpoints.read_tensors(files["lora"])
    recorded = checkpoints.tensors_hash(tensors)
    assert (adapter["content_hash"], adapter["strength"]) == (recorded, [0.5])
    assert set(entry["settings"]) == {f.name for f in dataclasses.fields(SampleConfig)}
    assert (entry["video"]["seconds"], entry["audio"]["seconds"]) == (0.36, 8000 / 24e3)
    with wave_file.open(str(sound)) as file:
        assert (file.getframerate(), file.getnframes()) == (24000, 8000)


def test_the_film_itself_says_that_it_is_synthetic(files, tmp_path):
    job, _ = sampling.check(config(files, tmp_path))
    video, _, sidecar = sampling.write(job, result(), {})
    comment = json.loads(media.probe(video).metadata["comment"])
    entry = json.loads(sidecar.read_text())
    assert comment["synthetic"] is True
    assert comment["model"] == entry["model"]


def test_a_failing_write_leaves_nothing_behind(files, tmp_path, monkeypatch):
    job, _ = sampling.check(config(files, tmp_path))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media, "write_wav", full)
    with pytest.raises(OSError, match="No space"):
        sampling.write(job, result(), {})
    assert not list(tmp_path.iterdir())


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
    line = ["--config", str(CONFIG), *arguments(c)]
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


@pytest.fixture(scope="module")
def refining(tmp_path_factory):
    """A latent upsampler of random weights, as an original file."""
    section = {
        "in_channels": 128,
        "mid_channels": 32,
        "num_blocks_per_stage": 1,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": False,
    }
    cfg = upsampler_config(section)
    path = tmp_path_factory.mktemp("upsampler") / "x2.safetensors"
    save_upsampler(path, cfg, upsampler.init(cfg, jax.random.key(0)))
    return path


@pytest.mark.parametrize(
    ("plan", "strengths"),
    [
        ("two_stage", ((0.5, 0.0), (0.0, 0.8))),
        ("two_stage_hq", ((0.5, 0), (0.25, 0.5))),
    ],
)
def test_a_refining_plan_uses_its_files_in_their_stages(
    files, refining, tmp_path, plan, strengths
):
    given = {"plan": plan, "upsampler": refining, "distilled_lora": files["lora"]}
    job, inputs = sampling.check(config(files, tmp_path, lora_strength=(0.5,), **given))
    assert job.nets.upsampler is not None and len(inputs.adapters) == 2
    entry = sampling.record(job, result(), {})
    found = tuple(tuple(adapter["strength"]) for adapter in entry["adapters"])
    assert found == strengths


def test_a_refining_plan_asks_for_its_files(files, tmp_path):
    with pytest.raises(ValueError, match=r"upsampler.*a file, for plan 'two_stage'"):
        config(files, tmp_path, plan="two_stage")


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["two_stage", "distilled"])
def test_other_plans_end_to_end(monkeypatch, files, refining, tmp_path, plan):
    given = {"plan": plan, "upsampler": refining, "distilled_lora": files["lora"]}
    c = config(files, tmp_path, guidance=Guidance(stg=0.0, bimodal=1.0), **given)
    job, inputs = sampling.check(c)
    media_, _ = sampling.generate(job, inputs)
    twice = 2 if plan == "two_stage" else 1
    assert media_.video.shape == (1, 9, 64 * twice, 32 * twice, 3)
    request = job.layout.audio.frames
    assert media_.latents.audio.shape[1] == request
    assert np.isfinite(media_.latents.video).all()
    (path, *_) = sampling.write(job, media_, {})
    assert media.probe(path).height == 64 * twice


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


def test_a_prompt_that_makes_a_bad_clip_is_warned_of(files, tmp_path):
    long = "[VISUAL]: a [SPEECH]: " + "word " * 40 + "[SOUNDS]: b"
    job, _ = sampling.check(config(files, tmp_path, prompt=long))
    (line,) = job.warnings
    assert "40 words" in line
    assert sampling.record(job, result(), {})["warnings"] == [line]

"""Samples on disk: which files, in which order, and what they say of themselves."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import wave as wave_file
from typing import Any

import jax
import numpy as np
import pytest

import idlora_jax
from idlora_jax import adapters, checkpoints, finished, jobs, media, outputs
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.data import synthetic
from idlora_jax.jobs import Job
from idlora_jax.pipeline import Media
from idlora_jax.sample_config import Guidance, SampleConfig
from idlora_jax.types import AV
from idlora_jax.weights import io

RATE, FRAMES = 24000, 9
SAMPLES = FRAMES * RATE // 25


@pytest.fixture(scope="module")
def checked(tiny_model, tmp_path_factory) -> Job:
    """A job with an adapter, a recording and a picture."""
    base, text_encoder = tiny_model
    folder = tmp_path_factory.mktemp("given")
    shapes = io.shapes(io.open_base(base), "transformer")
    lora = adapters.init(jax.random.key(0), shapes, 2)
    lora = jax.tree.map(lambda a: np.full(a.shape, 0.01, np.float32), lora)
    meta = AdapterMeta(generation="2.0", rank=2, alpha=2.0)
    checkpoints.save_adapter(folder / "lora.safetensors", lora, meta)
    clip = synthetic.clip(0, 0, 0)
    media.write_wav(folder / "ref.wav", clip.wave, clip.rate)
    media.write_png(folder / "face.png", clip.frames[0])
    config = SampleConfig(
        base=base,
        text_encoder=text_encoder,
        prompt="[VISUAL]: eine Frau [SPEECH]: „Grüß Gott“ [SOUNDS]: Wind",
        lora=(folder / "lora.safetensors",),
        lora_strength=(0.5,),
        reference_audio=(folder / "ref.wav",),
        first_frame=folder / "face.png",
        output_dir=folder / "checked",
        frames=FRAMES,
        height=64,
        width=32,
        guidance=Guidance(stg_layer=3),
    )
    return jobs.check(config)[0]


@pytest.fixture
def job(checked, tmp_path) -> Job:
    return changed(checked, output_dir=tmp_path / "out")


def changed(job: Job, **settings: Any) -> Job:
    config = dataclasses.replace(job.config, **settings)
    return dataclasses.replace(job, config=config)


def result(samples: int = SAMPLES, batch: int = 1, gain: float = 0.1) -> Media:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (batch, FRAMES, 8, 4, 3), dtype=np.uint8)
    video = video.repeat(8, axis=2).repeat(8, axis=3)
    wave = rng.normal(0, gain, (batch, 2, samples)).clip(-1, 1).astype(np.float32)
    return Media(video, wave, AV(None, None))


def entry_of(paths: list[pathlib.Path]) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(paths[-1].read_text("utf-8"), parse_constant=refuse)


def test_a_sample_is_four_files(job):
    paths = outputs.write(job, result(), {"sample": 1.0})
    folder = job.config.output_dir
    assert [path.name for path in paths] == [f"sample.{k}" for k in outputs.KINDS]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert media.read_video(paths[0]).shape == (FRAMES, 64, 32, 3)
    with wave_file.open(str(paths[1])) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, SAMPLES)
    assert media.read_image(paths[2]).shape[1] == 1200


def test_the_record_says_what_the_sample_was_made_from(job):
    entry = entry_of(outputs.write(job, result(), {"sample": 1.0}))
    c = job.config
    assert entry["synthetic"] is True and "licence" in entry["licence"]
    assert entry["library"]["idlora_jax"] == idlora_jax.__version__
    assert entry["model"]["hash"] == io.open_base(c.base).base_hash
    assert entry["model"]["generation"] == "2.0"
    reference = [checkpoints.file_hash(path) for path in c.reference_audio]
    first = checkpoints.file_hash(c.first_frame)
    assert entry["inputs"] == {"reference_audio": reference, "first_frame": first}
    (adapter,) = entry["adapters"]
    tensors, _ = checkpoints.read_tensors(c.lora[0])
    recorded = checkpoints.tensors_hash(tensors)
    assert (adapter["content_hash"], adapter["strength"]) == (recorded, [0.5])
    assert set(entry["settings"]) == {f.name for f in dataclasses.fields(SampleConfig)}
    assert entry["settings"]["prompt"] == c.prompt
    assert entry["seconds"] == {"sample": 1.0}


def test_the_record_says_what_the_files_hold(job):
    paths = outputs.write(job, result(), {})
    entry = entry_of(paths)
    sizes = {path.name: {"bytes": path.stat().st_size} for path in paths[:-1]}
    assert entry["files"] == sizes
    want = {"frames": FRAMES, "fps": 25.0, "seconds": 0.36, "size": [64, 32]}
    assert entry["video"] == want
    audio = entry["audio"]
    assert (audio["rate"], audio["samples"], audio["seconds"]) == (RATE, SAMPLES, 0.36)
    assert audio["silent"] is False and audio["clipped_share"] == 0
    assert audio["rms_db"] == pytest.approx(-20, abs=0.3)
    assert audio["peak"] == pytest.approx(np.abs(result().wave).max(), abs=1e-5)


@pytest.mark.parametrize(
    ("gain", "warned", "silent", "clipped"),
    [(0.0, "silent", True, False), (3.0, "clipped", False, True), (0.1, "", 0, 0)],
)
def test_a_bad_sound_is_seen_in_the_record(job, gain, warned, silent, clipped):
    made = result(gain=gain)
    entry = outputs.record(job, made, {})
    lines = [line for line in entry["warnings"] if line not in job.warnings]
    assert bool(lines) == bool(warned) and all(warned in line for line in lines)
    assert entry["audio"]["silent"] == silent
    assert (entry["audio"]["clipped_share"] > 0.1) == clipped
    again = entry_of(outputs.write(job, made, {}))
    assert again["audio"] == entry["audio"]
    if gain == 0:
        assert entry["audio"]["rms_db"] is None


def test_the_film_itself_says_what_made_it(job):
    paths = outputs.write(job, result(), {})
    entry, said = entry_of(paths), outputs.read_provenance(paths[0])
    assert said["synthetic"] is True
    for name in ("model", "library", "inputs", "licence"):
        assert said[name] == entry[name]
    assert said["adapters"] == [entry["adapters"][0]["content_hash"]]
    tags = media.probe(paths[0]).metadata
    assert tags["title"] == outputs.TITLE and tags["copyright"] == outputs.LICENCE
    told = json.dumps(said)
    assert job.config.prompt not in told and str(job.config.output_dir) not in told


def test_without_provenance_only_the_record_tells(job):
    paths = outputs.write(changed(job, provenance=False), result(), {})
    assert entry_of(paths)["synthetic"] is True
    assert not {"title", "comment", "copyright"} & set(media.probe(paths[0]).metadata)
    with pytest.raises(ValueError, match=r"read_provenance: .*no record of its origin"):
        outputs.read_provenance(paths[0])


@pytest.mark.parametrize("comment", ["", "hello", "[1]", '{"a": 1}', "[" * 5000])
def test_a_film_of_others_says_nothing(tmp_path, comment):
    clip, tags = np.zeros((1, 16, 16, 3), np.uint8), {"comment": comment}
    media.write_video(tmp_path / "a.mp4", clip, None, metadata=tags)
    with pytest.raises(ValueError, match="no record of its origin"):
        outputs.read_provenance(tmp_path / "a.mp4")


def test_quality_and_contact_sheet_follow_the_settings(job):
    sizes = []
    for crf in (5, 40):
        given = changed(job, crf=crf, contact_sheet=False, name=f"{crf}")
        paths = outputs.write(given, result()._replace(wave=None), {})
        assert [path.suffix for path in paths] == [".mp4", ".json"]
        sizes.append(paths[0].stat().st_size)
    assert sizes[0] > 1.5 * sizes[1]


def test_each_sample_of_a_batch_can_be_written(job):
    made = result(batch=2)
    for number in range(2):
        given = changed(job, name=f"clip{number}")
        paths = outputs.write(given, made, {}, number)
        got = media.read_audio(paths[1], RATE)
        np.testing.assert_allclose(got, made.wave[number], atol=1e-4)
        error = np.abs(media.read_video(paths[0]).astype(float) - made.video[number])
        assert error.mean() < 25


@pytest.mark.parametrize("missing", ["video", "wave"])
def test_what_is_missing_has_no_file(job, missing):
    paths = outputs.write(job, result()._replace(**{missing: None}), {})
    entry, kinds = entry_of(paths), [path.suffix for path in paths]
    assert kinds == ([".wav"] if missing == "video" else [".mp4"]) + [".png", ".json"]
    assert entry["video" if missing == "video" else "audio"] is None
    assert [*entry["files"]] == [path.name for path in paths[:-1]]
    if missing == "wave":
        assert media.probe(paths[0]).audio_codec is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sound_that_is_not_finite_is_refused_before_anything_is_written(job, bad):
    made = result()
    made.wave[0, 1, 100:200] = bad
    with pytest.raises(ValueError, match=r"0\.6% is NaN or infinite"):
        outputs.write(job, made, {})
    assert not job.config.output_dir.exists()
    nothing = made._replace(video=None, wave=None)
    with pytest.raises(ValueError, match="neither pictures nor sound"):
        outputs.write(job, nothing, {})


def test_an_input_is_never_written_over(job, tmp_path):
    face = tmp_path / "face.png"
    media.write_png(face, np.full((8, 8, 3), 99, np.uint8))
    given = changed(job, first_frame=face, output_dir=tmp_path, name="face")
    with pytest.raises(ValueError, match=r"face\.png: got an input's name"):
        outputs.write(given, result(), {})
    assert [*tmp_path.iterdir()] == [face] and media.read_image(face).max() == 99


@pytest.mark.parametrize("name", ["write_video", "write_wav", "write_png"])
def test_a_failing_write_leaves_nothing_behind(job, monkeypatch, name):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    old = outputs.write(job, result(), {"sample": 1.0})
    kept = {path: path.read_bytes() for path in old}
    monkeypatch.setattr(media, name, full)
    with pytest.raises(OSError, match="No space"):
        outputs.write(job, result(gain=0.2), {"sample": 2.0})
    assert {p: p.read_bytes() for p in job.config.output_dir.iterdir()} == kept


def test_the_record_comes_last_and_goes_first(job, monkeypatch):
    """Whenever a record is there, it is that of the files beside it."""
    outputs.write(job, result(), {"sample": 1.0})
    folder, seen = job.config.output_dir, []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        if pathlib.Path(target).parent == folder:
            names = {path.suffix for path in folder.iterdir() if path.is_file()}
            seen.append((pathlib.Path(target).suffix, ".json" in names))
            ready = {path.suffix for path in pathlib.Path(source).parent.iterdir()}
            written = {suffix for suffix, _ in seen[:-1]}
            assert ready | written == {".mp4", ".wav", ".png", ".json"}
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    outputs.write(job, result(gain=0.2), {"sample": 2.0})
    assert seen == [(s, False) for s in (".mp4", ".wav", ".png", ".json")]


def test_an_interrupted_write_leaves_an_unfinished_sample(job, monkeypatch):
    replace = os.replace

    def interrupted(source: Any, target: Any) -> None:
        if pathlib.Path(target) == job.config.output_dir / "sample.png":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        outputs.write(job, result(), {})
    left = {path.name for path in job.config.output_dir.iterdir()}
    assert left == {"sample.mp4", "sample.wav"}
    assert not finished.is_finished(job)
    monkeypatch.undo()
    outputs.write(job, result(), {})
    assert finished.is_finished(job)
    (job.config.output_dir / "sample.wav").unlink()
    assert not finished.is_finished(job)

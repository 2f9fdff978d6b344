"""Logs: lines, event files as TensorBoard reads them, norms by group."""

from __future__ import annotations

import io
import json
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import toy_training as toy
from PIL import Image
from tensorboardX.proto import event_pb2

from idlora_jax import media, norms, records
from idlora_jax.records import Sampled


def read(path: pathlib.Path) -> list[Any]:
    """The events of a file: records of length, checksum, data, checksum."""
    data, at, out = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        out.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
        at += 16 + length
    return out


def scalars(events: list[Any]) -> dict[tuple[int, str], float]:
    return {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}


def test_both_logs_hold_the_same_numbers_and_what_is_not_finite(tmp_path: pathlib.Path):
    config = toy.run_in(tmp_path).config
    log = tmp_path / "log.jsonl"
    with records.opened(config, log, 0) as out:
        out.write(300, {"loss": 0.5, "grad_norm/audio_ff": float("nan")})
    line = {"step": 300, "loss": 0.5, "grad_norm/audio_ff": None}
    assert [json.loads(line) for line in log.read_text().splitlines()] == [line]
    (path,) = (tmp_path / records.FOLDER).iterdir()
    found = scalars(read(path))
    assert found[300, "loss"] == 0.5
    assert np.isnan(found[300, "grad_norm/audio_ff"])


def test_a_run_that_goes_on_voids_what_came_after_its_state(tmp_path: pathlib.Path):
    config = toy.run_in(tmp_path).config
    for first in (0, 4):
        with records.opened(config, tmp_path / "log.jsonl", first) as out:
            out.write(first + 1, {"loss": 1.0})
    files = [read(path) for path in (tmp_path / records.FOLDER).iterdir()]
    starts = [e.step for events in files for e in events if e.session_log.status]
    assert starts == [5]
    found = [scalars(events) for events in files]
    assert {step for one in found for step, _ in one} == {1, 5}


def test_what_was_before_the_first_step_is_voided_by_a_new_start(
    tmp_path: pathlib.Path,
):
    config = toy.run_in(tmp_path).config
    for _ in range(2):
        with records.opened(config, tmp_path / "log.jsonl", 0) as out:
            out.write(0, {"heldout/loss": 1.0})
    files = [read(path) for path in sorted((tmp_path / records.FOLDER).iterdir())]
    # An event of this kind drops what came at its step and after, in earlier files.
    starts = [[e.step for e in events if e.session_log.status] for events in files]
    assert starts == [[], [0]]


def test_tensorboard_gets_the_sheet_and_the_sound_of_a_clip(tmp_path: pathlib.Path):
    rng = np.random.default_rng(0)
    sheet = rng.integers(0, 255, (20, 30, 3), np.uint8)
    wave = rng.uniform(-0.5, 0.5, (2, 2400)).astype(np.float32)
    files = {kind: tmp_path / f"anna.{kind}" for kind in ("png", "wav", "mp4")}
    media.write_png(files["png"], sheet)
    media.write_wav(files["wav"], wave, 24000)
    files["mp4"].write_bytes(b"stays here")
    log = tmp_path / "log.jsonl"
    with records.opened(toy.run_in(tmp_path).config, log, 0) as out:
        out.show(7, Sampled("samples/anna", files))
        out.show(7, Sampled("samples/mute", {"png": files["png"]}))
    assert not log.exists()
    (path,) = (tmp_path / records.FOLDER).iterdir()
    found = {
        value.tag: (event.step, value)
        for event in read(path)
        for value in event.summary.value
    }
    assert set(found) == {
        "samples/anna/sheet", "samples/anna/sound", "samples/mute/sheet"
    }  # fmt: skip
    step, value = found["samples/anna/sheet"]
    shown = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
    assert step == 7
    np.testing.assert_array_equal(shown, sheet)
    audio = found["samples/anna/sound"][1].audio
    heard, rate = soundfile.read(io.BytesIO(audio.encoded_audio_string))
    assert (rate, audio.num_channels, audio.length_frames) == (24000, 2, 2400)
    np.testing.assert_allclose(heard.T, wave, atol=1e-4)
    assert b"stays here" not in path.read_bytes()


def test_without_tensorboard_there_is_no_folder(tmp_path: pathlib.Path):
    config = toy.run_in(tmp_path, tensorboard=False).config
    with records.opened(config, tmp_path / "log.jsonl", 0) as out:
        out.write(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_tokens_are_those_of_targets_and_references():
    assert records.tokens(toy.batch(0)) == 2 * (2 * 2 * 1 + 5 + 3)
    assert records.peak_bytes() > 10**6


def test_an_adapters_norm_is_that_of_the_change_it_makes():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 3, 4))
    pair = {"kernel": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}
    one = {"blocks": {"audio": {"ff": {"up": pair, "down": pair}}}}
    found = norms.of_change(one, "n")
    assert [*found] == ["n/audio_ff"]
    want = np.sqrt(2 * np.sum((a @ b) ** 2))
    assert float(found["n/audio_ff"]) == pytest.approx(want, rel=1e-5)


def test_groups_add_up_to_the_whole_norm():
    tree = {"blocks": {"audio": {"ff": {"x": jnp.ones(3)}}}, "out": {"y": jnp.ones(6)}}
    found = norms.of_tree(tree, "grad_norm")
    assert set(found) == {"grad_norm/audio_ff", "grad_norm/out"}
    assert sum(float(v) ** 2 for v in found.values()) == pytest.approx(9)

"""Media -> latents with the tiny model: what is written, left out, left alone."""

import functools
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from idlora_jax import commandline, geometry, media, prompts
from idlora_jax.data import latents, layout, preprocess, synthetic
from idlora_jax.model import video_vae

FRAMES, SIDE = 9, 32
SOUNDS = geometry.audio_grid(FRAMES, 25).frames


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    size = {"frames": FRAMES, "height": SIDE, "width": SIDE}
    synthetic.write_corpus(folder, speakers=2, clips_per_speaker=3, **size)
    made = synthetic.clip(0, 0, 9, **size)
    wave, silence = made.wave, np.zeros_like(made.wave)
    late = np.concatenate([silence, wave], axis=1)
    write = media.write_video
    write(folder / "silent.mp4", made.frames, silence)
    write(folder / "late.mp4", np.repeat(made.frames, 2, axis=0), late)
    write(folder / "mute.mp4", made.frames, None)
    write(folder / "short.mp4", made.frames[:5], wave)
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    media.write_wav(folder / "blind.wav", wave, made.rate)
    return folder


@pytest.fixture(scope="module")
def encoders(tiny_model):
    return preprocess.load(options_for(Path("unused"), Path("unused"), tiny_model))


def options_for(manifest, output, tiny_model, **changes):
    base, text_encoder = tiny_model
    size = {"frames": FRAMES, "height": SIDE, "width": SIDE, "dtype": "float32"}
    return preprocess.Options(manifest, base, text_encoder, output, **size | changes)


def write_manifest(clips, *rows):
    path = clips / "chosen.jsonl"
    keys = ("video", "speaker", "caption")
    lines = (json.dumps(dict(zip(keys, (*r, "words"), strict=True))) for r in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read(folder, kind, name):
    with safe_open(layout.file_of(folder, kind, name), framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.fixture(scope="module")
def encoded(clips, encoders, tiny_model, tmp_path_factory):
    output = tmp_path_factory.mktemp("latents")
    options = options_for(clips / "metadata.jsonl", output, tiny_model)
    outcomes = preprocess.run(options, encoders)
    assert [o.state for o in outcomes] == ["written"] * 6
    return options


def test_a_clip_becomes_four_files_in_the_published_layout(encoded, encoders):
    out, name = encoded.output, "speaker1_clip2"
    video = read(out, "latents", name)
    assert video["latents"].shape == (128, 2, 1, 1)
    assert video["latents"].dtype == ml_dtypes.bfloat16
    assert [int(video[k]) for k in ("num_frames", "height", "width")] == [2, 1, 1]
    assert float(video["fps"]) == 25.0
    for kind in ("audio_latents", "reference_audio_latents"):
        sound = read(out, kind, name)
        assert sound["latents"].shape == (8, SOUNDS, 16)
        assert sound["latents"].dtype == np.float32
        assert int(sound["num_time_steps"]) == SOUNDS
    text = read(out, "conditions", name)
    length = encoders.tokenizer.length
    assert text["prompt_embeds"].shape[0] == length
    assert text["prompt_attention_mask"].shape == (length,)
    assert len(list(out.rglob("*"))) == 4 + 4 * 6


def test_training_reads_what_was_written(encoded, encoders):
    nets, params, _ = encoders
    index = latents.index(encoded.output)
    assert len(index.clips) == 6 and index.fps == 25.0
    assert (index.audio, index.reference, index.ragged) == (
        SOUNDS,
        SOUNDS,
        (False,) * 2,
    )
    batch = latents.whole(index, functools.partial(prompts.prompts, nets, params))
    assert batch.video.shape == (6, 2, 1, 1, 128)
    assert batch.audio.shape == batch.reference.shape == (6, SOUNDS, 16, 8)
    assert batch.prompt.video.shape[:2] == (6, encoders.tokenizer.length)


def test_latents_are_those_of_the_clips_frames(clips, encoded, encoders):
    frames = media.read_video(clips / "speaker0_clip1.mp4", 25, FRAMES)
    pixels = jnp.asarray(frames, jnp.float32)[None] / 127.5 - 1
    nets, params, _ = encoders
    want = video_vae.encode(nets.video_vae, params["video_vae"], pixels)[0]
    got = read(encoded.output, "latents", "speaker0_clip1")["latents"]
    np.testing.assert_allclose(
        got.astype(np.float32), np.moveaxis(want, -1, 0), rtol=0.01, atol=0.01
    )


def test_the_reference_is_the_sound_of_the_speakers_next_clip(encoded):
    for clip, following in ((0, 1), (1, 2), (2, 0)):
        ref = read(encoded.output, "reference_audio_latents", f"speaker1_clip{clip}")
        own = read(encoded.output, "audio_latents", f"speaker1_clip{following}")
        np.testing.assert_array_equal(ref["latents"], own["latents"])


def test_later_sound_changes_no_latent(clips, encoders):
    nets, params, _ = encoders
    cfg, own = nets.audio_vae, params["audio_vae"]
    grid = geometry.video_grid(FRAMES, SIDE, SIDE, 25)
    wave = media.read_audio(clips / "speaker0_clip0.mp4", 16000)
    both = np.concatenate([wave[:, : round(0.36 * 16000)], wave[:, ::-1]], axis=1)
    media.write_wav(clips / "short.wav", wave[:, : round(0.36 * 16000)], 16000)
    media.write_wav(clips / "long.wav", both, 16000)
    pair = [
        preprocess.encode_sound(cfg, own, clips / f"{name}.wav", grid)
        for name in ("short", "long")
    ]
    assert pair[0].shape == (SOUNDS, 16, 8)
    np.testing.assert_array_equal(*pair)


def test_clips_that_cannot_be_used_are_left_out_with_their_reason(
    clips, encoders, tiny_model, tmp_path
):
    bad = ["silent", "late", "mute", "short", "broken"]
    rows = [("speaker0_clip0.mp4", "a"), *((f"{name}.mp4", "a") for name in bad)]
    rows += [("blind.wav", "a"), ("gone.mp4", "a"), ("speaker0_clip2.mp4", "a")]
    rows += [("speaker1_clip0.mp4", "b"), ("mute2.mp4", "b")]
    shutil.copy(clips / "mute.mp4", clips / "mute2.mp4")
    manifest = write_manifest(clips, *rows)
    options = options_for(manifest, tmp_path, tiny_model)
    outcomes = preprocess.run(options, encoders)
    written = [o.name for o in outcomes if o.state == "written"]
    assert written == ["speaker0_clip0", "speaker0_clip2"]
    reasons = {o.name: o.reason for o in outcomes}
    for name, reason in {
        "silent": "silent audio",
        "late": "silent in its first 0.36 s",
        "mute": "no audio stream",
        "short": "0.20 s of sound",
        "broken": "damaged",
        "blind": "no video stream",
        "gone": "no such file",
        "speaker1_clip0": "no other clip of b has sound",
    }.items():
        assert reason in reasons[name], reasons[name]
    names = {path.stem for path in tmp_path.rglob("*.safetensors")}
    assert names == set(written)
    text = preprocess.summary(outcomes, options.output)
    assert "wrote 2 of 11 clips, left out 9:" in text and "mute: " in text


def test_existing_clips_are_left_alone_unless_of_another_size(
    encoded, encoders, tmp_path, tiny_model
):
    folder = tmp_path / "latents"
    shutil.copytree(encoded.output, folder)
    layout.file_of(folder, "conditions", "speaker0_clip0").unlink()
    damaged = layout.file_of(folder, "latents", "speaker1_clip1")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    again = options_for(encoded.manifest, folder, tiny_model, skip_existing=True)
    written = {o.name for o in preprocess.run(again, encoders) if o.state != "existing"}
    assert written == {"speaker0_clip0", "speaker1_clip1"}
    for path in encoded.output.rglob("*.safetensors"):
        copy = folder / path.relative_to(encoded.output)
        assert copy.read_bytes() == path.read_bytes()
    shorter = options_for(
        encoded.manifest, folder, tiny_model, skip_existing=True, frames=1
    )
    before = preprocess._encode_video._cache_size()
    assert all(o.state == "written" for o in preprocess.run(shorter, encoders))
    assert preprocess._encode_video._cache_size() == before + 1


def test_a_full_disk_stops_with_one_message_and_no_visible_clip(
    encoded, encoders, tmp_path, tiny_model, monkeypatch
):
    real = preprocess.tensorfile.write

    def full(path, entries, metadata):
        if "audio_latents" in str(path):
            raise OSError(28, "could not write: no space left")
        return real(path, entries, metadata)

    monkeypatch.setattr(preprocess.tensorfile, "write", full)
    options = options_for(encoded.manifest, tmp_path, tiny_model)
    with pytest.raises(OSError, match="no space"):
        preprocess.run(options, encoders)
    assert not (tmp_path / "latents").exists()
    assert not list(tmp_path.rglob("*.tmp*"))


def arguments(clips, tiny_model, *more):
    base, text_encoder = tiny_model
    return [
        *("--manifest", f"{clips}/chosen.jsonl", "--base", str(base)),
        *("--text-encoder", str(text_encoder), "--output", f"{clips}/out"),
        *("--height", "32", "--width", "32", *more),
    ]


def status(argv):
    with pytest.raises(SystemExit) as ended:
        commandline.guarded(lambda: preprocess.main(argv))
    return ended.value.code


def test_the_status_tells_success_from_failure_from_wrong_usage(
    clips, tiny_model, capsys
):
    both = [("speaker0_clip0.mp4", "a"), ("speaker0_clip1.mp4", "a")]
    write_manifest(clips, *both)
    good = arguments(clips, tiny_model, "--frames", "9", "--dtype", "float32")
    assert status(good) == 0
    assert "wrote 2 of 2 clips" in capsys.readouterr().out
    write_manifest(clips, *both, ("mute.mp4", "a"))
    assert status([*good, "--skip-existing"]) == 1
    assert "2 were there already, left out 1" in capsys.readouterr().out
    assert status(arguments(clips, tiny_model, "--frames", "10")) == 2
    assert "frames must be 8k+1, got 10 (use 9)" in capsys.readouterr().err
    assert status(arguments(clips, tiny_model, "--framse", "9")) == 2
    assert "--frames" in capsys.readouterr().err
    assert status([*good, "--text-encoder", str(clips)]) == 1
    assert "error: " in capsys.readouterr().err

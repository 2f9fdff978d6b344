"""Media -> latents with the tiny model: what is written, left out, left alone."""

import functools
import gc
import json
import os
import shutil
import signal
import weakref
from pathlib import Path

import bad_clips
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from bad_clips import FRAMES, SIDE, SIZE, write_list
from safetensors import safe_open

from idlora_jax import commandline, geometry, media, prompts
from idlora_jax.data import corpus, encode, latents, layout, preprocess, synthetic
from idlora_jax.model import video_vae

SOUNDS = geometry.audio_grid(FRAMES, 25).frames


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two speakers' clips and their list; for buckets, wide ones and a long one."""
    folder = tmp_path_factory.mktemp("clips")
    synthetic.write_corpus(folder, speakers=2, clips_per_speaker=3, **SIZE)
    bad_clips.write(folder)
    for name, size in {
        "wide": {**SIZE, "width": 64},
        "long": {**SIZE, "frames": 27},
    }.items():
        made = synthetic.clip(0, 1, 9, **size)
        media.write_video(folder / f"{name}.mp4", made.frames, made.wave)
    media.write_wav(folder / "voice.wav", made.wave, made.rate)
    return folder


@pytest.fixture(scope="module")
def encoders(tiny_model):
    return preprocess.load(options_for(Path("unused"), Path("unused"), tiny_model))


def options_for(manifest, output, tiny_model, **changes):
    base, text_encoder = tiny_model
    size = {**SIZE, "dtype": "float32"}
    return preprocess.Options(manifest, base, text_encoder, output, **size | changes)


def row(video, speaker="a", caption="words", **more):
    return {"video": video, "speaker": speaker, "caption": caption, **more}


GOOD = [row("speaker0_clip0.mp4"), row("speaker0_clip2.mp4")]


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
    found = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert len(found) == 4 + 4 * 6 + 1 and "report.json" in found


def test_training_reads_what_was_written(encoded, encoders):
    nets, params, _ = encoders
    index = latents.index(encoded.output)
    assert len(index.clips) == 6 and index.fps == 25.0
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


def test_neither_later_sound_nor_padding_changes_a_latent(clips, encoders):
    nets, params, _ = encoders
    cfg, own = nets.audio_vae, params["audio_vae"]
    grid = geometry.video_grid(FRAMES, SIDE, SIDE, 25)
    wave = media.read_audio(clips / "speaker0_clip0.mp4", 16000)[:, : 16 * 360]
    both = np.concatenate([wave, wave[:, ::-1]], axis=1)
    pair = [
        encode.encode_wave(cfg, own, encode.wave(clips, w, 16000, grid))
        for w in (wave, both)
    ]
    assert pair[0].shape == (SOUNDS, 16, 8)
    np.testing.assert_array_equal(*pair)
    short = encode.wave(clips, wave[:, : 16 * 200], 16000, grid, whole=False)
    assert short.latents == 5 and short.samples.shape == wave.shape
    np.testing.assert_array_equal(encode.encode_wave(cfg, own, short)[:4], pair[0][:4])


def test_every_kind_of_bad_clip_is_left_out_with_its_reason(
    clips, encoders, tiny_model, tmp_path
):
    rows = [GOOD[0], *bad_clips.rows(), row("voice.wav"), GOOD[1]]
    rows += [row("speaker1_clip0.mp4", "b"), row("mute2.mp4", "b")]
    rows += [row("speaker1_clip1.mp4", "alone")]
    rows += [row("speaker1_clip2.mp4", "c", reference="no.wav")]
    shutil.copy(clips / "silent.mp4", clips / "mute2.mp4")
    manifest = write_list(clips / "bad.jsonl", *rows)
    options = options_for(manifest, tmp_path, tiny_model)
    outcomes = preprocess.run(options, encoders)
    found = {o.name: (o.kind, o.reason) for o in outcomes if o.state == "rejected"}
    expected = bad_clips.BAD | {
        "voice": ("no video", "no video stream"),
        "speaker1_clip0": ("no reference", "no other clip of b has sound"),
        "mute2": ("silent", "silent audio"),
        "speaker1_clip1": ("no reference", "no other clip of alone can be"),
        "speaker1_clip2": ("no reference", "got no file"),
    }
    for name, (kind, words) in expected.items():
        assert found[name][0] == kind and words in found[name][1], found[name]
    written = {o.name for o in outcomes if o.state == "written"}
    assert found.keys() == expected.keys()
    assert written == {"speaker0_clip0", "speaker0_clip2"}
    assert {path.stem for path in tmp_path.rglob("*.safetensors")} == written
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["clips"] == {"written": 2, "existing": 0, "rejected": 16}
    assert report["rejected"] | {"silent": 3, "no reference": 3} == report["rejected"]
    assert sum(report["rejected"].values()) == 16
    text = preprocess.summary(outcomes, options.output)
    assert "wrote 2 of 18 clips, left out 16" in text
    assert "left out: no audio" in text and "mute: " in text


def test_each_bucket_is_a_folder_that_trains(clips, encoders, tiny_model, tmp_path):
    rows = [row(f"{name}.mp4") for name in ("speaker0_clip0", "wide", "long")]
    manifest = write_list(clips / "sizes.jsonl", *rows)
    options = options_for(
        manifest, tmp_path, tiny_model, buckets="32x32x9,32x64x9,32x32x25"
    )
    outcomes = preprocess.run(options, encoders)
    sizes = {o.name: str(o.bucket) for o in outcomes}
    assert sizes == {
        "speaker0_clip0": "32x32x9",
        "wide": "32x64x9",
        "long": "32x32x25",
    }
    nets, params, _ = encoders
    connect = functools.partial(prompts.prompts, nets, params)
    for name, size in sizes.items():
        index = latents.index(tmp_path / size)
        assert [clip.name for clip in index.clips] == [name]
        height, width, frames = map(int, size.split("x"))
        shape = (1, (frames + 7) // 8, height // 32, width // 32, 128)
        assert latents.whole(index, connect).video.shape == shape
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["buckets"]["32x32x25"] == {"written": 1, "existing": 0, "seconds": 1}


def test_segments_refer_to_each_other_where_there_is_no_other_file(
    clips, encoders, tiny_model, tmp_path
):
    manifest = write_list(clips / "parts.jsonl", row("long.mp4"))
    options = options_for(manifest, tmp_path, tiny_model, segments=5)
    outcomes = preprocess.run(options, encoders)
    pairs = {o.name: o.reference for o in outcomes}
    assert pairs == {"long": "long.s2", "long.s2": "long.s3", "long.s3": "long"}
    frames = media.read_video(clips / "long.mp4", 25, 27)[9:18]
    nets, params, _ = encoders
    want = encode.encode_video(nets.video_vae, params["video_vae"], frames)
    got = read(tmp_path, "latents", "long.s2")["latents"].astype(np.float32)
    np.testing.assert_allclose(got, np.moveaxis(want, -1, 0), rtol=0.01, atol=0.01)
    parts = (read(tmp_path, "audio_latents", n)["latents"] for n in pairs)
    first, second, third = parts
    assert np.abs(first - second).max() > 0.01 < np.abs(third - second).max()


def test_a_clip_may_refer_to_another_part_of_itself_or_to_a_named_file(
    clips, encoders, tiny_model, tmp_path
):
    rows = [row("long.mp4"), row("wide.mp4", "b", reference="voice.wav")]
    rows += [row("speaker0_clip0.mp4", "c")]
    manifest = write_list(clips / "own.jsonl", *rows)
    options = options_for(manifest, tmp_path, tiny_model, self_reference=True)
    outcomes = {o.name: o for o in preprocess.run(options, encoders)}
    assert outcomes["long"].reference == "long.mp4 from 0.36 s"
    assert outcomes["wide"].reference == "voice.wav from 0.00 s"
    assert "has no other 0.36 s itself" in outcomes["speaker0_clip0"].reason
    nets, params, _ = encoders
    recorded = media.read_audio(clips / "long.mp4", 16000)
    grid = geometry.video_grid(FRAMES, SIDE, SIDE, 25)
    wave = encode.wave(clips, recorded, 16000, grid, start_s=0.36)
    want = encode.encode_wave(nets.audio_vae, params["audio_vae"], wave)
    got = read(tmp_path, "reference_audio_latents", "long")["latents"]
    np.testing.assert_array_equal(got, np.moveaxis(want, -1, 0))
    again = preprocess.run(
        options_for(
            manifest, tmp_path, tiny_model, self_reference=True, skip_existing=True
        ),
        encoders,
    )
    assert [o.state for o in again].count("existing") == 2


def test_the_voice_hook_cleans_references_and_nothing_else(
    clips, encoders, tiny_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("cleaner.py").write_text("def half(wave, rate):\n    return wave / 2\n")
    manifest = write_list(clips / "hook.jsonl", *GOOD)
    plain = options_for(manifest, tmp_path / "plain", tiny_model)
    preprocess.run(plain, encoders)
    hooked = options_for(
        manifest, tmp_path / "hooked", tiny_model, voice_hook="cleaner:half"
    )
    preprocess.run(hooked, encoders)
    name = "speaker0_clip0"
    for kind, same in (("audio_latents", True), ("reference_audio_latents", False)):
        pair = [read(o.output, kind, name)["latents"] for o in (plain, hooked)]
        assert np.array_equal(*pair) == same
    wrong = options_for(manifest, tmp_path / "no", tiny_model, voice_hook="cleaner:no")
    with pytest.raises(ValueError, match="voice hook: got 'cleaner:no'"):
        preprocess.run(wrong, encoders)


def test_existing_clips_are_left_alone_unless_made_from_something_else(
    encoded, encoders, tmp_path, tiny_model
):
    folder = tmp_path / "latents"
    shutil.copytree(encoded.output, folder)
    layout.file_of(folder, "conditions", "speaker0_clip0").unlink()
    damaged = layout.file_of(folder, "latents", "speaker1_clip1")
    damaged.write_bytes(damaged.read_bytes()[:-100])

    def states(**changes):
        options = options_for(
            encoded.manifest, folder, tiny_model, skip_existing=True, **changes
        )
        found = preprocess.run(options, encoders)
        return {o.name for o in found if o.state == "written"}

    assert states() == {"speaker0_clip0", "speaker1_clip1"}
    for path in encoded.output.rglob("*.safetensors"):
        copy = folder / path.relative_to(encoded.output)
        assert copy.read_bytes() == path.read_bytes()
    assert states() == set()
    assert len(states(seed=1)) == 6
    before = encode._encode_video._cache_size()
    assert len(states(frames=1)) == 6
    assert encode._encode_video._cache_size() == before + 1


def test_another_caption_or_another_file_of_the_same_name_is_encoded_again(
    clips, encoders, tiny_model, tmp_path
):
    for n, name in enumerate("ab"):
        shutil.copy(clips / f"speaker0_clip{n}.mp4", tmp_path / f"{name}.mp4")
    rows = [row("a.mp4"), row("b.mp4")]
    manifest = write_list(tmp_path / "list.jsonl", *rows)
    output = tmp_path / "out"
    options = options_for(manifest, output, tiny_model, skip_existing=True)
    preprocess.run(options, encoders)
    before = {p: p.read_bytes() for p in output.rglob("*.safetensors")}
    write_list(manifest, rows[0], row("b.mp4", caption="other words"))
    states = {o.name: o.state for o in preprocess.run(options, encoders)}
    assert states == {"a": "existing", "b": "written"}
    changed = {p for p, data in before.items() if p.read_bytes() != data}
    assert changed == {layout.file_of(output, "conditions", "b")}
    shutil.copy(clips / "speaker1_clip0.mp4", tmp_path / "b.mp4")
    assert {o.state for o in preprocess.run(options, encoders)} == {"written"}
    assert not (output / ".captions").exists() and not (output / ".work").exists()


def test_samples_that_the_list_no_longer_has_are_told(
    encoded, encoders, tiny_model, tmp_path, clips
):
    folder = tmp_path / "latents"
    shutil.copytree(encoded.output, folder)
    rows = [row(f"speaker0_clip{n}.mp4") for n in range(2)]
    manifest = write_list(clips / "fewer.jsonl", *rows)
    options = options_for(manifest, folder, tiny_model)
    result = preprocess.process(options, encoders)
    assert result.strangers == (
        "speaker0_clip2",
        *(f"speaker1_clip{n}" for n in range(3)),
    )
    text = preprocess.summary(result.outcomes, folder, result.strangers)
    assert "4 samples in the folder are none of these clips" in text


def test_a_full_disk_stops_with_one_message_and_no_visible_clip(
    encoded, encoders, tmp_path, tiny_model, monkeypatch
):
    real = encode.tensorfile.write

    def full(path, entries, metadata):
        if "latents" in Path(path).stem:
            raise OSError(28, "could not write: no space left")
        return real(path, entries, metadata)

    monkeypatch.setattr(encode.tensorfile, "write", full)
    options = options_for(encoded.manifest, tmp_path, tiny_model)
    with pytest.raises(OSError, match="no space"):
        preprocess.run(options, encoders)
    assert not any((tmp_path / kind).exists() for kind in layout.FOLDERS)
    assert not (tmp_path / ".work").exists() and not list(tmp_path.rglob("*.tmp*"))


def test_an_interrupt_leaves_finished_clips_and_the_next_run_goes_on(
    encoded, encoders, tiny_model, tmp_path, monkeypatch
):
    real, seen = corpus.samples.write, []

    def interrupted(place, cut, made):
        seen.append(cut.name)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        real(place, cut, made)

    monkeypatch.setattr(corpus.samples, "write", interrupted)
    options = options_for(encoded.manifest, tmp_path, tiny_model)
    result = preprocess.process(options, encoders)
    assert result.signal == signal.SIGINT
    assert [o.name for o in result.outcomes] == seen and len(seen) == 2
    assert [c.name for c in latents.index(tmp_path).clips] == sorted(seen)
    assert json.loads((tmp_path / "report.json").read_text())["stopped"]
    assert len(list((tmp_path / ".captions").iterdir())) == 6
    monkeypatch.undo()
    monkeypatch.setattr(encode.prompts, "features", None)
    again = options_for(encoded.manifest, tmp_path, tiny_model, skip_existing=True)
    states = [o.state for o in preprocess.run(again, encoders)]
    assert states.count("existing") == 2 and states.count("written") == 4
    for path in encoded.output.rglob("*.safetensors"):
        copy = tmp_path / path.relative_to(encoded.output)
        assert copy.read_bytes() == path.read_bytes()


def test_equal_captions_are_encoded_once_and_the_text_encoder_is_gone_by_then(
    clips, tiny_model, tmp_path, monkeypatch
):
    real_load, real_features = preprocess.load, encode.prompts.features
    loaded, alive, texts = [], [], []

    def load(options, names):
        loaded.append(tuple(names))
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        made = real_load(options, names)
        for leaf in jax.tree.leaves(made.params.get("text_encoder", {})):
            alive.append(weakref.ref(leaf))
        return made

    def features(nets, params, tokenizer, captions):
        texts.extend(captions)
        return real_features(nets, params, tokenizer, captions)

    monkeypatch.setattr(preprocess, "load", load)
    monkeypatch.setattr(encode.prompts, "features", features)
    manifest = write_list(clips / "same.jsonl", *GOOD, row("speaker0_clip1.mp4"))
    options = options_for(manifest, tmp_path, tiny_model)
    assert {o.state for o in preprocess.run(options)} == {"written"}
    assert texts == ["words"] and alive
    assert loaded == [(), preprocess.TEXT_SIDE, preprocess.MEDIA_SIDE]
    again = options_for(manifest, tmp_path, tiny_model, skip_existing=True)
    assert {o.state for o in preprocess.run(again)} == {"existing"}
    assert loaded[3:] == [()]


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
    write_list(clips / "chosen.jsonl", *GOOD)
    good = arguments(clips, tiny_model, "--frames", "9", "--dtype", "float32")
    assert status(good) == 0
    assert "wrote 2 of 2 clips" in capsys.readouterr().out
    write_list(clips / "chosen.jsonl", *GOOD, row("mute.mp4"))
    assert status([*good, "--skip-existing"]) == 0
    assert "2 were there already, left out 1" in capsys.readouterr().out
    assert status([*good, "--skip-existing", "--strict"]) == 1
    write_list(clips / "chosen.jsonl", row("mute.mp4"))
    assert status(good) == 1
    capsys.readouterr()
    for wrong, said in {
        ("--frames", "10"): "frames must be 8k+1, got 10 (use 9)",
        ("--buckets", "32x32"): "buckets: got '32x32', expected HEIGHTxWIDTHxFRAMES",
        ("--workers", "0"): "expected",
        ("--framse", "9"): "--frames",
    }.items():
        assert status(arguments(clips, tiny_model, *wrong)) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert status([*good, "--text-encoder", str(clips)]) == 1
    assert "error: " in capsys.readouterr().err


def test_validating_prints_what_is_there_and_fails_on_what_is_wrong(
    encoded, tmp_path, capsys
):
    assert status(["--validate", str(encoded.output)]) == 0
    text = capsys.readouterr().out
    assert "pairs: 6" in text and "frames per second: 25" in text
    assert "tokens: " in text and text.endswith("sound\n")
    for size in ("32x32x9", "32x64x9"):
        shutil.copytree(encoded.output, tmp_path / size)
    layout.file_of(tmp_path / "32x64x9", "audio_latents", "speaker0_clip0").unlink()
    assert status(["--validate", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert text.count("nothing is broken") == 1
    assert "speaker0_clip0: missing in audio_latents" in text
    assert status([f"--validate={tmp_path / 'none'}"]) == 1
    assert "no such folder" in capsys.readouterr().err

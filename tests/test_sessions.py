"""Many samples: what is made, skipped and reported, and what is left behind."""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sample_files import arguments, config, run

from idlora_jax import (
    batches,
    finished,
    geometry,
    jobs,
    keys,
    media,
    memory,
    pipeline,
    previews,
    prompt_cache,
    sampling,
    sessions,
    trajectories,
)
from idlora_jax.pipeline import Media, Seen
from idlora_jax.sample_config import Guidance
from idlora_jax.types import AV
from idlora_jax.weights import io, networks

OFF = Guidance(video_cfg=1.0, audio_cfg=1.0, identity=0.0, stg=0.0, bimodal=1.0)


@pytest.fixture(scope="module")
def loaded(files, tmp_path_factory):
    """What every test would read again; the same prompt stands for all texts."""
    c = config(files, tmp_path_factory.mktemp("loaded"))
    found = jobs.opened(c)
    (prompt, _) = sampling.texts([c], found.nets).values()
    return found, sampling.load(c, found.nets), prompt


@pytest.fixture
def quick(monkeypatch, loaded):
    """Instead of sampling: noise of the key, and two steps to watch. Sizes of runs."""
    sizes: list[int] = []
    found, params, prompt = loaded
    monkeypatch.setattr(jobs, "opened", lambda _: found)
    monkeypatch.setattr(sampling, "load", lambda *_: params)
    monkeypatch.setattr(
        prompt_cache,
        "encoded",
        lambda c, nets, texts, *_, **__: dict.fromkeys(texts, prompt),
    )

    def instead(plan, nets, base, adapters, request, key, *, layout, watch, **_):
        count = len(key)
        assert {len(leaf) for leaf in jax.tree.leaves(request)} == {count}
        sizes.append(count)
        grid = layout.video
        shapes = AV((*geometry.latent_shape(grid), 128), (layout.audio.frames, 16, 8))
        latents = AV(*(keys.normal(key, (count, *shape)) for shape in shapes))
        for step in (1, 2) if watch else ():
            watch(Seen("one_stage", step, 2, 1 - step / 2, latents, latents))
        size = count, grid.frames, grid.height // 8, grid.width // 8, 3
        video = 40 * np.asarray(keys.normal(key, size)) + 128
        video = video.clip(0, 255).astype(np.uint8).repeat(8, 2).repeat(8, 3)
        samples = round(grid.frames * nets.vocoder.sample_rate / grid.fps)
        return Media(video, 0.1 * keys.normal(key, (count, 2, samples)), latents)

    monkeypatch.setattr(pipeline, "run", instead)
    return sizes


def several(
    files: Any, output: pathlib.Path, entries: list[Any], **changes: Any
) -> Any:
    path = output.parent / "prompts.json"
    path.write_text(json.dumps(entries))
    return batches.read(config(files, output, prompts_file=path, **changes))


def made(configs: Any, watch: Any = None) -> tuple[sessions.Session, dict[str, Any]]:
    session = sessions.prepare(configs)
    outcomes = [*session.outcomes, *sessions.make(session, watch)]
    return session, {outcome.config.name: outcome for outcome in outcomes}


def states(found: dict[str, Any]) -> dict[str, str]:
    return {name: outcome.state for name, outcome in found.items()}


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


THREE = [{"output_name": name} for name in "abc"]


def test_each_sample_is_what_it_is_alone_and_has_its_own_seed(quick, files, tmp_path):
    configs = several(files, tmp_path / "out", THREE, batch=2)
    assert [c.seed for c in configs] == [42, 43, 44]
    _, found = made(configs)
    assert states(found) == dict.fromkeys("abc", "written")
    assert quick == [2, 1]
    films = {n: media.read_video(o.paths[0]) for n, o in found.items()}
    alone = dataclasses.replace(configs[1], name="alone", batch=1)
    (path, *_) = made([alone])[1]["alone"].paths
    np.testing.assert_array_equal(media.read_video(path), films["b"])
    assert np.abs(films["a"].astype(int) - films["b"]).mean() > 10
    entry = json.loads((tmp_path / "out/b.json").read_text())
    assert (entry["settings"]["seed"], entry["settings"]["name"]) == (43, "b")


def test_samples_of_other_shapes_pass_alone(quick, files, tmp_path):
    entries = [
        *({"output_name": "a"}, {"output_name": "b", "frames": 17}),
        *({"output_name": "c"}, {"output_name": "d", "height": 32}),
    ]
    _, found = made(several(files, tmp_path / "out", entries, batch=4))
    assert states(found) == dict.fromkeys("abcd", "written")
    assert quick == [2, 1, 1]


@pytest.mark.slow
def test_samples_in_a_batch_have_the_numbers_they_have_alone(loaded, files, tmp_path):
    changes = {"guidance": OFF, "steps": 1, "reference_audio": (), "first_frame": None}
    configs = several(files, tmp_path / "out", THREE[:2], **changes)
    found, params, prompt = loaded
    texts = {text: prompt for c in configs for text in (c.prompt, c.negative_prompt)}
    checked = [jobs.check(c, found) for c in configs]
    asked = [sampling.request(*each, params, texts) for each in checked]
    pair = [job for job, _ in checked]
    both = sampling.run(pair, checked[0][1], asked, params)
    for n, job in enumerate(pair):
        alone = sampling.run([job], checked[n][1], [asked[n]], params)
        one, same = sampling.single(job, both, n), sampling.single(job, alone)
        for a, b in zip(one.latents, same.latents, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
        np.testing.assert_allclose(one.wave, same.wave, rtol=0, atol=1e-5)
        assert np.abs(one.video.astype(int) - same.video).max() <= 1


def test_a_failing_sample_is_reported_and_the_others_go_on(
    quick, monkeypatch, capsys, files, tmp_path
):
    entries = [
        {"output_name": "a"},
        {"output_name": "b", "first_frame_path": "none.png"},
        {"output_name": "c"},
        {"output_name": "d", "promt": "x"},
    ]
    path, output = tmp_path / "prompts.json", tmp_path / "out"
    path.write_text(json.dumps(entries))
    line = [*arguments(config(files, output)), "--prompts-file", str(path)]
    assert run(monkeypatch, *line) == 1
    out, err = capsys.readouterr()
    assert "failed: b: read_image: none.png: got no such file" in err
    assert "3 written, 1 failed, 0 skipped" in err and "6/6" in err
    assert "warning: a: " in err and "ignoring key 'promt'" in err
    assert f"{output}/a.mp4" in out.split() and "Traceback" not in err
    assert not any(name.startswith("b.") for name in names(output))


def test_numbers_that_are_none_and_full_devices_end_one_sample_only(
    quick, monkeypatch, files, tmp_path
):
    usual = pipeline.run

    def bad(*args: Any, **options: Any) -> Media:
        result = usual(*args, **options)
        if len(quick) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out\nof memory")
        if len(quick) == 2:
            return result._replace(latents=AV(result.latents.video * jnp.nan, None))
        return result

    monkeypatch.setattr(pipeline, "run", bad)
    _, found = made(several(files, tmp_path / "out", THREE))
    assert states(found) == {"a": "failed", "b": "failed", "c": "written"}
    assert found["a"].message == "RESOURCE_EXHAUSTED: out"
    assert "video latents that are NaN or infinite" in found["b"].message


def test_the_only_sample_s_mistake_is_an_error(files, tmp_path):
    c = config(files, tmp_path, first_frame=tmp_path / "none.png")
    with pytest.raises(ValueError, match="got no such file"):
        sessions.prepare([c])


def test_an_input_is_not_written_over_and_that_is_said_at_once(quick, files, tmp_path):
    face = tmp_path / "sample.png"
    media.write_png(face, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"sample.png: got an input's name"):
        sessions.prepare([config(files, tmp_path, first_frame=face)])
    assert quick == []


def test_finished_samples_are_skipped_and_what_is_lacking_is_made(
    quick, monkeypatch, files, tmp_path
):
    output = tmp_path / "out"
    configs = several(files, output, THREE)
    made(configs)
    (output / "b.wav").unlink()
    (output / "c.mp4").write_bytes(b"half")
    session, found = made(configs)
    assert states(found) == {"a": "skipped", "b": "written", "c": "written"}
    assert session.steps == 4
    monkeypatch.setattr(io, "read_all", None)
    _, found = made(configs)
    assert states(found) == dict.fromkeys("abc", "skipped")


def test_files_may_move_and_ways_may_change_without_making_a_sample_again(
    quick, files, tmp_path
):
    output = tmp_path / "out"
    usual = config(files, output)
    made([usual])
    moved = tmp_path / "moved.png"
    moved.write_bytes(files["first_frame"].read_bytes())
    other = {"first_frame": moved, "branches": "batch", "batch": 2, "progress": False}
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    other["output_dir"] = tmp_path / "elsewhere"
    _, found = made([dataclasses.replace(usual, **other)])
    assert states(found) == {"sample": "skipped"}


CHANGES = {
    "seed": ({"seed": 1}, r"made with seed 42, now it is 1;"),
    "scale": ({"guidance": OFF}, r"made with guidance.video_cfg 3.0, now it is 1.0"),
    "strength": ({"lora_strength": (0.5,)}, r"made with lora.0.strength .1.0., now"),
    "picture": ({"first_frame": None}, r"made with inputs.first_frame .* is null"),
    "recordings": ({"reference_audio": ()}, r"with inputs.reference_audio .* is null"),
    "steps and seed": ({"steps": 3, "seed": 1}, r" and 1 more; .*--overwrite"),
}


def test_a_finished_sample_of_other_settings_is_not_replaced_unasked(
    quick, files, tmp_path
):
    usual = config(files, tmp_path)
    made([usual])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for change, message in CHANGES.values():
        with pytest.raises(ValueError, match=message):
            sessions.prepare([dataclasses.replace(usual, **change)])
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    changed = dataclasses.replace(usual, seed=1, overwrite=True)
    assert states(made([changed])[1]) == {"sample": "written"}
    changed = dataclasses.replace(changed, overwrite=False)
    assert states(made([changed])[1]) == {"sample": "skipped"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "[" * 100_000])
def test_a_json_of_others_is_not_replaced_unasked(text, quick, files, tmp_path):
    (tmp_path / "sample.json").write_text(text)
    with pytest.raises(ValueError, match=r"sample.json: got a file that is no record"):
        sessions.prepare([config(files, tmp_path)])


def test_a_record_does_not_name_files_elsewhere(quick, files, tmp_path):
    usual = config(files, tmp_path / "out")
    made([usual])
    path = tmp_path / "out/sample.json"
    entry = json.loads(path.read_text())
    (tmp_path / "x").write_text("outside")
    entry["files"]["../x"] = {"bytes": 7}
    path.write_text(json.dumps(entry))
    assert not finished.is_finished(sampling.check(usual)[0])


def test_ctrl_c_leaves_what_is_finished_and_the_same_command_goes_on(
    quick, monkeypatch, capsys, files, tmp_path
):
    output, path = tmp_path / "out", tmp_path / "prompts.json"
    path.write_text(json.dumps(THREE))
    line = [*arguments(config(files, output)), "--prompts-file", str(path)]
    usual = pipeline.run

    def pressed(*args: Any, **options: Any) -> Media:
        if len(quick) == 1:
            raise KeyboardInterrupt
        return usual(*args, **options)

    monkeypatch.setattr(pipeline, "run", pressed)
    assert run(monkeypatch, *line) == 130
    err = capsys.readouterr().err
    assert f"interrupted: 1 of 3 samples are finished, in {output}; the same" in err
    assert names(output) == {f"a.{kind}" for kind in ("mp4", "wav", "png", "json")}
    monkeypatch.setattr(pipeline, "run", usual)
    assert run(monkeypatch, *line) == 0
    err = capsys.readouterr().err
    assert "2 written, 0 failed, 1 skipped" in err and "skipped: a: " in err
    assert len(names(output)) == 12


def test_ctrl_c_while_files_are_written_leaves_none_of_them(
    quick, monkeypatch, files, tmp_path
):
    def pressed(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(media, "write_wav", pressed)
    with pytest.raises(KeyboardInterrupt):
        made([config(files, tmp_path / "out")])
    assert not names(tmp_path / "out")


def test_the_text_encoder_is_gone_before_the_transformer_is_read(
    monkeypatch, files, tmp_path
):
    """The networks are read, for all samples at once; the transformer need not run."""
    monkeypatch.setattr(pipeline, "run", None)
    held: list[weakref.ref[Any]] = []
    usual, asked = networks.load, []

    def watched(base: Any, parts: Any, **options: Any) -> Any:
        gc.collect()
        assert not any(reference() is not None for reference in held)
        nets, params = usual(base, parts, **options)
        asked.extend(parts)
        if "text_encoder" in params:
            held.extend(map(weakref.ref, jax.tree.leaves(params)))
        return nets, params

    monkeypatch.setattr(networks, "load", watched)
    session = sessions.prepare(several(files, tmp_path / "out", THREE))
    with pytest.raises(TypeError):
        next(sessions.make(session))
    assert len(held) > 10
    assert asked == ["text_encoder", "text_connector", *sampling.MEDIA_SIDE]


def test_a_sample_may_go_on_from_one_made_before_it(quick, files, tmp_path):
    entries: list[dict[str, Any]] = [
        {"output_name": "a"},
        {"output_name": "b", "continue_from": "a"},
        {"output_name": "c", "continue_from": "b"},
    ]
    output = tmp_path / "out"
    configs = several(files, output, entries, batch=3, overlap=1)
    _, found = made(configs)
    assert states(found) == dict.fromkeys("abc", "written") and quick == [1, 1, 1]
    lengths = [len(media.read_video(output / f"{name}.mp4")) for name in "abc"]
    assert lengths == [9, 8, 8]
    record = json.loads((output / "c.json").read_text())
    assert [*record["inputs"]] == ["reference_audio", "continue_from"]
    session = sessions.prepare(
        [dataclasses.replace(c, overwrite=True) for c in configs]
    )
    assert {name for name, _ in session.warnings} == {"a"}
    said: list[str] = []
    list(sessions.make(session, note=said.append))
    assert {line.partition(":")[0] for line in said} == {"b", "c"}
    assert states(made(configs)[1]) == dict.fromkeys("abc", "skipped")
    entries[0]["seed"] = 1
    _, found = made(several(files, output, entries, overlap=1))
    assert states(found) == dict.fromkeys("abc", "failed")
    assert found["b"].message == "continue_from: a failed"


def test_previews_and_steps_are_kept_where_they_are_asked_for(
    quick, monkeypatch, files, tmp_path
):
    grey = previews.LinearMap(np.zeros((128, 3)), np.zeros(3), 0.0)
    monkeypatch.setattr(previews, "fit", lambda *_: grey)
    changes = {"preview": 1, "save_trajectory": True, "batch": 2}
    configs = several(files, tmp_path / "out", THREE[:2], **changes)
    made(configs)
    kept = names(tmp_path / "out")
    assert {"a.preview.png", "b.preview.png"} < kept
    steps = [trajectories.read(finished.trajectory(c)) for c in configs]
    assert [t.facts["settings"]["seed"] for t in steps] == [42, 43]
    last = [t.parts[0].latents.video[-1] for t in steps]
    assert np.abs(last[0] - last[1]).max() > 0.1
    assert states(made(configs)[1]) == dict.fromkeys("ab", "skipped")
    finished.trajectory(configs[0]).unlink()
    assert states(made(configs)[1]) == {"a": "written", "b": "skipped"}


@pytest.fixture
def small_device(monkeypatch):
    """A memory plan that is asked for once a shape; the wide clip does not fit."""
    asked: list[int] = []

    def plan(job, inputs, **options):
        asked.append(job.config.width)
        assert options["encodes"] and options["text_length"] == 128
        return memory.MemoryPlan("a plan", (memory.Phase("decode", (), asked[-1]),))

    monkeypatch.setattr(memory, "for_job", plan)
    monkeypatch.setattr(memory, "limit", lambda: 40)
    monkeypatch.setattr(memory, "helps", lambda *_, **__: iter(()))
    return asked


def test_samples_that_do_not_fit_into_the_device_are_not_begun(
    quick, small_device, files, tmp_path
):
    entries = [
        *({"output_name": "a"}, {"output_name": "b", "width": 64}),
        *({"output_name": "c", "width": 64}, {"output_name": "d"}),
    ]
    configs = several(files, tmp_path / "out", entries, memory="check")
    session = sessions.prepare(configs)
    assert [o.config.name for o in session.outcomes] == ["b", "c"]
    assert all("memory: 'decode' needs" in o.message for o in session.outcomes)
    assert small_device == [32, 64] and len(session.memory) == 2
    session = sessions.prepare([dataclasses.replace(c, memory="warn") for c in configs])
    assert len(session.todo) == 4
    assert [n for n, line in session.warnings if "memory" in line] == ["b"]


def test_texts_that_the_cache_has_need_no_text_encoder(loaded, files, tmp_path):
    cache = {"use_text_cache": True, "text_cache": tmp_path / "cache"}
    c, nets = config(files, tmp_path, **cache), loaded[0].nets
    lacking = lambda c: prompt_cache.lacking(c, nets, [c.prompt, c.negative_prompt])
    assert lacking(c) == [c.prompt, c.negative_prompt]
    sampling.texts([c], nets)
    assert lacking(c) == []
    assert lacking(dataclasses.replace(c, prompt="new")) == ["new"]
    assert len(lacking(dataclasses.replace(c, use_text_cache=False))) == 2

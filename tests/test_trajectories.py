"""Trajectories: every step of a sample, kept, written, read and gone on from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_transformer import GRID, SOUND, draw, prompt

from idlora_jax import denoise, geometry, pipeline, plans, trajectories
from idlora_jax.pipeline import Request, Seen
from idlora_jax.trajectories import Recorder
from idlora_jax.types import AV, Layout, each

CFG, STEPS = small.config("2.0"), 4
LAYOUT = Layout(GRID, SOUND)
STAGE = plans.one_stage(
    steps=STEPS, identity=0, stg=0, bimodal=1, video_cfg=1, audio_cfg=1
).stages[0]
REQUEST = Request((prompt("2.0"),), None, draw(21, 1, 1, 2, 1, 128))


def sample(**options: Any) -> AV:
    args = (STAGE, CFG, {"params": small.base("2.0")}, REQUEST, jax.random.key(0))
    return pipeline.sample(*args, layout=LAYOUT, **options)


@pytest.fixture(scope="module")
def run() -> tuple[Recorder, AV]:
    recorder = Recorder()
    return recorder, sample(watch=recorder)


def same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def toy(step: int, stage: str = "generate", steps: int = 2, audio: bool = True) -> Seen:
    """A step of two samples, all values step or 100 + step."""
    video = np.full((2, 1, 2, 2, 3), step, np.float32)
    video[1] += 100
    sound = np.full((2, 5, 4, 2), step, np.float32) if audio else None
    latents = AV(video, sound)
    return Seen(
        stage, step, steps, 1 - step / 8, latents, each(lambda x: x + 0.5, latents)
    )


def test_what_is_written_is_read_back_bit_by_bit(tmp_path: Path, run: Any):
    recorder, _ = run
    path = tmp_path / "anna.trajectory.safetensors"
    facts = {"seed": 3, "fps": 25.0}
    trajectories.save(path, recorder.steps, facts=facts)
    (part,), known = trajectories.read(path)
    assert part.stage == STAGE.name
    assert (known["seed"], known["fps"]) == (3, 25.0)
    assert set(known["library"]) == {"idlora_jax", "jax"}
    assert part.latents.video.shape == (STEPS, 2, 2, 1, 128)
    assert part.x0.audio.shape == (STEPS, 5, 16, 8)
    for n, seen in enumerate(recorder.steps):
        same(
            each(lambda x, n=n: x[n], part.latents), each(lambda x: x[0], seen.latents)
        )
        same(each(lambda x, n=n: x[n], part.x0), each(lambda x: x[0], seen.x0))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_last_latents_are_the_samples_bit_by_bit(run: Any):
    recorder, result = run
    (part,) = trajectories.parts(recorder.steps)
    same(each(lambda x: x[-1:], part.latents), each(np.asarray, result))


def test_the_noise_levels_are_those_reached(run: Any):
    recorder, _ = run
    (part,) = trajectories.parts(recorder.steps)
    sigmas = STAGE.sigmas.table(LAYOUT, "exact")
    np.testing.assert_allclose(part.sigmas, sigmas[1:], atol=1e-7)


def test_each_euler_step_lies_on_the_line_to_its_prediction(run: Any):
    """(x' - x0) / (x - x0) = sigma' / sigma wherever noise is removed."""
    (part,) = trajectories.parts(run[0].steps)
    x, x0 = part.latents.audio, part.x0.audio
    for n in range(1, STEPS):
        ratio = part.sigmas[n] / part.sigmas[n - 1]
        want = x0[n] + ratio * (x[n - 1] - x0[n])
        np.testing.assert_allclose(x[n], want, atol=2e-5 * np.abs(x).max())


@pytest.mark.parametrize("done", [1, STEPS - 1])
def test_sampling_goes_on_from_any_recorded_step(run: Any, done: int):
    recorder, _ = run
    (part,) = trajectories.parts(recorder.steps)
    clean = pipeline.start(REQUEST, LAYOUT)
    video, audio = each(lambda x: jnp.asarray(x[done - 1][None]), part.latents)
    now = AV(geometry.patchify(video), geometry.patchify_audio(audio))
    base = {"params": small.base("2.0")}
    rest = denoise.iterate(
        pipeline.denoiser(STAGE, CFG, base, clean, REQUEST.prompts, LAYOUT),
        plans.SOLVERS[STAGE.solver](),
        part.sigmas[done - 1 :],
        each(lambda s, x: s._replace(x=x), clean, now),
        weights=np.zeros((STEPS - done, 0, 2)),
    )
    got = [pipeline.finish(streams, LAYOUT) for streams, _ in rest]
    assert len(got) == STEPS - done
    for n, latents in enumerate(got, start=done):
        want = each(lambda x, n=n: x[n][None], part.latents)
        small.close(latents, want, 1e-6)


def test_stages_are_kept_apart_and_samples_too(tmp_path: Path):
    steps = [toy(1), toy(2), toy(1, "refine", 1)]
    for sample in range(2):
        path = tmp_path / f"{sample}.safetensors"
        trajectories.save(path, steps, sample=sample)
        first, second = trajectories.read(path).parts
        assert (first.stage, second.stage) == ("generate", "refine")
        np.testing.assert_array_equal(first.sigmas, [0.875, 0.75])
        levels = first.latents.video[:, 0, 0, 0, 0]
        np.testing.assert_array_equal(levels, np.array([1, 2]) + 100 * sample)
        assert second.x0.video[0, 0, 0, 0, 0] == 1.5 + 100 * sample


def test_a_clip_without_sound_has_a_trajectory_without_sound(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    trajectories.save(path, [toy(1, audio=False)])
    (part,), _ = trajectories.read(path)
    assert part.latents.audio is None and part.x0.audio is None
    assert set(load_file(path)) == {"0/sigmas", "0/latents/video", "0/x0/video"}


def test_the_recorder_keeps_copies_in_float32():
    recorder, seen = Recorder(), toy(1)
    recorder(seen)
    seen.latents.video[:] = 7
    assert recorder.steps[0].latents.video.dtype == np.float32
    assert recorder.steps[0].latents.video.max() == 101


def test_a_trajectory_without_steps_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"got no steps.*pass the recorder as watch"):
        trajectories.save(tmp_path / "a.safetensors", [])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 2, "stages": [], "facts": {}, "library": {}}',
        '{"version": 1, "stages": ["x"], "facts": {}, "library": {}}',
    ],
)
def test_another_file_is_no_trajectory(tmp_path: Path, text: str):
    path = tmp_path / "a.safetensors"
    save_file({"x": np.zeros(2)}, path, {trajectories.KEY: text})
    with pytest.raises(ValueError, match=r"a trajectory of version 1; give a file"):
        trajectories.read(path)
    save_file({"x": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="a trajectory of version 1"):
        trajectories.read(path)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="safetensors"):
        trajectories.read(path)


def test_what_is_known_is_plain_json(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    facts = {"layout": dataclasses.asdict(LAYOUT)}
    trajectories.save(path, [toy(1)], facts=facts)
    with safe_open(path, framework="numpy") as file:
        known = json.loads(file.metadata()[trajectories.KEY])
    assert known["facts"]["layout"]["video"]["fps"] == 25.0
    assert known["stages"] == ["generate"]

"""--preview and --save-trajectory: what a session writes while and after it samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from idlora_jax import previews, sampling, sessions, trajectories
from idlora_jax.pipeline import Media, Request, Seen, Watch
from idlora_jax.previews import LinearMap
from idlora_jax.sample_config import Guidance, SampleConfig
from idlora_jax.sessions import Outcome
from idlora_jax.types import AV

STEPS = 3


def latents(samples: int, step: int) -> AV:
    """Of sample n all values are 10 n + step."""
    level = 10 * np.arange(samples, dtype=np.float32) + step
    video = np.ones((1, 2, 2, 1, 2), np.float32) * level[:, None, None, None, None]
    return AV(video, np.ones((1, 9, 4, 2), np.float32) * level[:, None, None, None])


@pytest.fixture
def make(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session of two samples whose steps are numbers, and how often a map was fitted.

    Everything that needs weights is replaced; checking and watching are the real ones.
    """
    fits: list[int] = []
    watches: list[Watch | None] = []

    def run(made: Any, inputs: Any, requests: Any, params: Any, *rest: Any) -> Media:
        count, watch = len(made), rest[0]
        watches.append(watch)
        for step in range(1, STEPS + 1):
            now = latents(count, step)
            if watch is not None:
                watch(Seen("one_stage", step, STEPS, 1 - step / STEPS, now, now))
        return Media(None, np.zeros((count, 2, 9)), latents(count, STEPS))

    def fit(*args: Any) -> LinearMap:
        fits.append(1)
        return LinearMap(np.zeros((2, 3)), np.zeros(3), 0.5)

    monkeypatch.setattr(sampling, "texts", lambda *_: {})
    monkeypatch.setattr(sampling, "load", lambda *_: {"video_vae": {}})
    monkeypatch.setattr(sampling, "request", lambda *_: Request(()))
    monkeypatch.setattr(sampling, "run", run)
    monkeypatch.setattr(sessions, "write", lambda *_: [])
    monkeypatch.setattr(previews, "fit", fit)
    base, text_encoder = tiny_model

    def call(**options: Any) -> tuple[list[Outcome], list[int], list[Watch | None]]:
        given: dict[str, Any] = {"base": base, "text_encoder": text_encoder}
        given |= {"prompt": "a person", "frames": 9, "height": 64, "width": 32}
        given |= {"guidance": Guidance(stg_layer=3), "output_dir": tmp_path}
        names = ("anna", "ben")
        configs = [SampleConfig(**given, **options, name=name) for name in names]
        return [*sessions.make(sessions.prepare(configs))], fits, watches

    return call


def files(folder: Path, ending: str) -> list[str]:
    return sorted(path.name for path in folder.glob(f"*.{ending}"))


@pytest.mark.parametrize("batch", [1, 2])
def test_each_sample_gets_its_preview_and_its_trajectory(
    make: Any, tmp_path: Path, batch: int
):
    outcomes, fits, _ = make(batch=batch, preview=2, save_trajectory=True)
    assert [outcome.state for outcome in outcomes] == ["written", "written"]
    assert files(tmp_path, "preview.png") == ["anna.preview.png", "ben.preview.png"]
    assert len(fits) == 1
    for n, name in enumerate(("anna", "ben")):
        path = tmp_path / f"{name}.trajectory.safetensors"
        (part,), facts = trajectories.read(path)
        first = 10 * n if batch == 2 else 0
        levels = part.latents.video[:, 0, 0, 0, 0]
        np.testing.assert_array_equal(levels, first + np.arange(1, STEPS + 1))
        assert facts["settings"]["name"] == name
        assert facts["layouts"][0]["video"]["fps"] == 25


def test_a_preview_is_written_while_the_sample_is_made(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    steps: list[int] = []
    original = previews.Watcher.__call__

    def counted(watcher: previews.Watcher, seen: Seen) -> None:
        original(watcher, seen)
        steps.append(len(files(tmp_path, "preview.png")))

    monkeypatch.setattr(previews.Watcher, "__call__", counted)
    make(preview=2)
    assert steps == [0, 1, 1, 1, 2, 2]


def test_without_them_nothing_watches(make: Any, tmp_path: Path):
    outcomes, fits, watches = make()
    assert len(outcomes) == 2 and not fits
    assert watches == [None, None]
    assert not [*tmp_path.glob("*.p*"), *tmp_path.glob("*.safetensors")]


def test_a_trajectory_that_cannot_be_written_fails_its_sample(
    make: Any, tmp_path: Path
):
    (tmp_path / "anna.trajectory.safetensors").mkdir()
    outcomes, *_ = make(save_trajectory=True)
    assert [outcome.state for outcome in outcomes] == ["failed", "written"]
    assert "anna.trajectory" in outcomes[0].message

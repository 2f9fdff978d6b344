"""Clips sampled while training goes on: as `sample.py` makes them, harming nothing."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import latent_folder
import numpy as np
import pytest
import sample_files

from idlora_jax import (
    adapters,
    fitting,
    media,
    optimizers,
    outputs,
    sampling,
    sessions,
    training,
    validation,
)
from idlora_jax.experiment import Ema, HeldOut, Lora, TrainConfig
from idlora_jax.model import transformer
from idlora_jax.monitoring import Samples
from idlora_jax.pipeline import Media, Request
from idlora_jax.presets import tiny_train
from idlora_jax.sample_config import SampleConfig
from idlora_jax.sessions import Loaded
from idlora_jax.settings import Guidance
from idlora_jax.training import TrainState
from idlora_jax.types import AV
from idlora_jax.weights import io

IDENTITY = Guidance(video_cfg=1.0, audio_cfg=1.0, identity=3.0, stg=0.0, bimodal=1.0)
TARGETS = ("blocks/audio/ff/*", "blocks/video/cross_attn/out")
LAST, ENDS = "lora_weights_step_00002", ("", "_ema")
MEDIA = ("wav", "png")


def clip(files: dict[str, Any], **changes: Any) -> SampleConfig:
    """Two steps of 9 frames, with identity guidance alone."""
    options = {"guidance": IDENTITY, "name": "anna"} | changes
    made = sample_files.config(files, pathlib.Path("elsewhere"), **options)
    return dataclasses.replace(made, lora=changes.get("lora", ()))


@pytest.fixture(scope="module")
def bare(files: Any, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two steps with a moving average, without samples."""
    folder = tmp_path_factory.mktemp("training")
    return dataclasses.replace(
        tiny_train(),
        base=files["base"],
        data=latent_folder.write(folder / "clips", 4, text=(128, 48)),
        output=folder / "bare",
        lora=Lora(rank=8, alpha=8.0, targets=TARGETS),
        steps=2,
        save_every=1,
        validate_every=1,
        batch_size=1,
        ema=Ema(0.5),
        heldout=HeldOut(clips=2, sigmas=(0.25, 0.75)),
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The runs of this file share what is compiled."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs")
    values = (str(tmp_path_factory.mktemp("compiled")), 0)
    settings = {f"jax_{name}": value for name, value in zip(names, values, strict=True)}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def fit(config: TrainConfig) -> None:
    fitting.fit(fitting.plan(config), lambda line: None)


def back(config: TrainConfig, output: pathlib.Path) -> TrainConfig:
    """A copy of a run that was killed after the state of its first step."""
    shutil.copytree(config.output, output)
    shutil.rmtree(output / "state/2")
    for path in output.glob("lora_weights_step_00002*"):
        path.unlink()
    return dataclasses.replace(config, output=output, resume=True)


class Made(NamedTuple):
    """A run that was resumed and samples now, how the transformer was traced, and the
    pictures of its films: of the first step, then of the second, each as trained and as
    averaged."""

    config: TrainConfig
    modes: list[Any]
    films: list[np.ndarray]


def watched(patch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The pictures that encoders are given from now on."""
    films: list[np.ndarray] = []
    original = media.write_video

    def write_video(path: Any, frames: np.ndarray, *args: Any, **options: Any) -> None:
        films.append(frames.copy())
        original(path, frames, *args, **options)

    patch.setattr(media, "write_video", write_video)
    return films


@pytest.fixture(scope="module")
def made(bare: TrainConfig, files: Any) -> Made:
    fit(bare)
    samples = Samples(every=1, ema=True, clips=(clip(files),))
    config = back(bare, bare.output.with_name("sampled"))
    config = dataclasses.replace(config, samples=samples)
    modes: list[Any] = []
    original = transformer.apply

    def counted(*args: Any, **options: Any) -> Any:
        modes.append(options.get("mode"))
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "apply", counted)
        films = watched(patch)
        fit(config)
    return Made(config, modes, films)


def of(config: TrainConfig, step: int, kind: str, end: str = "") -> pathlib.Path:
    return config.output / f"samples/step_{step:05d}{end}/anna.{kind}"


def adapters_of(config: TrainConfig) -> list[bytes]:
    names = [f"{LAST}{end}.safetensors" for end in ENDS]
    return [(config.output / name).read_bytes() for name in names]


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    text = (config.output / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def heldout(config: TrainConfig) -> list[dict[str, Any]]:
    return [row for row in rows(config) if "heldout/loss" in row]


@pytest.mark.parametrize("end", ENDS)
def test_a_clip_is_bit_by_bit_what_sample_py_makes_of_the_exported_adapter(
    made: Made, files: Any, tmp_path: pathlib.Path, monkeypatch: Any, end: str
):
    adapter = made.config.output / f"{LAST}{end}.safetensors"
    asked = clip(files, lora=(adapter,), output_dir=tmp_path)
    films = watched(monkeypatch)
    (outcome,) = sessions.make(sessions.prepare([asked]))
    assert outcome.state == "written"
    np.testing.assert_array_equal(films[0], made.films[-2:][ENDS.index(end)])
    assert (films[0] != made.films[ENDS.index(end)]).any()
    for kind in MEDIA:
        now = (tmp_path / f"anna.{kind}").read_bytes()
        assert now == of(made.config, 2, kind, end).read_bytes(), kind
        assert now != of(made.config, 1, kind, end).read_bytes(), kind
    now, then = tmp_path / "anna.mp4", of(made.config, 2, "mp4", end)
    assert media.probe(now) == media.probe(then)
    # Its record says so, too: there is nothing to do.
    there = of(made.config, 2, "json", end).parent
    (outcome,) = sessions.prepare(
        [dataclasses.replace(asked, output_dir=there)]
    ).outcomes
    assert outcome.state == "skipped"


def test_all_clips_pass_one_compiled_sampler(made: Made):
    # Traced without a mode: the evaluation and the training step.
    assert sorted(map(str, made.modes)) == ["None", "None", "sweep"]


def test_training_gives_what_it_gives_without_samples(made: Made, bare: TrainConfig):
    assert not (bare.output / "samples").exists()
    assert adapters_of(made.config) == adapters_of(bare)
    # The curve of the resumed run goes on as if nothing had happened.
    assert heldout(made.config) == heldout(bare)


def test_the_log_tells_losses_effects_and_samples(made: Made):
    held = heldout(made.config)
    assert [row["step"] for row in held] == [0, 1, 2]
    for name in ("video", "audio"):
        effects = [row[f"heldout/adapter_effect_{name}"] for row in held]
        assert effects[0] == 0 < effects[1] < effects[2]
        assert held[2][f"heldout/ema_adapter_effect_{name}"] < effects[2]
    told = [row for row in rows(made.config) if "samples/written" in row]
    assert [row["step"] for row in told] == [1, 2]
    assert {row["samples/written"] for row in told} == {2}
    assert {row["samples/failed"] for row in told} == {0}


def test_a_resumed_run_samples_what_is_lacking_and_nothing_twice(
    made: Made, tmp_path: pathlib.Path
):
    again = back(made.config, tmp_path / "again")
    before = of(again, 2, "mp4").stat().st_mtime_ns
    # As if killed while the average of step 1 was sampled.
    of(again, 1, "json", "_ema").unlink()
    half = of(again, 1, "json", "_ema").parent / f"{outputs.TEMPORARY}x"
    half.mkdir()
    fit(again)
    assert not half.exists()
    assert of(again, 2, "mp4").stat().st_mtime_ns == before
    assert of(again, 1, "json", "_ema").is_file()
    assert adapters_of(again) == adapters_of(made.config)
    assert heldout(again) == heldout(made.config)


def with_clips(bare: TrainConfig, output: pathlib.Path, *clips: Any) -> TrainConfig:
    samples = Samples(every=1, clips=clips)
    return dataclasses.replace(bare, output=output, samples=samples)


WRONG = {
    "recording": (
        {"reference_audio": (pathlib.Path("none.wav"),)},
        "samples: anna: read_audio: none.wav: got no such file",
    ),
    "picture": (
        {"first_frame": pathlib.Path("none.png")},
        "samples: anna: read_image: none.png: got no such file",
    ),
    "prompt": ({"prompt": " "}, "samples: anna: prompt: got none"),
    "text encoder": (
        {"text_encoder": pathlib.Path("nowhere")},
        "samples: .*nowhere",
    ),
    "adapter": (
        {"lora": (pathlib.Path("none.safetensors"),)},
        "samples: weights: none.safetensors: got no such file",
    ),
    "layer": (
        {"guidance": Guidance(stg_layer=29)},
        "samples: anna: .*29",
    ),
    "prompts": (
        {"prompts_file": pathlib.Path("none.jsonl")},
        "prompts_file: none.jsonl: got no such file",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_before_weights_are_read(
    no_weights: None, bare: TrainConfig, files: Any, tmp_path: pathlib.Path, name: str
):
    change, message = WRONG[name]
    config = with_clips(bare, tmp_path / "out", clip(files, **change))
    with pytest.raises(ValueError, match=message):
        fitting.plan(config)
    assert not config.output.exists()


def test_a_number_of_frames_that_cannot_be_is_refused_by_its_entry(
    no_weights: None, bare: TrainConfig, files: Any, tmp_path: pathlib.Path
):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "x", "frames": 10}))
    config = with_clips(bare, tmp_path / "out", clip(files, prompts_file=path))
    with pytest.raises(ValueError, match=r"entry 0: frames: got 10, expected 8k\+1"):
        fitting.plan(config)


def test_clips_share_all_but_what_is_their_own(
    bare: TrainConfig, files: Any, tmp_path: pathlib.Path
):
    anna = clip(files)
    twice = with_clips(bare, tmp_path, anna, anna)
    with pytest.raises(ValueError, match="several of the name 'anna'"):
        fitting.plan(twice)
    other = with_clips(bare, tmp_path, anna, clip(files, name="ben", steps=3))
    with pytest.raises(ValueError, match="got steps 2 and 3, expected one for all"):
        fitting.plan(other)
    own = clip(files, name="ben", seed=1, frames=17, height=32, prompt="other")
    plan = fitting.plan(with_clips(bare, tmp_path, anna, own))
    assert plan.samples is not None
    assert [c.name for c in plan.samples.configs] == ["anna", "ben"]


def test_a_configuration_and_a_prompts_file_say_what_is_sampled(
    no_weights: None, bare: TrainConfig, files: Any, tmp_path: pathlib.Path
):
    for number, name in enumerate(("face.png", "ref.wav")):
        given = (files["first_frame"], *files["reference_audio"])[number]
        shutil.copy(given, tmp_path / name)
    entry = {"first_frame": "face.png", "reference_path": "ref.wav", "promt": ""}
    entries = [entry | {"output_name": name, "prompt": name} for name in "ab"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    samples = Samples(
        every=1,
        config=sample_files.CONFIG,
        prompts_file=prompts,
        text_encoder=files["text_encoder"],
    )
    config = dataclasses.replace(bare, output=tmp_path / "out", samples=samples)
    plan = fitting.plan(config)
    assert plan.samples is not None
    assert not config.output.exists()
    a, b = plan.samples.configs
    assert (a.name, a.prompt, a.seed, b.seed) == ("a", "a", 42, 43)
    assert a.first_frame == tmp_path / "face.png"
    # What training decides is not the file's.
    assert (a.base, a.dtype, a.text_encoder) == (
        bare.base, bare.dtype, files["text_encoder"]
    )  # fmt: skip
    assert a.guidance == dataclasses.replace(a.guidance, stg_layer=3)
    lines = [line for _, line in plan.samples.warnings]
    assert any("ignoring key 'promt'" in line for line in lines)
    assert any("the prompt has no" in line for line in lines)


def test_a_configuration_that_is_none_is_refused(
    bare: TrainConfig, tmp_path: pathlib.Path
):
    for path, message in (
        (tmp_path / "none.py", "samples.config: no such file"),
        (sample_files.ROOT / "configs/tiny.py", "samples.config: .* returns TrainC"),
    ):
        samples = Samples(every=1, config=path)
        with pytest.raises(ValueError, match=message):
            fitting.plan(dataclasses.replace(bare, samples=samples, output=tmp_path))


class Quick(NamedTuple):
    """A sampler of clips that are noise of their seed, and a state to give it."""

    sampler: validation.Sampler
    state: TrainState
    runs: list[str]


@pytest.fixture
def quick(
    bare: TrainConfig, files: Any, tmp_path: pathlib.Path, monkeypatch: Any
) -> Quick:
    """Without networks: what `sampling.run` gives is replaced, the rest is real."""
    names: list[str] = []

    def instead(made: Any, *_: Any) -> Media:
        (job,) = made
        names.append(job.config.name)
        rng = np.random.default_rng(job.config.seed)
        video = rng.integers(0, 255, (1, 9, 64, 32, 3), np.uint8)
        wave = rng.normal(0, 0.1, (1, 2, 8640)).astype(np.float32)
        latents = AV(np.zeros((1, 2, 2, 1, 128)), np.zeros((1, 9, 16, 8)))
        return Media(video, wave, latents)

    monkeypatch.setattr(sampling, "request", lambda *_: Request(()))
    monkeypatch.setattr(sampling, "run", instead)
    clips = clip(files), clip(files, name="ben", seed=1)
    plan = fitting.plan(with_clips(bare, tmp_path / "out", *clips))
    assert plan.samples is not None
    shapes = io.shapes(io.open_base(bare.base), "transformer")
    tree = adapters.init(jax.random.key(0), shapes, bare.lora.rank_of, TARGETS)
    tx = optimizers.make_optimizer(bare.optimizer, bare.steps)
    state = training.init(tree, {}, tx)
    sampler = validation.sampler(plan.samples, Loaded({}, {}), lambda _: {})
    return Quick(sampler, state, names)


def test_clips_are_made_where_they_are_due(quick: Quick):
    found = [*quick.sampler(0, quick.state)]
    assert [clip.name for clip in found] == ["samples/anna", "samples/ben"]
    assert {path.suffix for path in found[0].files.values()} == {
        ".mp4", ".wav", ".png", ".json"
    }  # fmt: skip
    assert found[0].files["mp4"].parent.name == "step_00000"
    assert all(clip.new and not clip.message for clip in found)
    again = [*quick.sampler(0, quick.state)]
    assert [clip.new for clip in again] == [False, False]
    assert [clip.files for clip in again] == [clip.files for clip in found]
    assert quick.runs == ["anna", "ben"]


def test_a_clip_of_another_adapter_is_made_again(quick: Quick):
    (first, _) = quick.sampler(1, quick.state)
    one = json.loads(first.files["json"].read_text())["adapters"][0]
    moved = jax.tree.map(lambda x: x + 1, quick.state.adapter)
    (other, _) = quick.sampler(1, quick.state._replace(adapter=moved))
    two = json.loads(other.files["json"].read_text())["adapters"][0]
    assert other.new and one["content_hash"] != two["content_hash"]
    assert (two["step"], two["strength"]) == (0, [1.0])


def test_a_device_without_memory_costs_one_clip_alone(quick: Quick, monkeypatch: Any):
    usual = sampling.run

    def full(made: Any, *args: Any) -> Media:
        if made[0].config.name == "anna":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out\nof memory")
        return usual(made, *args)

    monkeypatch.setattr(sampling, "run", full)
    bad, good = quick.sampler(1, quick.state)
    assert (bad.name, bad.message) == ("samples/anna", "RESOURCE_EXHAUSTED: out")
    assert not bad.files and good.files


def test_a_device_without_room_for_the_decoders_is_told(quick: Quick):
    def full(_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out\nof memory")

    (told,) = dataclasses.replace(quick.sampler, transformer=full)(1, quick.state)
    assert told.message == "RESOURCE_EXHAUSTED: out"


def test_a_recording_that_is_gone_is_told(quick: Quick, tmp_path: pathlib.Path):
    planned = quick.sampler.planned
    gone = dataclasses.replace(
        planned.configs[0], reference_audio=(tmp_path / "gone.wav",)
    )
    alone = dataclasses.replace(planned, configs=(gone,))
    sampler = dataclasses.replace(quick.sampler, planned=alone)
    (told,) = sampler(1, quick.state)
    assert "gone.wav: got no such file" in told.message


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(
    quick: Quick, monkeypatch: Any
):
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(media, "write_wav", full)
    with pytest.raises(OSError, match=r"step_00001 \(No space.* go on with --resume"):
        [*quick.sampler(1, quick.state)]
    folder = quick.sampler.planned.run.config.output / "samples/step_00001"
    assert [*folder.iterdir()] == []

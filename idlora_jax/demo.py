"""The whole path on a tiny model: media -> latents -> adapter -> sampled clip.

    checkpoint/   a tiny LTX-2 in the real file formats, random weights
    clips/        16 synthetic talking heads (4 speakers) and their manifest
    latents/      the clips as training reads them
    train/        the adapter, the training state, the log
    sample/       a clip with the voice and face of a clip kept out of training
    contact_sheet.png

Every step is what the command of the same name runs on real weights; only the model is
small. Its weights are random, so that the sampled clip is noise.

    python -m idlora_jax.demo --output outputs/demo --steps 60
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from jaxtyping import UInt8
from tqdm import tqdm

from idlora_jax import commandline, fitting, media, presets, sampling, tiny
from idlora_jax.data import manifest as manifests
from idlora_jax.data import preprocess, synthetic
from idlora_jax.data.preprocess import Outcome
from idlora_jax.experiment import TrainConfig
from idlora_jax.sample_config import SampleConfig

CLIPS, SHEET, MARK = "clips", "contact_sheet.png", ".idlora_demo"
MADE = (presets.CHECKPOINT, CLIPS, presets.LATENTS, presets.TRAIN, presets.SAMPLE)
SPEAKERS, CLIPS_EACH = 4, 4
FRAMES, SIDE = 17, 64
COLUMNS = 6
"""Frames of a clip in the contact sheet."""

NOISE = "The model's weights are random, so the sampled clip is noise."


@dataclass(frozen=True)
class Options:
    """Run the whole path on a tiny model with random weights.

    Attributes:
        output: folder for everything; what an earlier demo left there is replaced.
        steps: training steps.
        seed: of the model and the clips.
    """

    output: Path = Path("outputs/demo")
    steps: int = presets.tiny_train().steps
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the number of steps before the work that comes first."""
        dataclasses.replace(presets.tiny_train(), steps=self.steps)


class Given(NamedTuple):
    """What the sample starts from: files made of a clip, and its caption."""

    clip: str
    reference_audio: Path
    first_frame: Path
    prompt: str


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Print what is done, then how long it took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


def fresh(folder: Path) -> None:
    """Make the folder, or empty it of what an earlier demo wrote.

    Raises:
        ValueError: if it holds anything and was not made by the demo.
    """
    mark = folder / MARK
    if folder.exists() and not mark.is_file():
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(
                f"--output: {folder} exists and was not made by the demo; choose "
                "another folder"
            )
    for name in MADE:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / SHEET).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def encode(options: Options, manifest: Path) -> tuple[Outcome, ...]:
    """Clips -> latents, as `python -m idlora_jax.data.preprocess` does it."""
    folder = options.output
    wanted = preprocess.Options(
        manifest=manifest,
        base=folder / presets.BASE,
        text_encoder=folder / presets.TEXT_ENCODER,
        output=folder / presets.LATENTS,
        frames=FRAMES,
        height=SIDE,
        width=SIDE,
        dtype="float32",
    )
    outcomes = preprocess.run(wanted)
    print(preprocess.summary(outcomes, wanted.output))
    return outcomes


def train(config: TrainConfig) -> tuple[fitting.Fit, fitting.Result]:
    """Latents -> adapter, as `train.py` does it; a signal ends the demo."""
    plan = fitting.plan(config)
    result = fitting.fit(plan)
    if result.signal is not None:
        raise SystemExit(128 + result.signal)
    return plan, result


def given(options: Options, name: str) -> Given:
    """Sound, first picture and caption of a clip, as files that a user would have."""
    folder = options.output / presets.SAMPLE / "given"
    video = options.output / CLIPS / f"{name}.mp4"
    wave, picture = folder / "reference.wav", folder / "first_frame.png"
    media.write_wav(wave, media.read_audio(video, 24000), 24000)
    media.write_png(picture, media.read_image(video))
    clips = manifests.read(options.output / CLIPS / "metadata.jsonl")
    caption = next(clip.caption for clip in clips if clip.name == name)
    return Given(name, wave, picture, caption)


def sample(config: SampleConfig) -> Path:
    """Adapter, voice and face -> clip, as `sample.py` does it."""
    job, inputs = sampling.check(config)
    with tqdm(total=config.steps, unit="step", disable=None) as bar:
        result, seconds = sampling.generate(job, inputs, lambda *_: bar.update())
    paths = sampling.write(job, result, seconds)
    return paths[0]


def check(path: Path, config: SampleConfig) -> str:
    """Read a sampled clip back and compare it with what was asked for.

    Returns:
        What it is, in one line.

    Raises:
        ValueError: if it is not that.
    """
    found, wanted_s = media.probe(path), config.frames / config.fps
    frames = media.read_video(path, config.fps)
    wave = media.read_audio(path, 24000)
    heard_s = wave.shape[1] / 24000
    text = (
        f"{found.video_codec} {found.width}x{found.height} {found.fps:g} fps, "
        f"{len(frames)} frames; {found.audio_codec} {found.rate} Hz, {heard_s:.2f} s"
    )
    good = (
        (found.video_codec, found.audio_codec) == ("h264", "aac")
        and (found.height, found.width) == (config.height, config.width)
        and found.fps == config.fps
        and len(frames) == config.frames
        and abs((found.video_s or 0) - wanted_s) < 0.5 / config.fps
        and abs(heard_s - wanted_s) < 0.05
    )
    if not good:
        raise ValueError(f"{path}: got {text}, expected h264, aac and {wanted_s:.2f} s")
    return text


def _few(path: Path) -> UInt8[np.ndarray, "F H W 3"]:
    frames = media.read_video(path)
    return frames[np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)]


def sheet(options: Options, names: Sequence[str], held: str, clip: Path) -> Path:
    """Training clips, the clip that gave voice and face, and the output, as a picture.

    Args:
        options: where the clips are.
        names: of training clips.
        held: of the clip that gave voice and face.
        clip: the sampled mp4.
    """
    rows = {
        f"training clip {name}": options.output / CLIPS / f"{name}.mp4"
        for name in names
    }
    rows[f"voice and first frame: {held}"] = options.output / CLIPS / f"{held}.mp4"
    rows["output: noise, since the model's weights are random"] = clip
    picture = media.contact_sheet(
        [_few(path) for path in rows.values()], [*rows], scale=2
    )
    path = options.output / SHEET
    media.write_png(path, picture)
    return path


def compared(result: fitting.Result) -> str:
    """The held-out losses before and after training, as a table."""
    assert result.before is not None and result.after is not None
    names = {"audio_loss": "audio", "video_loss": "video", "loss": "sum"}
    rows = (
        f"   {shown:<8}{result.before[name]:>9.5f}{result.after[name]:>9.5f}"
        f"{result.after[name] - result.before[name]:>+10.5f}"
        for name, shown in names.items()
    )
    head = f"   {'':<8}{'before':>9}{'after':>9}{'change':>10}"
    return "\n".join(
        ["held-out loss (fixed clips, noise and 8 noise levels)", head, *rows]
    )


def run(options: Options) -> fitting.Result:
    """Run every step.

    Returns:
        What training gave.

    Raises:
        ValueError: if the folder is not the demo's, or a step gave something wrong.
        OSError: if something cannot be written.
    """
    folder = options.output
    fresh(folder)
    with step("1/6 tiny checkpoint in the real file formats (random weights)"):
        tiny.write(folder / presets.CHECKPOINT, options.seed)
    with step(f"2/6 {SPEAKERS * CLIPS_EACH} synthetic clips of {SPEAKERS} speakers"):
        manifest = synthetic.write_corpus(
            folder / CLIPS,
            seed=options.seed,
            speakers=SPEAKERS,
            clips_per_speaker=CLIPS_EACH,
            frames=FRAMES,
            height=SIDE,
            width=SIDE,
        )
    with step("3/6 media -> latents"):
        encode(options, manifest)
    with step(f"4/6 {options.steps} training steps"):
        settings = presets.tiny_train(folder)
        plan, result = train(dataclasses.replace(settings, steps=options.steps))
    with step("5/6 a clip from the trained adapter, a voice and a first frame"):
        start = given(options, plan.held.clips[0].name)
        config = dataclasses.replace(
            presets.tiny_sample(folder),
            lora=(result.adapter,),
            reference_audio=(start.reference_audio,),
            first_frame=start.first_frame,
            prompt=start.prompt,
        )
        clip = sample(config)
        print(f"{clip}: {check(clip, config)}")
    with step("6/6 contact sheet"):
        names = [clip.name for clip in plan.clips.clips]
        trained = {name.partition("_")[0]: name for name in names}
        print(sheet(options, [*trained.values()], start.clip, clip))
    print(f"\n{compared(result)}")
    return result


def summary(folder: Path) -> str:
    """What lies where."""
    counts = {
        name: sum(path.is_file() for path in (folder / name).rglob("*"))
        for name in MADE
    }
    lines = [f"   {folder / name}: {count} files" for name, count in counts.items()]
    head, sheet = f"Everything is in {folder}:", f"   {folder / SHEET}"
    return "\n".join([head, *lines, sheet, "", NOISE])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    options = tyro.cli(Options, args=argv, prog="python -m idlora_jax.demo")
    start = time.perf_counter()
    run(options)
    print(f"\n{summary(options.output)}")
    print(f"All of it took {time.perf_counter() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    commandline.guarded(main)

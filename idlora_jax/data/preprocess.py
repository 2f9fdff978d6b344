"""Media -> latents: from clips and captions to the folder that training reads.

    frames u8 [F H W 3] --video VAE--> latents/                  [C f h w]  bfloat16
    sound f32 [2 N]     --audio VAE--> audio_latents/            [C T M]    float32
    another clip's sound --audio VAE-> reference_audio_latents/  [C T M]    float32
    caption             --Gemma tower--> conditions/             [S D]      bfloat16

One safetensors file a clip and folder, under the clip's name; with several buckets each
has a folder `<height>x<width>x<frames>` of its own. The order of work:

    manifest  the list of clips, from a folder or a table
    cuts      headers: the bucket of every clip, and where it is cut
    captions  each different one encoded once; the text encoder is let go
    samples   speaker by speaker: all sounds, then pictures, decoded by threads ahead

A clip is encoded whole before its first file appears; one that cannot be used is left
out with its reason and the others go on. The first Ctrl-C ends the run behind the clip
in hand, and `--skip-existing` goes on from there.
T is the number of audio latents that belong to the video's length: the encoder is
causal, so cutting later latents equals never having heard them.

    python -m idlora_jax.data.preprocess --manifest clips/ \
        --base ltx-2-19b-dev.safetensors --text-encoder gemma-3-12b-it --output latents/
    python -m idlora_jax.data.preprocess --validate latents/

Source: ltx_trainer scripts/process_videos.py and process_captions.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import tyro
from tqdm import tqdm

from idlora_jax import commandline, loop
from idlora_jax.data import (
    corpus,
    cuts,
    encode,
    hook,
    identity,
    manifest,
    outcomes,
    pairing,
    published,
    tokenize,
    validate,
    worklist,
)
from idlora_jax.data.cuts import Cut, Found
from idlora_jax.data.encode import Encoders
from idlora_jax.data.manifest import Clip
from idlora_jax.data.options import Options
from idlora_jax.data.outcomes import Outcome, summary
from idlora_jax.data.rejection import Rejection
from idlora_jax.data.samples import Marks, Place
from idlora_jax.data.stored import VIDEO
from idlora_jax.weights import networks

__all__ = ["Encoders", "Options", "Outcome", "load", "main", "run", "summary"]

CAPTIONS, WORK = ".captions", ".work"
TEXT_SIDE, MEDIA_SIDE = ("text_encoder", "text_connector"), ("video_vae", "audio_vae")


class Result(NamedTuple):
    """What a run did: outcomes, samples of others in its folders, what stopped it."""

    outcomes: tuple[Outcome, ...]
    strangers: tuple[str, ...] = ()
    signal: int | None = None


def load(
    options: Options, names: Sequence[str] = (*TEXT_SIDE, *MEDIA_SIDE)
) -> Encoders:
    """Read networks that preprocessing needs.

    Args:
        options: which files, and the dtype.
        names: of the networks whose parameters are read.

    Raises:
        ValueError: if a file is missing or is not what it should be.
    """
    nets, params = networks.load(
        options.base,
        names,
        text_encoder_path=options.text_encoder,
        dtype=jnp.dtype(options.dtype),
    )
    return Encoders(nets, params, tokenize.load(options.text_encoder))


class _Stopped(Exception):
    """A signal asked for the end."""


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, unit="clip", desc=what, disable=None)


def _counting(bar: Any, stop: list[int]) -> Callable[[], None]:
    """What counts a piece of work, and ends the work if a signal came."""

    def seen() -> None:
        bar.update()
        if stop:
            raise _Stopped

    return seen


def _planned(
    options: Options, clips: Sequence[Clip], stop: list[int]
) -> dict[str, Found]:
    with _bar(len(clips), "look") as bar:
        return cuts.plan(
            clips,
            options.sizes,
            options.fps,
            segments=options.segments,
            workers=options.workers,
            seen=_counting(bar, stop),
        )


def _strangers(options: Options, found: Sequence[Outcome]) -> tuple[str, ...]:
    """Samples in the folders that are none of those that this run accepted."""
    ours = {(o.bucket, o.name) for o in found if o.state != "rejected"}
    names = []
    for bucket in options.sizes:
        folder = options.folder(bucket) / VIDEO
        for path in sorted(folder.rglob("*.safetensors")):
            name = published.without_suffix(path.relative_to(folder).as_posix())
            if (bucket, name) not in ours:
                names.append(name)
    return tuple(names)


def _captions(
    options: Options,
    group: Sequence[Cut],
    marks: Marks,
    given: Encoders | None,
    stop: list[int],
) -> None:
    """Encode the captions of cuts; the text encoder is gone when this returns."""
    wanted = {marks.caption(cut.clip.caption): cut.clip.caption for cut in group}

    def read() -> Encoders:
        return load(options, TEXT_SIDE) if given is None else given

    folder = options.output / CAPTIONS
    lacking = encode.lacking(folder, wanted)
    with tqdm(total=len(lacking), unit="text", desc="captions", disable=None) as bar:
        encode.captions(folder, lacking, read, _counting(bar, stop))


def _sorted_out(
    options: Options, clips: Sequence[Clip], planned: dict[str, Found]
) -> tuple[list[Cut], list[Outcome]]:
    """The cuts of all clips, and what became of those that have none."""
    every: list[Cut] = []
    bad: list[Outcome] = []
    for clip in clips:
        found = planned[clip.name]
        if isinstance(found, Rejection):
            bad.append(outcomes.rejected(clip.name, clip.speaker, found))
        else:
            every.extend(found)
    manifest.check_names(options.manifest, [cut.name for cut in every])
    return every, bad


def _place(options: Options, encoders: Encoders) -> Place:
    text = identity.of_folder(options.text_encoder)
    marks = Marks(
        encoders.nets.base_hash,
        identity.of(text, options.dtype),
        options.voice_hook or "",
        (options.seed, options.self_reference),
    )
    return Place(
        marks,
        options.folder,
        options.output / CAPTIONS,
        options.output / WORK,
        hook.load(options.voice_hook) if options.voice_hook else None,
        options.seed,
        options.self_reference,
        options.skip_existing,
        options.workers,
    )


def _encode(
    options: Options,
    given: Encoders | None,
    place: Place,
    every: Sequence[Cut],
    stop: list[int],
) -> Generator[Outcome]:
    """Outcomes of cuts, one after the other."""
    work = worklist.work(place, [*pairing.by_speaker(every).values()])
    yield from work.done
    if not work.todo:
        return
    _captions(options, work.todo, place.marks, given, stop)
    encoders = load(options, MEDIA_SIDE) if given is None else given
    with (
        _bar(len(work.todo), "encode") as bar,
        contextlib.closing(corpus.encode_all(place, encoders, work)) as made,
    ):
        for outcome in made:
            bar.update()
            yield outcome
            if stop:
                raise _Stopped


def _all(
    options: Options, given: Encoders | None, stop: list[int]
) -> Generator[Outcome]:
    """Outcomes of all clips of the list.

    Raises:
        _Stopped: when a signal came, behind the clip in hand.
    """
    clips = manifest.read(options.manifest)
    place = _place(options, load(options, ()) if given is None else given)
    planned = _planned(options, clips, stop)
    every, bad = _sorted_out(options, clips, planned)
    yield from bad
    yield from _encode(options, given, place, every, stop)


def process(options: Options, encoders: Encoders | None = None) -> Result:
    """Encode every clip of the list that can be encoded, and write the report.

    Args:
        options: what to encode, how, and where to.
        encoders: from `load`, with all parameters; read here, one side after the other,
            if None.

    Raises:
        ValueError: if the list or the networks cannot be read, or the voice hook fails.
        OSError: if a file cannot be written.
    """
    since = time.monotonic()
    done: list[Outcome] = []
    with loop.stopping() as stop:
        try:
            for outcome in _all(options, encoders, stop):
                done.append(outcome)
        except _Stopped:
            pass
        finally:
            shutil.rmtree(options.output / WORK, ignore_errors=True)
    found = tuple(done)
    strangers = ()
    if not stop:
        shutil.rmtree(options.output / CAPTIONS, ignore_errors=True)
        strangers = _strangers(options, found)
    report = outcomes.as_json(
        found,
        dataclasses.asdict(options),
        seconds=time.monotonic() - since,
        stopped=bool(stop),
        strangers=strangers,
    )
    outcomes.write(options.output, report)
    return Result(found, strangers, stop[0] if stop else None)


def run(options: Options, encoders: Encoders | None = None) -> tuple[Outcome, ...]:
    """`process`, for callers that want the outcomes alone.

    Raises:
        KeyboardInterrupt: if a signal ended it early.
    """
    result = process(options, encoders)
    if result.signal is not None:
        raise KeyboardInterrupt
    return result.outcomes


@dataclass(frozen=True)
class Validation:
    """Read a folder of latents and say what is wrong with it.

    Attributes:
        validate: the folder; those of its buckets are found in it.
    """

    validate: Path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Returns:
        0; 1 if no clip is there in the end, or with `--strict` if one was left out, or
        if `--validate` found something wrong; 128 and the signal's number if stopped.
    """
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m idlora_jax.data.preprocess"
    if any(word.partition("=")[0] == "--validate" for word in argv):
        wanted = tyro.cli(Validation, args=argv, prog=prog)
        return 0 if validate.run(wanted.validate) else commandline.FAILURE
    options = tyro.cli(Options, args=argv, prog=prog)
    result = process(options)
    print(summary(result.outcomes, options.output, result.strangers))
    if result.signal is not None:
        print("stopped; go on with --skip-existing")
        return 128 + result.signal
    bad = [o for o in result.outcomes if o.state == "rejected"]
    failed = len(bad) == len(result.outcomes) or (options.strict and bad)
    return commandline.FAILURE if failed else 0


if __name__ == "__main__":
    commandline.guarded(main)

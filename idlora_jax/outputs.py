"""What a sample leaves behind, and what the files say of themselves.

    write(job, result) -> <name>.mp4   pictures and sound, and what made them
                          <name>.wav   the sound, uncompressed
                          <name>.png   frames above waveform and log-mel
                          <name>.json  everything about the sample; see `record`
    read_provenance(mp4) -> what the mp4 says

A sample is finished when its JSON is there: that file appears last, and an older one
goes before any file it describes is replaced. The mp4 holds hashes and versions, no
prompt and no path.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

import idlora_jax
from idlora_jax import finished, media, voices
from idlora_jax.files import PathLike, problem
from idlora_jax.jobs import Job
from idlora_jax.pipeline import Media
from idlora_jax.sound import SILENCE

LICENCE = "made by a model; the licence of the model's weights applies"
TITLE = "Synthetic clip"
KINDS = ("mp4", "wav", "png", "json")
TEMPORARY = ".sample-"
"""How folders begin in which a sample is written before it is there."""

Arrays = tuple[np.ndarray | None, np.ndarray | None]


def targets(job: Job, kinds: tuple[str, ...] = KINDS) -> list[Path]:
    """Where the files of these kinds go."""
    config = job.config
    return [config.output_dir / f"{config.name}.{kind}" for kind in kinds]


def sample_of(result: Media, sample: int = 0) -> Arrays:
    """One sample on the host: frames u8 [F H W 3] or None, sound f32 [2 N] or None.

    Raises:
        ValueError: if there is neither, or the sound is not finite.
    """
    frames = None if result.video is None else np.asarray(result.video[sample])
    wave = None if result.wave is None else np.asarray(result.wave[sample])
    if frames is None and wave is None:
        raise ValueError("write: got neither pictures nor sound, expected one of them")
    if wave is not None and not np.isfinite(wave).all():
        bad = 1 - float(np.isfinite(wave).mean())
        raise ValueError(
            f"write: got sound of which {bad:.1%} is NaN or infinite, expected finite "
            "samples; sample in float32, or with smaller guidance scales"
        )
    return frames, wave


def _finite(value: float) -> float | None:
    """JSON has no infinity: a level of minus infinity is null."""
    return round(value, 6) if math.isfinite(value) else None


def _plain(report: voices.VoiceReport) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in asdict(report).items()}


def heard(wave: np.ndarray, rate: int) -> dict[str, Any]:
    """What the sound [2 N] is like, as JSON.

    Returns:
        `rate`, `samples`, `peak` (the largest sample), `silent`, and what
        `voices.measure` says; its levels are null for pure silence.
    """
    peak = float(np.abs(wave).max(initial=0.0))
    return {
        "rate": rate,
        "samples": wave.shape[1],
        "peak": _finite(peak),
        "silent": peak < SILENCE,
        **_plain(voices.measure(wave, rate)),
    }


def _faults(audio: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with the sound, one sentence each."""
    if audio is None:
        return []
    if audio["silent"]:
        return ["the sound is silent"]
    share = audio["clipped_share"]
    if share <= voices.MOST_CLIPPED:
        return []
    return [f"{share:.1%} of the sound is clipped; lower --guidance.audio-cfg"]


def _entry(job: Job, arrays: Arrays, seconds: Mapping[str, float]) -> dict[str, Any]:
    frames, wave = arrays
    fps = job.config.fps
    video = audio = None
    if frames is not None:
        count, height, width = frames.shape[:3]
        video = {"frames": count, "fps": fps, "seconds": count / fps}
        video["size"] = [height, width]
    if wave is not None:
        audio = heard(wave, job.nets.vocoder.sample_rate)
    return {
        "synthetic": True,
        "licence": LICENCE,
        "library": {"idlora_jax": idlora_jax.__version__, "jax": jax.__version__},
        **finished.origin(job),
        "references": [{"file": n, **_plain(r)} for n, r in job.references],
        "video": video,
        "audio": audio,
        "seconds": dict(seconds),
        "warnings": [*job.warnings, *_faults(audio)],
    }


def record(
    job: Job, result: Media, seconds: Mapping[str, float], sample: int = 0
) -> dict[str, Any]:
    """Everything about a sample, as JSON: settings, hashes, sizes, levels, versions.

    Args:
        job: what it was made from.
        result: the samples.
        seconds: how long each part took.
        sample: which one of the batch.

    Raises:
        ValueError: see `sample_of`.
    """
    return _entry(job, sample_of(result, sample), seconds)


def _tags(entry: Mapping[str, Any]) -> dict[str, str]:
    """What the mp4 itself says about its origin."""
    names = ("synthetic", "library", "model", "inputs", "licence")
    kept = {name: entry[name] for name in names}
    kept["adapters"] = [adapter["content_hash"] for adapter in entry["adapters"]]
    comment = json.dumps(kept, ensure_ascii=False)
    return {"title": TITLE, "comment": comment, "copyright": LICENCE}


def _write_media(
    job: Job, arrays: Arrays, entry: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Everything but the JSON, into a folder."""
    config, rate = job.config, job.nets.vocoder.sample_rate
    frames, wave = arrays
    paths = {kind: folder / f"{config.name}.{kind}" for kind in KINDS}
    made = []
    if frames is not None:
        media.write_video(
            paths["mp4"],
            frames,
            wave,
            rate,
            fps=config.fps,
            metadata=_tags(entry) if config.provenance else None,
            crf=config.crf,
        )
        made.append(paths["mp4"])
    if wave is not None:
        media.write_wav(paths["wav"], wave, rate)
        made.append(paths["wav"])
    if config.contact_sheet:
        sheet = media.timeline(frames, wave, rate, fps=config.fps)
        media.write_png(paths["png"], sheet)
        made.append(paths["png"])
    return made


def keep_inputs(job: Job) -> None:
    """Raise if a file to write is one that the sample is made from.

    Raises:
        ValueError: naming it.
    """
    config = job.config
    given = [*config.reference_audio, *config.lora, config.first_frame]
    given += [config.continue_from, config.base, config.prompts_file]
    inputs = {path.resolve() for path in given if path is not None}
    for path in targets(job):
        if path.resolve() in inputs:
            do = "choose another --output-dir or --name"
            raise problem("write", path, "an input's name", "a new name", do)


def write(
    job: Job, result: Media, seconds: Mapping[str, float], sample: int = 0
) -> list[Path]:
    """Write a sample: `<name>.mp4`, `.wav`, `.png` (if wanted) and `.json`.

    All are complete before the first appears under its name. Without pictures there is
    no mp4, without sound no wav.

    Args:
        job: what it was made from; its configuration says where to, and how.
        result: the samples.
        seconds: how long each part took, for the record.
        sample: which one of the batch.

    Returns:
        The files, the JSON last.

    Raises:
        ValueError: see `sample_of`; for names that are those of input files.
        OSError: if they cannot be written; nothing new is left behind.
    """
    keep_inputs(job)
    arrays = sample_of(result, sample)
    entry = _entry(job, arrays, seconds)
    folder, (final,) = job.config.output_dir, targets(job, ("json",))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=TEMPORARY) as temporary:
        made = _write_media(job, arrays, entry, Path(temporary))
        entry["files"] = {path.name: {"bytes": path.stat().st_size} for path in made}
        sidecar = Path(temporary) / final.name
        text = json.dumps(entry, indent=2, ensure_ascii=False, allow_nan=False)
        # Bytes of a command line that are no text stay valid JSON this way.
        sidecar.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        final.unlink(missing_ok=True)
        for path in (*made, sidecar):
            os.replace(path, folder / path.name)
    return [*(folder / path.name for path in made), final]


def read_provenance(path: PathLike) -> dict[str, Any]:
    """What an mp4 of ours says about its origin.

    Returns:
        `synthetic` (True), `library` (versions), `model` (hashes and generation),
        `adapters` (hashes), `inputs` (hashes by role) and `licence`.

    Raises:
        ValueError: for a file that is no media file, or says nothing of the kind.
    """
    comment = media.probe(path).metadata.get("comment", "")
    try:
        found = json.loads(comment)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or "synthetic" not in found:
        got, expected = "no record of its origin", "an mp4 written by this library"
        do = "it may have been written with --no-provenance, or converted since"
        raise problem("read_provenance", path, got, expected, do)
    return found

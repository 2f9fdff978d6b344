"""Many samples from one file or folder: one `SampleConfig` for each.

A prompts file is JSON: a list of entries, {"variations": [...]}, {"samples": [...]} or
one entry; or JSONL, an entry a line. An entry is an object:

    prompt             text, or "@file"; the configuration's if absent
    negative_prompt    likewise
    reference_path     a recording, or a list of them; likewise
    first_frame_path   a picture or a video; likewise
    output_name        a file name without ending; output_0000, ... if absent
    seed               the configuration's plus the entry's number, from 0, if absent
    frames (num_frames), height, width, fps
    continue_from      a clip, or the output_name of an entry before this one

`reference_audio` and `first_frame` are other names of two of these. What an entry says
by null or "" counts as absent. Relative paths are looked for in the prompts file's
folder first, then in the working directory. Other keys are ignored, with a warning.

An input folder has a subfolder for each sample, with `prompt.txt` and, as wanted,
`negative_prompt.txt`, `first_frame.*` and `reference*.*` (several: in the order of
their names); or files of one stem, `anna.txt`, `anna.png`, `anna.wav`. Samples are in
the order of their names, which become those of the outputs.

Nothing here imports jax, so that mistakes answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from idlora_jax.experiment import require
from idlora_jax.files import PathLike, existing, problem
from idlora_jax.sample_config import SampleConfig

ALIASES = {
    "reference_path": "reference_audio",
    "first_frame_path": "first_frame",
    "output_name": "name",
    "num_frames": "frames",
}
"""Names in prompts files of settings that have other names here."""
TEXTS, PATHS = ("prompt", "negative_prompt"), ("first_frame", "continue_from")
NUMBERS: Mapping[str, tuple[type, ...]] = {
    "seed": (int,),
    "frames": (int,),
    "height": (int,),
    "width": (int,),
    "fps": (int, float),
}
KEYS = (*ALIASES, *TEXTS, *PATHS, "reference_audio", *NUMBERS)
LONGEST_TEXT, LONGEST_FILE, LONGEST_NAME = 64 * 1024, 64 * 1024**2, 200
"""Bytes of a prompt, of a prompts file, and of an output's name."""
LARGEST_SEED = 2**32 - 1
"""JAX takes a seed modulo this plus one."""
VIDEOS = frozenset(".mp4 .mov .mkv .webm .avi".split())
PICTURES = VIDEOS | frozenset(".png .jpg .jpeg .webp .bmp .tif .tiff".split())
SOUNDS = frozenset(".wav .mp3 .flac .ogg .opus .m4a .aac".split())
ENDINGS = ("mp4", "wav", "png", "json")

Warn = Callable[[str], Any]


def read(
    config: SampleConfig,
    warn: Warn = lambda line: print(f"warning: {line}", file=sys.stderr),
) -> tuple[SampleConfig, ...]:
    """One configuration per sample; that itself, without prompts file or input folder.

    Prompts of the form "@file" are replaced with the text of that file.

    Args:
        config: what all samples share, and what those that do not say otherwise get.
        warn: called with a line for each unknown key.

    Raises:
        ValueError: naming the file, the entry's number, and what is wrong: unreadable
            files, wrong values, names that are no plain file names or stand twice,
            outputs that would replace an input.
    """
    shared = dataclasses.replace(config, prompts_file=None, input_dir=None)
    shared = _with_texts(shared, Path())
    if config.prompts_file is not None:
        made = _of_file(shared, config.prompts_file, warn)
    elif config.input_dir is not None:
        made = _of_folder(shared, config.input_dir)
    else:
        return _checked((shared,), "")
    return _checked(made, f"{config.prompts_file or config.input_dir}: ")


def read_text(path: PathLike, name: str = "read_text") -> str:
    """The text of a UTF-8 file of at most 64 KiB, without space around it.

    Raises:
        ValueError: if it is missing, too large, or no such text.
    """
    expected = "a text file (UTF-8) of at most 64 KiB"
    with open(existing(name, path, expected), "rb") as file:
        data = file.read(LONGEST_TEXT + 1)
    if len(data) > LONGEST_TEXT:
        raise problem(name, path, "a larger file", expected, "shorten it")
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        do = "save it as UTF-8"
        raise problem(name, path, "other bytes", expected, do) from None


def _with_texts(config: SampleConfig, folder: Path) -> SampleConfig:
    """With what "@file" prompts stand for."""
    found = {
        name: read_text(_located(text[1:], folder), name)
        for name in TEXTS
        if (text := getattr(config, name)).startswith("@")
    }
    return dataclasses.replace(config, **found)


def _located(path: str, folder: Path) -> Path:
    """In the folder if it is there, else as it is."""
    inner = folder / path
    return inner if inner.exists() else Path(path)


def _checked(made: Sequence[SampleConfig], where: str) -> tuple[SampleConfig, ...]:
    """Raise if two samples have one name, or an output would replace an input."""
    inputs = {path.resolve() for config in made for path in _inputs(config)}
    names: dict[str, int] = {}
    for number, config in enumerate(made):
        before = names.setdefault(config.name, number)
        if before != number:
            raise ValueError(
                f"{where}entries {before} and {number} both have output_name "
                f"{config.name!r}, expected different ones; rename one"
            )
        good = 0 <= config.seed <= LARGEST_SEED
        require(good, f"{where}seed", config.seed, f"0 to {LARGEST_SEED}")
        own = {config.continue_from.resolve()} if config.continue_from else set()
        for ending in ENDINGS:
            output = config.output_dir / f"{config.name}.{ending}"
            if output.resolve() in inputs | own:
                raise ValueError(
                    f"{where}{output} would replace an input; choose another "
                    "output_dir or name"
                )
    return tuple(made)


def _inputs(config: SampleConfig) -> list[Path]:
    given = [*config.reference_audio, config.first_frame, *config.lora]
    return [path for path in given if path is not None]


def _entries(path: Path) -> list[Any]:
    """The entries of a prompts file, unchecked."""
    expected = "a prompts file (JSON or JSONL)"
    with open(existing("prompts_file", path, expected), "rb") as file:
        data = file.read(LONGEST_FILE + 1)
    if len(data) > LONGEST_FILE:
        got, do = "more than 64 MiB", "split it"
        raise problem("prompts_file", path, got, expected, do)
    try:
        text = data.decode("utf-8-sig")
        return _parsed(text, lines=path.suffix.lower() in (".jsonl", ".ndjson"))
    except (ValueError, RecursionError) as error:
        do = "check it with a JSON tool"
        raise problem("prompts_file", path, str(error), expected, do) from None


def _parsed(text: str, *, lines: bool) -> list[Any]:
    if not lines:
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            # Several values one after the other: lines, under another file ending.
            if not error.msg.startswith("Extra data"):
                raise
            return _parsed(text, lines=True)
        if isinstance(found, dict):
            found = found.get("variations", found.get("samples", [found]))
        if not isinstance(found, list):
            raise ValueError(f"{type(found).__name__} where a list of entries stands")
        return found
    out = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            out += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} that is no JSON ({error})") from None
    return out


def _of_file(config: SampleConfig, path: Path, warn: Warn) -> list[SampleConfig]:
    entries = _entries(path)
    if not entries:
        raise problem("prompts_file", path, "no entries", "at least one", "add some")
    unknown: dict[str, None] = {}
    out: list[SampleConfig] = []
    for number, entry in enumerate(entries):
        try:
            names = [made.name for made in out]
            said = _said(entry, path.parent, names, config.output_dir)
            unknown |= dict.fromkeys(key for key in entry if key not in KEYS)
            out.append(_made(config, number, said, path.parent))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: entry {number}: {error}") from None
    for key in unknown:
        near = difflib.get_close_matches(key, KEYS, 1, 0.0)
        warn(f"{path}: ignoring key {key!r}; the nearest known one is {near[0]!r}")
    return out


def _made(
    config: SampleConfig, number: int, said: Mapping[str, Any], folder: Path
) -> SampleConfig:
    """The sample of an entry."""
    name = {"name": f"output_{number:04d}", "seed": config.seed + number}
    # A clip that goes on from another has its first frames from there.
    free = {"first_frame": None} if said.get("continue_from") else {}
    made = dataclasses.replace(config, **{**name, **free, **said})
    return _with_texts(made, folder)


def _said(
    entry: Any, folder: Path, before: Sequence[str], outputs: Path
) -> dict[str, Any]:
    """What an entry sets, by the names of settings."""
    if not isinstance(entry, dict):
        raise ValueError(f"got {type(entry).__name__}, expected an object")
    out: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in KEYS or value in (None, "", []):
            continue
        name = ALIASES.get(str(key), str(key))
        if name in out:
            raise ValueError(f"got {key!r} and another name of it; give one of them")
        out[name] = _value(key, name, value, folder)
    if entry.get("continue_from") in before:
        out["continue_from"] = outputs / f"{entry['continue_from']}.mp4"
    return out


def _value(key: str, name: str, value: Any, folder: Path) -> Any:
    """A setting, checked and with its paths resolved."""
    if name in NUMBERS:
        good = isinstance(value, NUMBERS[name]) and not isinstance(value, bool)
        if not good or not abs(value) <= LARGEST_SEED:
            kind = " or ".join(kind.__name__ for kind in NUMBERS[name])
            raise ValueError(f"{key}: got {value!r:.80}, expected {kind}")
        return float(value) if name == "fps" else value
    several = isinstance(value, list) and name == "reference_audio"
    texts = [_text(key, text) for text in (value if several else [value])]
    if name == "reference_audio":
        return tuple(_located(text, folder) for text in texts)
    if name in PATHS:
        return _located(texts[0], folder)
    return _plain_name(texts[0]) if name == "name" else texts[0]


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{key}: got {value!r:.80}, expected text")
    if len(value.encode()) > LONGEST_TEXT:
        raise ValueError(f"{key}: got more than 64 KiB, expected less; shorten it")
    return value


def _plain_name(name: str) -> str:
    """The name, if it can only be a file in the output folder."""
    bad = {"/", "\\"} & {*name} or name.startswith(".") or not name.isprintable()
    if bad or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"output_name: got {name!r:.80}, expected a plain file name without folder "
            "and ending; rename it"
        )
    return name


def _of_folder(config: SampleConfig, folder: Path) -> list[SampleConfig]:
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        expected, do = "a folder of samples", "check the path"
        raise problem("input_dir", folder, got, expected, do)
    out: list[SampleConfig] = []
    for number, (name, said) in enumerate(_found(folder, config.output_dir)):
        try:
            settings = {**said, "name": _plain_name(name), "seed": config.seed + number}
            out.append(dataclasses.replace(config, **settings))
        except ValueError as error:
            raise ValueError(f"{folder}: sample {name!r}: {error}") from None
    if not out:
        expected = "subfolders with prompt.txt, or files like a.txt, a.png, a.wav"
        raise problem("input_dir", folder, "neither", expected, "see batches.py")
    return out


def _found(folder: Path, outputs: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what is set) of each sample in a folder, by name."""
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    folders = {p.name: p for p in inside if p.is_dir()}
    kept = {n: p for n, p in folders.items() if p.resolve() != outputs.resolve()}
    known = PICTURES | SOUNDS | {".txt"}
    files = [p for p in inside if p.is_file() and p.suffix.lower() in known]
    stems = {path.stem for path in files}
    for name in sorted({*kept, *stems}):
        same = [path for path in files if path.stem == name]
        if name in kept and same:
            raise ValueError(
                f"input_dir: {folder}: got a folder {name!r} and files {name}.*, "
                "expected one sample of a name; rename one"
            )
        yield name, _in_subfolder(kept[name]) if name in kept else _of_stem(same)


def _of_stem(files: Sequence[Path]) -> dict[str, Any]:
    def of(endings: frozenset[str]) -> Path | None:
        return _only([path for path in files if path.suffix.lower() in endings])

    text, picture, sound = of(frozenset({".txt"})), of(PICTURES), of(SOUNDS)
    out: dict[str, Any] = {} if text is None else {"prompt": read_text(text)}
    if picture is not None:
        out["first_frame"] = picture
    return out if sound is None else {**out, "reference_audio": (sound,)}


def _in_subfolder(folder: Path) -> dict[str, Any]:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    kind = {path: path.suffix.lower() for path in files}
    out: dict[str, Any] = {}
    for name in TEXTS:
        text = folder / f"{name}.txt"
        if text in files:
            out[name] = read_text(text)
    pictures = [path for path in files if kind[path] in PICTURES]
    picture = _only([path for path in pictures if path.stem == "first_frame"])
    heard = [path for path in files if kind[path] in SOUNDS | VIDEOS]
    sounds = tuple(path for path in heard if path.name.startswith("reference"))
    if picture is not None:
        out["first_frame"] = picture
    return {**out, "reference_audio": sounds} if sounds else out


def _only(paths: Sequence[Path]) -> Path | None:
    """The only one of these files, or None."""
    if len(paths) > 1:
        names = ", ".join(path.name for path in sorted(paths))
        raise ValueError(
            f"input_dir: {paths[0].parent}: got {names}, expected one of them; remove "
            "the others"
        )
    return paths[0] if paths else None

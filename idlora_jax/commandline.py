"""The command line: a configuration file, and typed overrides of single fields.

    python train.py --config configs/tiny.py --optimizer.learning-rate 1e-4

Nothing here imports jax, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

from idlora_jax.settings import UsageError

Config = TypeVar("Config")
USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
"""Names of dtypes by what `--dtype` of the converting scripts takes."""


def load_config(path: str | Path, kind: type[Config]) -> Config:
    """Import a configuration file and call its `get_config()`.

    Args:
        path: a Python file.
        kind: the dataclass it must return.

    Raises:
        ValueError: if there is no such file, it fails, or returns something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config: no such file {path}; see configs/")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config: {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = module.get_config()
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)]
        where = f"line {lines[-1]}, " if isinstance(error, NameError) else ""
        raise ValueError(f"{path}: {where}{type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise ValueError(
            f"{path}: get_config() returns {type(made).__name__}, expected "
            f"{kind.__name__}; is it a file for another script?"
        )
    return made


def _options(kind: type, prefix: str = "--") -> Iterator[str]:
    """The command-line names of a dataclass's fields."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        name = prefix + f.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _options(hints[f.name], name + ".")  # pyright: ignore
        else:
            yield name
            if hints[f.name] is bool:
                yield prefix + "no-" + f.name.replace("_", "-")


def _usage_error(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def _one_line(box: str) -> str:
    """The words of a framed message."""
    return " ".join(re.sub(r"[╭╮╰╯│─]|-{3,}", " ", box).split())


def _refuse(unknown: Sequence[str], kind: type) -> NoReturn:
    first = next((a for a in unknown if a.startswith("-")), None)
    if first is None:
        _usage_error(f"unexpected argument {unknown[0]}; every setting has a name")
    name = first.partition("=")[0].replace("_", "-")
    near = difflib.get_close_matches(name, [*_options(kind), "--config"], 1, 0.0)
    _usage_error(
        f"unknown option {first}; the nearest name is {near[0]} (--help lists all)"
    )


def parse(argv: Sequence[str], kind: type[Config]) -> Config:
    """`--config FILE` and typed overrides -> a configuration.

    Ends the program with status 2 and one message on wrong usage, as `--help` ends it
    with status 0.

    Args:
        argv: arguments without the program's name.
        kind: the dataclass to make.
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(list(argv))
    wants_help = "--help" in rest or "-h" in rest
    if known.config is None and not wants_help:
        _usage_error("--config FILE is missing, for example --config configs/tiny.py")
    about = (kind.__doc__ or "").partition("\n")[0]
    about += "\n\nOptions override the values of --config FILE."
    said = io.StringIO()
    try:
        default = load_config(known.config, kind) if known.config else None
        options: Any = {} if default is None else {"default": default}
        with contextlib.redirect_stderr(said):
            made, unknown = tyro.cli(
                kind, args=rest, return_unknown_args=True, description=about, **options
            )
    except ValueError as error:
        _usage_error(str(error))
    except SystemExit as end:
        if end.code:
            _usage_error(_one_line(said.getvalue()))
        raise
    if unknown:
        _refuse(unknown, kind)
    return made


def converter(
    name: str,
    about: str | None,
    *,
    source: str,
    destination: str,
    export: str | None = None,
) -> argparse.ArgumentParser:
    """The options that converting scripts share: paths, --dtype, --check, --verify.

    Args:
        name: of the script.
        about: its text.
        source: help for what is read.
        destination: help for what is made.
        export: help for --export; None: there is none.
    """
    parser = argparse.ArgumentParser(
        name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help=source)
    parser.add_argument("destination", nargs="?", help=destination)
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    way = parser.add_mutually_exclusive_group()
    if export is not None:
        way.add_argument("--export", action="store_true", help=export)
    way.add_argument("--check", action="store_true", help="read the headers, report")
    way.add_argument("--verify", action="store_true", help="read all, compare hashes")
    return parser


def converting(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Read the command line of a `converter`; wrong usage ends with status 2."""
    args = parser.parse_args(argv)
    looks = args.check or args.verify
    if looks == (args.destination is not None):
        one, two = "--check and --verify take one path", "expected two paths"
        parser.error(f"{one if looks else two}: see --help")
    if looks and args.dtype:
        parser.error("--dtype is for writing")
    return args


def status_of(work: Callable[[], int | None]) -> int:
    """Do the work of a script and give its exit status.

    Wrong input and failures end in one message on stderr and status 1, settings that
    cannot be used here in 2, Ctrl-C in 130; none in a traceback.
    """
    try:
        return work() or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def guarded(main: Callable[[], int | None]) -> NoReturn:
    """Run a script to its end; see `status_of`."""
    raise SystemExit(status_of(main))

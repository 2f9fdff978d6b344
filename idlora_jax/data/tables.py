"""Rows of a table of clips, each with the place where it stands.

    .jsonl        one object a line
    .json         one list of objects
    .csv, .tsv    one row a line under a line of column names

Values are kept as they are; a CSV file has texts. `where` is what an error names: the
file and the line on which the row begins.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from idlora_jax.files import PathLike, existing, problem

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_EXPECTED = f"a folder of clips, or a table ({', '.join(SUFFIXES)})"
_SPACE = " \t\r\n"


class Row(NamedTuple):
    """One row: file and line, and values by column."""

    where: str
    values: dict[str, Any]


def _where(path: PathLike, line: int) -> str:
    return f"{path}, line {line}"


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: got {json.dumps(value):.80}, expected an object with the texts "
            "video, caption, speaker"
        )
    return Row(where, value)


def _jsonl(path: PathLike, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = _where(path, number)
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{where}: not JSON ({error}); write one object a line"
            ) from None
        yield _object(where, value)


def _skipped(text: str, at: int, *marks: str) -> tuple[int, str]:
    """The place of the next character that is no space, which must be a mark."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    found = text[at : at + 1]
    if marks and found not in marks:
        raise json.JSONDecodeError(f"expected {' or '.join(marks)}", text, at)
    return at, found


def _items(text: str) -> Iterator[tuple[int, Any]]:
    """Each value of a list, with the place in the text where it begins."""
    decoder = json.JSONDecoder()
    at, _ = _skipped(text, 0, "[")
    at, mark = _skipped(text, at + 1)
    while mark != "]":
        start = at
        value, at = decoder.raw_decode(text, at)
        yield start, value
        at, mark = _skipped(text, at, ",", "]")
        if mark == ",":
            at, _ = _skipped(text, at + 1)
    at, rest = _skipped(text, at + 1)
    if rest:
        raise json.JSONDecodeError("expected nothing after the list", text, at)


def _json(path: PathLike, text: str) -> Iterator[Row]:
    try:
        for at, value in _items(text):
            yield _object(_where(path, text.count("\n", 0, at) + 1), value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{_where(path, error.lineno)}: not JSON ({error.msg}); write a list of "
            "objects, or one object a line in a .jsonl file"
        ) from None


def _csv(path: PathLike, text: str) -> Iterator[Row]:
    delimiter = "\t" if str(path).lower().endswith(".tsv") else ","
    reader = csv.DictReader(
        text.splitlines(keepends=True), delimiter=delimiter, strict=True
    )
    line = 1
    try:
        line = len(reader.fieldnames or ()) and reader.line_num + 1
        for values in reader:
            where = _where(path, line)
            if None in values:
                raise ValueError(
                    f"{where}: got more values than the {len(reader.fieldnames or ())} "
                    "columns; put texts that hold commas between quotes"
                )
            yield Row(where, dict(values))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{_where(path, max(1, line))}: not CSV ({error}); save it again as CSV"
        ) from None


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv}


def rows(path: PathLike) -> list[Row]:
    """The rows of a table.

    Raises:
        ValueError: if it is missing, is no table or holds something else than rows; the
            message names file and line.
    """
    file = Path(existing("manifest", path, _EXPECTED))
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        got = f"a {file.suffix or 'nameless'} file"
        raise problem("manifest", path, got, _EXPECTED, "save it as one of these")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"bytes that are no UTF-8 text ({error.reason})"
        raise problem("manifest", path, got, "UTF-8", "save it as UTF-8") from None
    return list(reader(path, text))

"""Which rows a picture shows."""

import json
import sys

import pytest

from benchmarks import arguments, command, plot, rows
from benchmarks.rows import Row


def row(suite: str, **fields: object) -> dict:
    return json.loads(rows.as_json(Row(suite, "tiny", "2.0", "v", "jax", **fields)))


def test_rows_go_to_their_pictures():
    found = [
        row("pass", ratio_med=1.2, frac_roof=0.5),
        row("pass", status="not run"),
        row("memory", temp_bytes=5),
        row("scaling", extra={"video_tokens": 8}, frac_roof=0.1),
        row("scaling", extra={"video_tokens": 4}, frac_roof=0.1),
    ]
    chosen = plot.selected(found)
    assert {name: len(rows) for name, rows in chosen.items()} == {
        "ratios": 1,
        "memory": 1,
        "roofline": 3,
        "tokens": 2,
    }
    assert chosen["tokens"][0]["extra"]["video_tokens"] == 4
    assert plot.selected([]) == {}


def test_without_matplotlib_the_command_says_what_to_install(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(command.SUITES, "pass", lambda session: [])
    words = ["pass", "--config", "tiny", "--plots", "--out", str(tmp_path)]
    assert command.run(arguments.read(words)) == 2
    assert ".[bench]" in capsys.readouterr().err


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    made = Row("pass", "tiny", "2.0", "v", "jax", ratio_med=1.2, frac_roof=0.5)
    rows.write([made], tmp_path, "pass", "here")
    paths = plot.draw(tmp_path)
    assert [p.rpartition("/")[2] for p in paths] == ["ratios.png", "roofline.png"]

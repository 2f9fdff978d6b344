"""docs/api.md shows docs/api.py piece by piece, and that runs."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"
SCRIPT = DOCS / "api.py"


def pieces() -> list[str]:
    text = (DOCS / "api.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(*folder: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(SCRIPT), *folder]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_every_piece_of_the_page_is_in_the_script_in_order():
    script, at = SCRIPT.read_text("utf-8"), 0
    assert len(pieces()) > 12
    for piece in pieces():
        at = script.find(piece, at)
        assert at >= 0, f"docs/api.py has no such lines, or not here:\n{piece}"
        at += len(piece)


def test_the_script_names_the_page_and_the_readme_links_it():
    assert "(api.py)" in (DOCS / "api.md").read_text("utf-8")
    readme = (DOCS.parent / "README.md").read_text("utf-8")
    assert "(docs/api.md)" in readme and "(docs/sampling.md)" in readme


def test_without_a_model_the_script_says_how_to_get_one(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 1
    assert "no tiny model in outputs/demo; run `make demo`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_assertion_of_the_script_holds_on_the_tiny_model(tiny_model, tmp_path):
    base, _ = tiny_model
    done = run(str(pathlib.Path(base).parent), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("every assertion holds\n")

"""The command from arguments to files, at the tiny size and without the reference."""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import ab, arguments, command, host, rows
from benchmarks.suites import gpu
from benchmarks.suites import step as step_suite


@pytest.fixture(autouse=True)
def without_the_reference(monkeypatch):
    monkeypatch.delenv("IDLORA_REFERENCE", raising=False)


def run(tmp_path, *words: str) -> list[dict]:
    given = [*words, "--config", "tiny", "--rounds", "2", "--out", str(tmp_path)]
    assert command.run(arguments.read(given)) == 0
    return rows.read(tmp_path)


def test_a_pass_is_measured_and_the_absent_reference_told(tmp_path, capsys):
    theirs, ours = run(tmp_path, "pass")
    lacks = "IDLORA_REFERENCE" if importlib.util.find_spec("torch") else "torch"
    assert theirs["status"] == "not run" and lacks in theirs["note"]
    assert (ours["backend"], ours["n"], ours["ratios"]) == ("jax", 2, [1.0, 1.0])
    assert ours["tflop"] > 0 and ours["frac_roof"] > 0 and ours["wall_min"] > 0
    assert ours["temp_bytes"] > 0 and ours["peak_bytes"] > 0
    assert {"versions", "commit", "flags", "load", "device"} <= set(ours["about"])
    assert "relative 0.00e+00" in capsys.readouterr().out
    assert (tmp_path / "summary.csv").exists()


def test_a_step_is_measured_in_the_other_generation(tmp_path):
    (sweep,) = run(tmp_path, "step", "--backends", "jax", "--generation", "2.3")
    assert (sweep["variant"], sweep["generation"]) == ("sweep", "2.3")
    assert len(sweep["ratios"]) == 2 and sweep["max_rel_err"] == 0


@pytest.mark.slow
def test_layouts_of_a_step_are_equal_and_share_work(tmp_path):
    asked = "sweep,separate"
    sweep, separate = run(tmp_path, "step", "--backends", "jax", "--variants", asked)
    assert separate["max_rel_err"] < 1e-5
    assert sweep["tflop"] < separate["tflop"], "the layers before STG are shared"


def test_unequal_numbers_end_the_command_without_rows(tmp_path, capsys, monkeypatch):
    def refuse(*args: object) -> None:
        raise ab.UnequalError("equality: reference pass: 2e-3")

    monkeypatch.setitem(command.SUITES, "pass", refuse)
    found = arguments.read(["pass", "--config", "tiny", "--out", str(tmp_path)])
    assert command.run(found) == 1
    assert "2e-3" in capsys.readouterr().err and not rows.read(tmp_path)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["pass", "--backends", "tensorflow"], "expected some of"),
        (["pass", "--rounds", "0"], "--rounds"),
        (["scaling", "--what", "pixels"], "--what"),
        (["nothing"], "invalid choice"),
    ],
)
def test_wrong_arguments_are_told(words, says, capsys):
    with pytest.raises(SystemExit):
        arguments.read(words)
    assert says in capsys.readouterr().err


def test_unknown_variants_are_told():
    with pytest.raises(ValueError, match="expected some of"):
        step_suite.variants(("swept",))


def test_threads_are_set_before_jax_is_loaded():
    code = (
        "import os, sys\n"
        "from benchmarks import arguments, host\n"
        "found = arguments.read(['pass'])\n"
        "assert not {'jax', 'torch'} & set(sys.modules)\n"
        "host.prepare(found.threads, found.pin)\n"
        "print(os.environ['XLA_FLAGS'], os.environ['OMP_NUM_THREADS'])\n"
        "print(len(os.sched_getaffinity(0)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=host.ROOT, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    flags, cores = done.stdout.splitlines()
    assert "multi_thread_eigen=false" in flags and flags.endswith(" 1")
    assert cores == "1"


def test_threads_cannot_be_set_too_late():
    with pytest.raises(RuntimeError, match="loaded before"):
        host.prepare(1, None)


def test_a_gpu_part_without_time_is_skipped_and_says_so():
    found = arguments.read(["gpu", "--minutes", "0.001"])
    (row,) = gpu.run(command.options_of(found), (gpu.Part("profile", 15),))
    assert row.status == "not run" and "it needs 15 s" in row.note


def test_a_smaller_card_is_a_share_of_the_memory():
    part = gpu.Part("x", 1, 22)
    fraction = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert gpu.environment(part, "c", 139)[fraction] == "0.1583"
    assert gpu.environment(part, "c", None)[fraction] == "0.9500"


def test_rows_are_found_among_what_a_part_prints():
    row = rows.Row("gpu", "full", "2.0", "pass", "jax", tflop=1.5)
    text = f"noise\n{gpu.MARK}{rows.as_json(row)}\nmore\n"
    (found,) = gpu.rows_in(text)
    assert json.loads(rows.as_json(found))["tflop"] == 1.5


@pytest.mark.slow
def test_without_the_reference_its_part_of_the_gpu_suite_says_so(monkeypatch):
    monkeypatch.delenv("IDLORA_REFERENCE", raising=False)
    (part,) = (p for p in gpu.PARTS if p.name == "beside the reference")
    found = arguments.read(["gpu", "--tiny", "--rounds", "1"])
    (row,) = gpu.run(command.options_of(found), (part,))
    assert row.status == "not run"
    assert "IDLORA_REFERENCE is not set" in row.note


@pytest.mark.slow
def test_parts_of_the_gpu_suite_run_at_a_tiny_size():
    words = ["gpu", "--tiny", "--rounds", "1"]
    names = "profile", "stage 2", "lighter"
    parts = tuple(p for p in gpu.PARTS if p.name in names)
    found = gpu.run(command.options_of(arguments.read(words)), parts)
    states = {row.variant: row.status for row in found}
    assert {*states.values()} == {"ok"} and len(states) == 8

"""Rows: arithmetic, fields, files."""

import csv
import json
import math

import pytest

from benchmarks import rows
from benchmarks.ab import Error, First, Times
from benchmarks.roofline import Peak, floor_s
from benchmarks.rows import Row
from benchmarks.works import Facts, Timed, Work

REQUIRED = (
    "suite config variant backend n wall_med wall_min wall_p90 cpu_med cpu_min "
    "ratio_med first_call_s compile_cpu_s temp_bytes arg_bytes peak_bytes tflop "
    "frac_roof max_abs_err about"
).split()
"""What a row must say, whatever else it says."""


def made() -> Row:
    facts = Facts(2e9, 3.0, 2.5, temp_bytes=10, arg_bytes=20, out_bytes=5)
    work = Work("v", "jax", lambda: None, dict, facts)
    row = rows.with_facts(Row("pass", "tiny", "2.0", "v", "jax"), work)
    row = rows.with_first(row, work, First(Error(1e-6, 1e-7), Timed(1.0, 0.5)))
    times = Times((1.0, 2.0, 4.0), (1.0, 1.0, 2.0))
    base = Times((2.0, 2.0, 2.0), (2.0, 3.0, 8.0))
    return rows.with_times(row, times, base, Peak(1e10, 1e9, "measured"))


def test_a_row_has_every_field_and_their_values():
    row = made()
    assert set(REQUIRED) <= set(json.loads(rows.as_json(row)))
    assert (row.wall_med, row.wall_min, row.wall_p90) == (2.0, 1.0, 4.0)
    assert (row.cpu_med, row.cpu_min, row.n) == (1.0, 1.0, 3)
    assert (row.ratios, row.ratio_med) == ((2.0, 3.0, 4.0), 3.0)
    assert (row.tflop, row.first_call_s) == (0.002, 4.0)
    assert row.frac_roof == pytest.approx(0.2), "2e9 of 1e10 a second in 1 s"


def test_the_floor_is_the_larger_of_work_and_traffic():
    limit = Peak(10.0, 2.0, "measured")
    assert floor_s(100.0, 4, limit) == 10.0
    assert floor_s(100.0, 40, limit) == 20.0
    assert floor_s(None, 40, limit) is None


@pytest.mark.parametrize(("share", "want"), [(0.0, 1), (0.5, 2), (0.9, 4), (1.0, 4)])
def test_percentiles(share, want):
    assert rows.percentile([3, 1, 4, 2], share) == want


def test_rows_are_appended_and_summarised(tmp_path):
    row = made()
    row.max_rel_err = math.inf
    for _ in range(2):
        paths = rows.write([row], tmp_path, "pass", "here")
    found = rows.read(tmp_path)
    assert len(found) == 2 and found[0]["max_rel_err"] == "inf"
    with open(paths[1], encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [r["ratio_med"] for r in table] == ["3.0", "3.0"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        paths[0].rpartition("/")[2],
        "summary.csv",
    ]


def test_a_row_that_was_not_run_says_why():
    row = Row("pass", "tiny", "2.0", "v", "reference", "not run", note="no torch")
    assert rows.line(row).endswith("not run: no torch")

"""Results: one row per variant, as JSON lines, and a table of all of them.

<out>/<date>-<host>-<suite>.jsonl     every field, appended to
<out>/summary.csv                     the columns one looks at, of all these files
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.ab import First, Times, ratios
from benchmarks.roofline import Peak, floor_s
from benchmarks.works import Work
from idlora_jax.files import replacing

COLUMNS = (
    "date suite config generation variant backend status n wall_med wall_min wall_p90 "
    "cpu_med cpu_min ratio_med ratio_min ratio_max tflop frac_roof max_rel_err "
    "first_call_s compile_cpu_s temp_bytes arg_bytes peak_bytes device commit note"
).split()


@dataclass
class Row:
    """What was measured of one variant.

    Attributes:
        suite: what kind of measurement.
        config: the size.
        generation: of the transformer.
        variant: what is varied.
        backend: whose program.
        status: "ok", or "not run" with the reason in `note`.
        depth: layers.
        n: rounds.
        wall_med: seconds, median of the rounds; likewise `wall_min`, `wall_p90`.
        cpu_med: CPU seconds; likewise `cpu_min`.
        baseline: the backend and variant that ratios are to.
        clock: which of both times ratios are of.
        ratios: baseline over this, of each round.
        first_call_s: of the first run, and of compiling before it.
        compile_cpu_s: CPU seconds of tracing and compiling.
        temp_bytes: see `works.Facts`; likewise `arg_bytes`, `out_bytes`, `hlo_bytes`.
        peak_bytes: of the device's memory, or of this process's on CPU, highest so far.
        tflop: products of one run, 1e12 operations.
        frac_roof: least possible time over the fastest wall time.
        peak_tflops: of the device, 1e12 a second; `peak_source`: who says so.
        max_abs_err: from the baseline; likewise `max_rel_err`.
        about: versions, commit, flags, load average, device (`host.about`).
        extra: what only this suite has.
    """

    suite: str
    config: str
    generation: str
    variant: str
    backend: str
    status: Literal["ok", "not run"] = "ok"
    depth: int | None = None
    n: int = 0
    wall_med: float | None = None
    wall_min: float | None = None
    wall_p90: float | None = None
    cpu_med: float | None = None
    cpu_min: float | None = None
    baseline: str = ""
    clock: str = "cpu"
    ratio_med: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    ratios: tuple[float, ...] = ()
    first_call_s: float | None = None
    compile_cpu_s: float | None = None
    temp_bytes: int | None = None
    arg_bytes: int | None = None
    out_bytes: int | None = None
    hlo_bytes: int | None = None
    peak_bytes: int | None = None
    tflop: float | None = None
    frac_roof: float | None = None
    peak_tflops: float | None = None
    peak_source: str = ""
    max_abs_err: float | None = None
    max_rel_err: float | None = None
    note: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def with_facts(row: Row, work: Work) -> Row:
    """The row with what is known of a work's program."""
    facts = work.facts
    row.tflop = None if facts.flops is None else facts.flops / 1e12
    row.compile_cpu_s = facts.compile_cpu_s or None
    row.temp_bytes, row.arg_bytes = facts.temp_bytes, facts.arg_bytes
    row.out_bytes, row.hlo_bytes = facts.out_bytes, facts.hlo_bytes
    row.note = row.note or work.note
    return row


def with_first(row: Row, work: Work, first: First) -> Row:
    """The row with the first run and its distance from the baseline."""
    row.first_call_s = work.facts.compile_s + first.took.wall
    row.max_abs_err, row.max_rel_err = first.error
    return row


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that a share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def with_times(row: Row, times: Times, base: Times, limit: Peak | None) -> Row:
    """The row with times, ratios to the baseline's and the share of the roof.

    Args:
        row: has the facts already.
        times: of the rounds.
        base: the baseline's.
        limit: of the device, if it is known.
    """
    row.n = len(times.wall)
    row.wall_med, row.wall_min = statistics.median(times.wall), min(times.wall)
    row.wall_p90 = percentile(times.wall, 0.9)
    row.cpu_med, row.cpu_min = statistics.median(times.cpu), min(times.cpu)
    row.ratios = ratios(base, times, clock=row.clock)
    row.ratio_med = statistics.median(row.ratios)
    row.ratio_min, row.ratio_max = min(row.ratios), max(row.ratios)
    if limit is not None:
        row.peak_tflops, row.peak_source = limit.flops / 1e12, limit.source
        flops = None if row.tflop is None else row.tflop * 1e12
        least = floor_s(flops, (row.arg_bytes or 0) + (row.out_bytes or 0), limit)
        row.frac_roof = None if least is None else least / row.wall_min
    return row


def _plain(value: Any) -> Any:
    """JSON has no infinity, and no numbers of numpy."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def as_json(row: Row) -> str:
    """One line."""
    fields = {k: _plain(v) for k, v in dataclasses.asdict(row).items()}
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"date": now, **fields})


def write(rows: Iterable[Row], out: pathlib.Path, suite: str, host: str) -> list[str]:
    """Append rows to the suite's file of today and make the table again.

    Args:
        rows: of one suite.
        out: the folder; made where it is not there.
        suite: its name.
        host: of the machine.

    Returns:
        Paths of both files.
    """
    out.mkdir(parents=True, exist_ok=True)
    day = datetime.date.today().isoformat()
    path = out / f"{day}-{host}-{suite}.jsonl"
    old = path.read_text("utf-8") if path.exists() else ""
    lines = "".join(as_json(row) + "\n" for row in rows)
    with replacing(path) as temporary:
        temporary.write_text(old + lines, "utf-8")
    return [str(path), str(summarise(out))]


def read(out: pathlib.Path) -> list[dict[str, Any]]:
    """Every row of a folder, oldest file first."""
    files = sorted(out.glob("*.jsonl"))
    lines = (line for path in files for line in path.read_text("utf-8").splitlines())
    return [json.loads(line) for line in lines]


def summarise(out: pathlib.Path) -> pathlib.Path:
    """Write `summary.csv` of every row in the folder."""
    text = io.StringIO()
    table: Any = csv.DictWriter(
        text, COLUMNS, extrasaction="ignore", lineterminator="\n"
    )
    table.writeheader()
    for row in read(out):
        flat = row | {"device": row["about"].get("device")}
        table.writerow(flat | {"commit": row["about"].get("commit")})
    path = out / "summary.csv"
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), "utf-8")
    return path


def line(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row.suite:8} {row.config:9} {row.backend:10} {row.variant:22}"
    if row.status == "not run":
        return f"{head} not run: {row.note}"
    parts = []
    if row.cpu_med is not None and row.wall_med is not None:
        parts.append(f"wall {row.wall_med:.4f} s  cpu {row.cpu_med:.4f} s")
        parts.append(f"ratio {row.ratio_med:.3f} ({row.ratio_min:.3f}..)")
    if row.max_rel_err is not None:
        parts.append(f"err {row.max_rel_err:.1e}")
    if row.tflop is not None:
        parts.append(f"{row.tflop:.4g} TFLOP")
    if row.frac_roof is not None:
        parts.append(f"{row.frac_roof:.0%} of roof")
    if row.temp_bytes is not None:
        parts.append(f"temp {row.temp_bytes / 2**20:.1f} MiB")
    if row.compile_cpu_s:
        parts.append(f"compile {row.compile_cpu_s:.1f} cpu s")
    parts += [f"{k} {v}" for k, v in row.extra.items()]
    return f"{head} {'  '.join(parts)}"

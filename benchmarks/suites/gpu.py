"""A GPU in one command: full-size rows, within some minutes, most important first.

Each part is a process of its own (`gpu_parts`), so that memory of one does not count
for the next, and smaller cards are emulated: the allocator gets a share of the memory.
A part that has not the time it needs is skipped, and its row says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from benchmarks import host
from benchmarks.backends.jax import NAME
from benchmarks.rows import Row, line
from benchmarks.session import Options

ROUNDS = 3
"""At most: programs of a GPU vary little, and its time is dear."""
MARK = "ROW "
"""Before a row that a part prints."""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: what `gpu_parts` knows it by.
        needs: seconds without which it is not started.
        gib: size of the emulated card, or what is left beside another library; None:
            all of the memory.
    """

    name: str
    needs: float
    gib: float | None = None


PARTS = (
    Part("profile", 15),
    Part("step", 90),
    Part("stage 2", 45),
    Part("train 1", 60),
    Part("train 4", 60),
    Part("warm", 30),
    Part("decode", 30),
    Part("two stages in 46 GiB", 60, 46),
    Part("train 4 in 78 GiB", 60, 78),
    Part("int8 in 22 GiB", 45, 22),
    Part("streamed in 12 GiB", 45, 12),
    Part("lighter", 60),
    Part("train 1 int8 in 31 GiB", 60, 31),
    Part("beside the reference", 90, 60),
)


def environment(
    part: Part, cache: str, total: float | None, *, tiny: bool = False
) -> dict[str, str]:
    """Of a part's process.

    Args:
        part: which.
        cache: folder of compiled programs, shared so that the second use is a hit.
        total: GiB of the device; None: unknown, as on a CPU.
        tiny: only whether everything runs matters, so compile fast.
    """
    share = 0.95 if part.gib is None or not total else part.gib / total
    own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.4f}"}
    own["JAX_COMPILATION_CACHE_DIR"] = cache
    own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if tiny:
        flags = os.environ.get("XLA_FLAGS", "")
        own["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    return {**os.environ, **own}


def rows_in(text: str) -> list[Row]:
    """The rows among what a part printed."""
    found = []
    for one in text.splitlines():
        if one.startswith(MARK):
            fields = json.loads(one.removeprefix(MARK))
            fields.pop("date")
            found.append(Row(**fields))
    return found


def _missing(options: Options, part: Part, reason: str) -> Row:
    config = "tiny" if options.tiny else "full"
    given: dict[str, Any] = {"variant": part.name, "backend": NAME, "note": reason}
    return Row("gpu", config, options.generation, status="not run", **given)


def run_part(options: Options, part: Part, cache: str, seconds: float) -> list[Row]:
    """Run a part's process; what it gave until its time was over counts.

    Args:
        options: of the command.
        part: which.
        cache: folder of compiled programs.
        seconds: after which it is ended.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_parts", part.name]
    command += [options.generation, str(min(options.rounds, ROUNDS))]
    command += ["--tiny"] if options.tiny else []
    how: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    how["env"] = environment(part, cache, host.device_gib(), tiny=options.tiny)
    try:
        done = subprocess.run(command, cwd=host.ROOT, timeout=seconds, **how)
        text, reason = done.stdout, f"failed: {done.stderr.strip()[-400:]}"
        failed = done.returncode != 0
    except subprocess.TimeoutExpired as late:
        out = late.stdout or b""
        text = out.decode() if isinstance(out, bytes) else out
        reason, failed = f"ended after {seconds:.0f} s", True
    rows = rows_in(text)
    return [*rows, _missing(options, part, reason)] if failed else rows


def run(options: Options, parts: tuple[Part, ...] = PARTS) -> list[Row]:
    """Rows of all parts that the time allows."""
    end, rows = time.monotonic() + 60 * options.minutes, []
    with tempfile.TemporaryDirectory(prefix="idlora-cache-") as cache:
        for part in parts:
            left = end - time.monotonic()
            needs = 5.0 if options.tiny else part.needs
            if left < needs:
                reason = f"{max(0, left):.0f} s are left, it needs {needs:.0f} s"
                found = [_missing(options, part, reason)]
            else:
                found = run_part(options, part, cache, left)
            for row in found:
                print(line(row), flush=True)
            rows += found
    return rows

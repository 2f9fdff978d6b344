"""One thing to measure, whoever computes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
Outputs = Mapping[str, np.ndarray]


class NotRun(Exception):
    """Something that cannot be measured here; the message is the reason."""


@dataclass
class Facts:
    """What is known of a program without running it.

    Attributes:
        flops: of its matrix products and convolutions; None: not counted.
        compile_s: wall seconds of tracing and compiling.
        compile_cpu_s: CPU seconds of these.
        temp_bytes: what XLA holds beside arguments and results.
        arg_bytes: of the arguments, weights included.
        out_bytes: of the results.
        hlo_bytes: of the program's text before it is compiled.
        blocks: transformer blocks in it, each scan's body once.
    """

    flops: float | None = None
    compile_s: float = 0.0
    compile_cpu_s: float = 0.0
    temp_bytes: int | None = None
    arg_bytes: int | None = None
    out_bytes: int | None = None
    hlo_bytes: int | None = None
    blocks: float | None = None

    def __add__(self, other: Facts) -> Facts:
        """Of two programs that run one after the other."""
        most = lambda a, b: b if a is None else a if b is None else max(a, b)
        both = lambda a, b: b if a is None else a if b is None else a + b
        return Facts(
            flops=both(self.flops, other.flops),
            compile_s=self.compile_s + other.compile_s,
            compile_cpu_s=self.compile_cpu_s + other.compile_cpu_s,
            temp_bytes=most(self.temp_bytes, other.temp_bytes),
            arg_bytes=most(self.arg_bytes, other.arg_bytes),
            out_bytes=both(self.out_bytes, other.out_bytes),
            hlo_bytes=both(self.hlo_bytes, other.hlo_bytes),
            blocks=both(self.blocks, other.blocks),
        )


@dataclass
class Work:
    """What is run again and again.

    Attributes:
        variant: its name in the tables.
        backend: whose it is.
        run: does it once and waits until it is done.
        outputs: from what `run` returns to the numbers that are compared: by name, the
            targets first and the reference behind them.
        facts: of its program.
        note: what a reader should know.
    """

    variant: str
    backend: str
    run: Callable[[], Any]
    outputs: Callable[[Any], Outputs]
    facts: Facts = field(default_factory=Facts)
    note: str = ""


class Timed(NamedTuple):
    """How long something took.

    Attributes:
        wall: seconds.
        cpu: seconds of all threads of this process.
    """

    wall: float
    cpu: float


def timed(f: Callable[[], T]) -> tuple[T, Timed]:
    """Run it, and how long that took."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = f()
    return out, Timed(time.perf_counter() - wall, time.process_time() - cpu)

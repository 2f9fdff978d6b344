"""One run of the command: what was asked for, and what all its suites need."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks import ab, host, random_weights, roofline
from benchmarks.backends import diffusers, reference
from benchmarks.backends import jax as ours
from benchmarks.configs import SIZES, Size
from benchmarks.rows import Row, line, with_facts, with_first, with_times
from benchmarks.works import NotRun, Work
from idlora_jax.config import Generation
from idlora_jax.types import Tree
from idlora_jax.weights import rules, tables

BACKENDS = (ours.NAME, reference.NAME, diffusers.NAME)


@dataclass(frozen=True)
class Options:
    """What the command line says; see `arguments`."""

    suite: str
    config: str = "eighth"
    generation: Generation = "2.0"
    backends: tuple[str, ...] = (ours.NAME, reference.NAME)
    rounds: int = 8
    threads: int = 1
    pin: int | None = None
    tolerance: float = ab.TOLERANCE
    variants: tuple[str, ...] = ()
    what: tuple[str, ...] = ()
    gigabytes: float = 2.0
    minutes: float = 9.0
    tiny: bool = False
    plots: bool = False
    out: pathlib.Path = pathlib.Path("benchmarks/results")

    @property
    def size(self) -> Size:
        """The size that is measured."""
        return SIZES[self.config]


class Weights:
    """One set of numbers for every backend: torch's own where it is there.

    Attributes:
        base: ours.
        models: the networks of the others, by backend.
        missing: why a backend that was asked for has none.
    """

    def __init__(self, options: Options) -> None:
        self.models: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        size, generation = options.size, options.generation
        cfg, first = size.transformer(generation), None
        for name in options.backends:
            if name == ours.NAME:
                continue
            try:
                host.limit_torch(options.threads)
                if name == reference.NAME:
                    made = reference.model(size, generation)
                    own = reference.original(made)
                else:
                    made = diffusers.model(cfg, first)
                    own = diffusers.original(made)
            except (NotRun, ImportError) as error:
                self.missing[name] = str(error)
                continue
            first = own if first is None else first
            self.models[name] = made
        self.base = self._ours(cfg, first)

    @staticmethod
    def _ours(cfg: Any, original: Any) -> Tree:
        if original is None:
            return random_weights.base(cfg)
        found = rules.import_(original, tables.TRANSFORMER)["transformer"]
        return jax.tree.map(jax.numpy.asarray, found)


class Session:
    """Options, and rows of what was measured with them."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.about = host.about()
        self.clock = "cpu" if jax.default_backend() == "cpu" else "wall"

    def row(self, work: Work | None = None, **fields: Any) -> Row:
        """A row of this session, with what is known of a work."""
        options = self.options
        given: dict[str, Any] = {"suite": options.suite, "config": options.config}
        given |= {"generation": options.generation, "clock": self.clock}
        given |= {"depth": options.size.layers, "about": self.about}
        if work is None:
            return Row(**(given | fields))
        given |= {"variant": work.variant, "backend": work.backend}
        return with_facts(Row(**(given | fields)), work)

    def not_run(self, missing: dict[str, str], variant: str) -> list[Row]:
        """Rows of backends that could not take part, with the reason."""
        rows = [
            self.row(variant=variant, backend=name, status="not run", note=reason)
            for name, reason in missing.items()
        ]
        return [self.told(row) for row in rows]

    def told(self, row: Row) -> Row:
        """The row, after it was printed."""
        print(line(row), flush=True)
        return row

    def compare(self, works: Sequence[Work], **fields: Any) -> list[Row]:
        """Check that works are equal, time them in turns, make rows.

        Args:
            works: the baseline first.
            fields: of every row.

        Raises:
            UnequalError: if they are not; nothing is timed then.
        """
        firsts = ab.check(works, self.options.tolerance)
        for work, first in zip(works, firsts, strict=True):
            print(
                f"equal: {work.backend} {work.variant}: max |d| "
                f"{first.error.absolute:.2e}, relative {first.error.relative:.2e}",
                flush=True,
            )
        return self._timed(works, firsts, **fields)

    def alone(self, works: Sequence[Work], **fields: Any) -> list[Row]:
        """Time works that compute different things in turns; each must be finite.

        Args:
            works: ratios are to the first.
            fields: of every row.

        Raises:
            UnequalError: if one gives a number that is not finite.
        """
        firsts = [ab.check([work], 0.0)[0] for work in works]
        return self._timed(works, firsts, **fields)

    def _timed(
        self, works: Sequence[Work], firsts: Sequence[ab.First], **fields: Any
    ) -> list[Row]:
        options, limit = self.options, roofline.peak()
        times = ab.measure(works, options.rounds)
        base = f"{works[0].backend} {works[0].variant}"
        load, rows = host.load(), []
        for work, first, own in zip(works, firsts, times, strict=True):
            row = with_first(self.row(work, baseline=base, **fields), work, first)
            row = with_times(row, own, times[0], limit)
            row.about = {**self.about, "load": load}
            row.peak_bytes = peak_bytes()
            rows.append(self.told(row))
        return rows


def peak_bytes() -> int:
    """Most memory so far: of the first device; on CPU, of this process."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0)) or host.own_memory()

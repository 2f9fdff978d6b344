"""Runs a suite, prints and writes its rows."""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
from collections.abc import Callable

from benchmarks import host, plot, rows
from benchmarks.ab import UnequalError
from benchmarks.rows import Row
from benchmarks.session import Options, Session
from benchmarks.suites import (
    codecs,
    compiling,
    gpu,
    loading,
    memory,
    passes,
    scaling,
    step,
    text,
    train,
)

SUITES: dict[str, Callable[[Session], list[Row]]] = {
    "pass": passes.run,
    "step": step.run,
    "train": train.run,
    "compile": compiling.run,
    "memory": memory.run,
    "load": loading.run,
    "scaling": scaling.run,
    "vae": codecs.run,
    "text": text.run,
}


def options_of(found: argparse.Namespace) -> Options:
    """The arguments as a value."""
    names = [f.name for f in dataclasses.fields(Options)]
    return Options(**{name: getattr(found, name) for name in names})


def run(found: argparse.Namespace) -> int:
    """Measure, print, write; 1 where numbers were not equal, 2 for bad arguments.

    Args:
        found: from `arguments.read`.
    """
    options = options_of(found)
    if options.threads != 1 and host.load() > host.MOST_LOAD:
        print(
            f"warning: load average {host.load():.1f}: times of several threads mean "
            f"little above {host.MOST_LOAD}",
            file=sys.stderr,
        )
    try:
        if options.suite == "gpu":
            made = gpu.run(options)  # its parts load jax, in processes of their own
        else:
            made = SUITES[options.suite](Session(options))
    except UnequalError as error:
        print(error, file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    paths = rows.write(made, options.out, options.suite, platform.node())
    print("wrote", *paths)
    if options.plots:
        try:
            print("wrote", *plot.draw(options.out))
        except ImportError as error:
            print(f"no plots: {error}; pip install -e '.[bench]'", file=sys.stderr)
            return 2
    return 0

"""The command line. Nothing here loads jax: threads are set after it was read."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Sequence

from benchmarks.configs import SIZES

SUITES = {
    "pass": "one pass of the transformer",
    "step": "the guided step of five passes",
    "train": "one step of LoRA training",
    "compile": "compiling, at few and many layers",
    "memory": "what XLA holds beside arguments and results; nothing is timed",
    "load": "host memory and time of reading a checkpoint",
    "scaling": "time over tokens, steps, adapters, rows",
    "vae": "encoding and decoding, in tiles and whole; the vocoder",
    "text": "text encoder and connector",
    "gpu": "everything of a GPU, full size, within some minutes",
}
WHAT = ("tokens", "steps", "adapters", "rows")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _core(text: str) -> int | None:
    return None if text == "none" else int(text)


def parser() -> argparse.ArgumentParser:
    """The arguments of `python -m benchmarks`."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure idlora_jax, beside PyTorch programs where they are there.",
        epilog="Suites: " + "; ".join(f"{n}: {about}" for n, about in SUITES.items()),
    )
    add = made.add_argument
    add("suite", choices=[*SUITES], metavar="SUITE", help=", ".join(SUITES))
    add("--config", default="eighth", choices=[*SIZES], help="size (default: eighth)")
    add("--generation", default="2.0", choices=["2.0", "2.3"])
    names = "jax,reference"
    add("--backends", type=_names, default=_names(names), help=f"default: {names}")
    add("--rounds", type=int, default=8, help="how often each is run (default: 8)")
    add("--threads", type=int, default=1, help="0: as libraries choose (default: 1)")
    add(
        "--pin",
        type=_core,
        default=-1,
        help="core to stay on, or none; last by default",
    )
    add("--tolerance", type=float, default=1e-4, help="of equality (default: 1e-4)")
    add("--variants", type=_names, default=(), help="of ours, by comma")
    add("--what", type=_names, default=WHAT, help=f"scaling: some of {','.join(WHAT)}")
    add("--gigabytes", type=float, default=2.0, help="load: of the checkpoint")
    add("--minutes", type=float, default=9.0, help="gpu: of all rows together")
    add("--tiny", action="store_true", help="gpu: the same code at a tiny size")
    add("--plots", action="store_true", help="draw plots (needs matplotlib)")
    add("--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    return made


def read(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parsed and checked arguments; errors end the program with a message.

    Args:
        given: instead of those of the process.
    """
    made = parser()
    found = made.parse_args(given)
    known = ("jax", "reference", "diffusers")
    for name, values, allowed in (
        ("--backends", found.backends, known),
        ("--what", found.what, WHAT),
    ):
        unknown = [value for value in values if value not in allowed]
        if unknown or not values:
            made.error(
                f"{name}: got {unknown or 'nothing'}, expected some of {allowed}"
            )
    for name in ("rounds", "gigabytes", "minutes", "tolerance"):
        if getattr(found, name) <= 0:
            made.error(f"--{name}: got {getattr(found, name)}, expected more than 0")
    if found.threads < 0:
        made.error(f"--threads: got {found.threads}, expected 0 or more")
    if found.pin == -1:
        one = found.threads == 1 and found.suite != "gpu"
        found.pin = max(os.sched_getaffinity(0)) if one else None
    return found

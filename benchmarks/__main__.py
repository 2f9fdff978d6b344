"""python -m benchmarks SUITE: threads first, then jax."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import arguments, host


def main(given: Sequence[str] | None = None) -> int:
    """Read the arguments, set the threads, run the suite.

    Args:
        given: instead of the arguments of the process.
    """
    found = arguments.read(given)
    threads = 0 if found.suite == "gpu" else found.threads
    try:
        host.prepare(threads, found.pin)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    from benchmarks import command

    return command.run(found)


if __name__ == "__main__":
    sys.exit(main())

"""How long reading takes, told by what JSON alone takes for the same header.

Machines differ, and a busy process stops now and then to collect what is not used any
more (two seconds among thousands of tests): so the best of some calls, beside another
measurement of the same moment.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable


def best(call: Callable[[], object], times: int = 5) -> float:
    """The CPU seconds of this thread that `call` takes at least."""
    took = []
    for _ in range(times):
        start = time.thread_time()
        call()
        took.append(time.thread_time() - start)
    return min(took)


def of_json(path: pathlib.Path) -> float:
    """As `best`, for the JSON in a safetensors file's header; 1 ms at least."""
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    return max(1e-3, best(lambda: json.loads(text)))

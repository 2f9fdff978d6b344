"""`CASES[case](golden, numerics) -> {output name: array}`, one entry per recorded case.

A case imports the file's weights through the shipped rule tables, runs the shipped
functions, and names its results as the file does (without `out.`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from goldens import Golden

Case = Callable[[Golden, str], dict[str, np.ndarray]]

CASES: dict[str, Case] = {}


def case(*names: str) -> Callable[[Case], Case]:
    """Register a function for these case names."""

    def register(run: Case) -> Case:
        for name in names:
            CASES[name] = run
        return run

    return register

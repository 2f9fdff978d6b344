"""Reading recorded reference files and comparing outputs at the bounds they state."""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import pathlib
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors import safe_open

FOLDER = pathlib.Path(
    os.environ.get("IDLORA_GOLDEN") or pathlib.Path(__file__).parent / "golden"
)


class Golden(NamedTuple):
    """One recorded file: `w.*`, `in.*`, `out.*` without prefixes, and metadata."""

    name: str
    case: str
    generation: str
    config: dict[str, Any]
    params: dict[str, Any]
    tolerance: list[dict[str, Any]]
    weights: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    def sub(self, prefix: str) -> dict[str, np.ndarray]:
        """Inputs below `prefix.`, without it."""
        n = len(prefix) + 1
        found = self.inputs.items()
        return {k[n:]: v for k, v in found if k.startswith(prefix + ".")}


def files() -> list[pathlib.Path]:
    return sorted(FOLDER.glob("*.safetensors"))


@functools.cache
def of_case(case: str, generation: str) -> tuple[pathlib.Path, ...]:
    """The files of a case and generation, by what they say, not by their names."""
    found = []
    for path in files():
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
        if (meta.get("case"), meta.get("generation")) == (case, generation):
            found.append(path)
    return tuple(found)


@functools.lru_cache(maxsize=4)
def load(path: pathlib.Path) -> Golden:
    groups: dict[str, dict[str, np.ndarray]] = {"w": {}, "in": {}, "out": {}}
    with safe_open(path, framework="numpy") as file:
        meta = file.metadata() or {}
        for key in file.keys():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = file.get_tensor(key)
    weights = groups["w"]
    if meta.get("weights_file"):
        weights = load(path.parent / meta["weights_file"]).weights
    return Golden(
        name=path.stem,
        case=meta["case"],
        generation=meta["generation"],
        config=json.loads(meta.get("config", "{}")),
        params=json.loads(meta.get("params", "{}")),
        tolerance=json.loads(meta.get("tolerance", "[]")),
        weights=weights,
        inputs=groups["in"],
        outputs=groups["out"],
    )


def bound(golden: Golden, output: str, numerics: str) -> tuple[str, float | None]:
    """(metric, bound) of one output; bound None = not compared in this mode."""
    for rule in golden.tolerance:
        if fnmatch.fnmatch(output, rule["outputs"]):
            return rule["metric"], rule[numerics]
    raise KeyError(f"{golden.name}: no tolerance rule for output {output}")


def error(metric: str, got: np.ndarray, want: np.ndarray) -> float:
    """max|got - want| in the metric's unit."""
    if got.shape != want.shape:
        raise AssertionError(f"shape {got.shape}, expected {want.shape}")
    got64, want64 = got.astype(np.float64), want.astype(np.float64)
    if not np.all(np.isfinite(got64) | ~np.isfinite(want64)):
        return float("inf")
    diff = np.abs(got64 - want64)
    if metric == "abs":
        return float(diff.max(initial=0.0))
    if metric == "rel":
        scale = np.abs(want64).max(initial=0.0)
        return float(diff.max(initial=0.0) / (scale if scale else 1.0))
    if metric == "bf16_ulp":
        exponent = np.floor(np.log2(np.maximum(np.abs(want64), 2.0**-126)))
        return float((diff / 2.0 ** (exponent - 7)).max(initial=0.0))
    raise KeyError(f"unknown metric {metric}")

"""Pictures of a folder of rows: ratios of variants, time over tokens, memory.

python -m benchmarks pass --plots        draws those of all rows in --out
"""

from __future__ import annotations

import pathlib
from typing import Any

from benchmarks import rows

Found = dict[str, Any]


def _bars(axes: Any, found: list[Found], value: str, title: str) -> None:
    names = [
        f"{r['backend']} {r['variant']}\n{r['config']} {r['generation']} {r['suite']}"
        for r in found
    ]
    axes.barh(range(len(found)), [r[value] for r in found])
    axes.set_yticks(range(len(found)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)


def selected(found: list[Found]) -> dict[str, list[Found]]:
    """Which rows each picture shows; pictures without rows are left out."""
    ok = [row for row in found if row["status"] == "ok"]
    tokens = [row for row in ok if "video_tokens" in row["extra"]]
    pictures = {
        "ratios": [r for r in ok if r["suite"] in ("pass", "step", "train")],
        "memory": [r for r in ok if r["suite"] == "memory" and r["temp_bytes"]],
        "roofline": [r for r in ok if r["frac_roof"]],
        "tokens": sorted(tokens, key=lambda row: row["extra"]["video_tokens"]),
    }
    return {name: rows for name, rows in pictures.items() if rows}


def draw(out: pathlib.Path) -> list[str]:
    """Draw every picture that the rows of a folder allow.

    Args:
        out: the folder; pictures are written beside the rows.

    Returns:
        Paths of the pictures.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for name, shown in selected(rows.read(out)).items():
        height = max(2.0, 0.3 * len(shown))
        figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
        if name == "tokens":
            _over_tokens(axes, shown)
        else:
            value = {"ratios": "ratio_med", "memory": "temp_bytes"}
            title = {
                "ratios": "times faster than the baseline, median",
                "memory": "temporary memory, bytes",
                "roofline": "share of the device's roof",
            }
            _bars(axes, shown, value.get(name, "frac_roof"), title[name])
        path = out / f"{name}.png"
        with rows.replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)
        plt.close(figure)
        paths.append(str(path))
    return paths


def _over_tokens(axes: Any, shown: list[Found]) -> None:
    """Measured time, and what the FLOPs say if the longest clip is right."""
    tokens = [row["extra"]["video_tokens"] for row in shown]
    last = shown[-1]
    scale = last["wall_med"] / last["tflop"]
    axes.plot(tokens, [row["wall_med"] for row in shown], "o", label="measured")
    axes.plot(tokens, [scale * row["tflop"] for row in shown], label="FLOPs")
    axes.set_xlabel("video tokens")
    axes.set_ylabel("seconds a pass")
    axes.legend()

"""What a run needs of a device, phase by phase, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GB = 1e9


@dataclass(frozen=True)
class Phase:
    """What is on a device at the same time.

    Attributes:
        name: such as "text", "decode" or "training step".
        resident: (what, bytes) that are there from before to after it.
        temporary: bytes for its own work.
    """

    name: str
    resident: tuple[tuple[str, int], ...]
    temporary: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(size for _, size in self.resident) + self.temporary


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs of one device, phase by phase.

    Attributes:
        title: what it is the plan of.
        phases: in the order of the run.
        host: bytes of weights in host memory, from where they come layer by layer.
        tiles: that the video is decoded in, see `tile_choice`.
    """

    title: str
    phases: tuple[Phase, ...]
    host: int = 0
    tiles: Any = "usual"

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    def table(self) -> str:
        """Lines for people, in GB (1e9 bytes); a star marks the peak."""
        names = dict.fromkeys(n for p in self.phases for n, _ in p.resident)
        rows = {n: [dict(p.resident).get(n, 0) for p in self.phases] for n in names}
        rows["temporary (estimate)"] = [p.temporary for p in self.phases]
        rows["together"] = [p.total for p in self.phases]
        heads = [p.name + "*" * (p is self.peak) for p in self.phases]
        wide, cell = max(map(len, rows)), max(11, *(len(head) + 2 for head in heads))
        out = [f"memory plan in GB: {self.title}"]
        out.append(" " * wide + "".join(f"{head:>{cell}}" for head in heads))
        for name, sizes in rows.items():
            cells = (f"{_gb(n) if n else '-':>{cell}}" for n in sizes)
            out.append(f"{name:{wide}}" + "".join(cells))
        if self.host:
            out.append(f"besides in host memory: {_gb(self.host)} of weights")
        return "\n".join(out)


def _gb(size: int) -> str:
    """Two digits behind the point; small sizes keep two that count."""
    number = size / GB
    return f"{number:.2f}" if number >= 0.1 else f"{number:.2g}"

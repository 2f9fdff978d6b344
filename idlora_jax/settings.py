"""What several configurations share: how settings are refused, guidance, processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Numerics = Literal["exact", "reference"]


class UsageError(ValueError):
    """A setting that cannot be used here; scripts end with status 2."""


def require(ok: bool, name: str, got: Any, expected: str) -> None:
    """Raise `ValueError` unless a setting is as expected."""
    if not ok:
        raise ValueError(f"{name}: got {got!r}, expected {expected}")


Window = tuple[float, float]
"""(lowest, highest) noise level at which a term has its scale; elsewhere it is off."""
ALWAYS: Window = (0.0, 1.0)


@dataclass(frozen=True)
class Guidance:
    """How far predictions are pushed; see `plans.Scales`.

    Attributes:
        video_cfg: towards the prompt, video; 1 is off.
        audio_cfg: towards the prompt, audio; 1 is off.
        identity: towards the reference voice; 0 is off.
        stg: away from skipped self-attention; 0 is off.
        stg_layer: where it is skipped, counted from 0.
        bimodal: towards video and audio that fit each other; 1 is off.
        video_star: whether the negative prediction is scaled first (CFG-star), video.
        audio_star: the same, audio.
        text_window: noise levels at which text guidance is on.
        identity_window: the same of identity guidance.
        stg_window: the same of STG.
        bimodal_window: the same of the bimodal term.
        video_rescale: share by which guidance's change of deviation is undone, video.
        audio_rescale: the same, audio.
        apg: whether text guidance is projected (APG) instead of added as it is.
        apg_eta: factor of the part along the positive prediction.
        apg_norm: longest direction per sample; 0: any.
        apg_momentum: factor of the running sum of directions; 0: none.
    """

    video_cfg: float = 3.0
    audio_cfg: float = 7.0
    identity: float = 3.0
    stg: float = 1.0
    stg_layer: int = 29
    bimodal: float = 3.0
    video_star: bool = False
    audio_star: bool = False
    text_window: Window = ALWAYS
    identity_window: Window = ALWAYS
    stg_window: Window = ALWAYS
    bimodal_window: Window = ALWAYS
    video_rescale: float = 0.0
    audio_rescale: float = 0.0
    apg: bool = False
    apg_eta: float = 1.0
    apg_norm: float = 0.0
    apg_momentum: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("text", "identity", "stg", "bimodal"):
            low, high = getattr(self, f"{name}_window")
            text = "low <= high, both from 0 to 1"
            good = 0 <= low <= high <= 1
            require(good, f"guidance.{name}_window", (low, high), text)
        for name in ("video_rescale", "audio_rescale"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"guidance.{name}", share, "0 to 1")
        star = self.video_star or self.audio_star
        require(not (self.apg and star), "guidance.apg", True, "APG or CFG-star")


@dataclass(frozen=True)
class Distributed:
    """Who trains together, where no launcher says so; see `distributed`.

    Attributes:
        coordinator: HOST:PORT of the first process, the port being free there; None:
            one process, or as Slurm or Open MPI say.
        processes: how many there are.
        process: which one this is, from 0.
        timeout: seconds to wait for all of them.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    timeout: int = 300

    def __post_init__(self) -> None:
        """Check ranges."""
        names = ("coordinator", "processes", "process")
        given = [name for name in names if getattr(self, name) is not None]
        want = f"{', '.join(names)} together, or none of them"
        require(len(given) in (0, 3), "distributed", given, want)
        require(self.timeout >= 1, "distributed.timeout", self.timeout, "1 or more")
        if self.coordinator is None or self.processes is None or self.process is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        good = bool(host) and port.isascii() and port.isdigit()
        want = "HOST:PORT, for instance node1:12345"
        require(good, "distributed.coordinator", self.coordinator, want)
        want = f"0 to {self.processes - 1}: there are {self.processes} processes"
        good = 0 <= self.process < self.processes
        require(good, "distributed.process", self.process, want)

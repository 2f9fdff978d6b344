"""What a dry run takes for granted where there is nothing to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from idlora_jax.settings import require


@dataclass(frozen=True)
class Assume:
    """What `--dry-run` assumes; a real run reads none of it.

    Attributes:
        frames: of every clip, 8k+1, where there is no data.
        height: of every clip, pixels, likewise.
        width: likewise.
        fps: frames per second, likewise.
        reference_s: seconds of every reference, likewise.
        clips: how many there are, likewise; None: unknown, and so are epochs.
        platform: whose memory is planned; None: this machine's accelerator, and that of
            a GPU where there is none.
        memory_gb: what a device has, in 1e9 bytes; None: what this accelerator says.
        tflops: what a device can do at best, 1e12 floating-point operations a second in
            the dtype of the computation; None: no time is given.
    """

    frames: int = 121
    height: int = 512
    width: int = 512
    fps: float = 25.0
    reference_s: float = 5.0
    clips: int | None = None
    platform: Literal["cpu", "gpu", "tpu"] | None = None
    memory_gb: float | None = None
    tflops: float | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        near = max(0, round((self.frames - 1) / 8)) * 8 + 1
        good = self.frames == near
        require(good, "assume.frames", self.frames, f"8k+1 (use {near})")
        for name in ("height", "width"):
            side = getattr(self, name)
            near = max(1, round(side / 32)) * 32
            want = f"a multiple of 32 (use {near})"
            require(side == near, f"assume.{name}", side, want)
        for name in ("fps", "reference_s", "clips", "memory_gb", "tflops"):
            value = getattr(self, name)
            require(value is None or value > 0, f"assume.{name}", value, "above 0")

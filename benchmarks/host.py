"""The machine: threads and cores, set before jax or torch are loaded; what it is.

`prepare` must run first: XLA and OpenMP read the environment once, and size their
thread pools by the cores that the process may use.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
POOLS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "diffusers", "peft", "numpy")
MOST_LOAD = 0.3
"""Load average above which times of several threads mean nothing."""


def prepare(threads: int, pin: int | None) -> None:
    """Limit this process to some threads, and to one core.

    Args:
        threads: of every pool; 0: as the libraries choose.
        pin: number of the core to stay on; None: any.

    Raises:
        ValueError: if the process may not use that core.
        RuntimeError: if jax or torch are loaded already, with pools of another size.
    """
    loaded = {"jax", "torch"} & set(sys.modules)
    if loaded and threads:
        raise RuntimeError(
            f"benchmarks: {sorted(loaded)} loaded before the threads were set; start "
            "with python -m benchmarks"
        )
    if pin is not None:
        _pin(pin)
    if threads:
        for name in POOLS:
            os.environ[name] = str(threads)
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {ONE_THREAD}".strip()


def _pin(core: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if core not in cores:
        raise ValueError(
            f"--pin: got core {core}, expected one of {cores} (or none: no pinning)"
        )
    os.sched_setaffinity(0, {core})


def limit_torch(threads: int) -> None:
    """Threads of torch, which also has pools that read no environment."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of what takes part, where it is installed."""
    found = {name: _version(name) for name in PACKAGES}
    own = {"python": platform.python_version()}
    return own | {name: v for name, v in found.items() if v is not None}


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return (head + ("+" if changed else "")) or "unknown"


def processor() -> str:
    """The name of the CPU."""
    about = pathlib.Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def flags() -> dict[str, str]:
    """What of the environment changes how programs are compiled and run."""
    names = ("XLA_FLAGS", "JAX_PLATFORMS", *POOLS)
    names += ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    return {name: os.environ[name] for name in names if name in os.environ}


def load() -> float:
    """The load average of the last minute."""
    return os.getloadavg()[0]


def own_memory() -> int:
    """Bytes that this process holds apart from files, highest so far.

    What the kernel counts as `RssAnon` has no highest value; `VmHWM` has, less what is
    of files now.
    """
    status = pathlib.Path("/proc/self/status").read_text().split()
    of = lambda name: int(status[status.index(name) + 1]) * 1024
    return of("VmHWM:") - of("RssFile:") - of("RssShmem:")


def device_gib() -> float | None:
    """Memory of the first NVIDIA GPU, without loading jax; None where there is none."""
    command = [
        "nvidia-smi",
        "--query-gpu=memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return float(done.stdout.splitlines()[0]) / 1024


def about() -> dict[str, Any]:
    """Everything of the machine and the program that a row records."""
    import jax

    device = jax.devices()[0]
    kind = processor() if device.platform == "cpu" else device.device_kind
    return {
        "versions": versions(),
        "commit": commit(),
        "flags": flags(),
        "load": load(),
        "device": f"{device.platform}: {kind}",
        "cores": len(os.sched_getaffinity(0)),
        "host": platform.node(),
    }

"""Compiled programs on disk, so that a second run compiles nothing.

    start(folder_of(config), say)     what `train.py` and `sample.py` do first

JAX keeps the programs (`jax_compilation_cache_dir`) and removes those that were not
used for longest. What is added here is that nothing about the folder can stop a run. An
entry that is damaged may crash XLA, which believes what it finds: beside each entry
lies its checksum, entries without the right one (also those of a killed process) are
removed before the first is used. And whoever can write into the folder can run code in
the processes that read it: it is the user's own.

Only `start` changes JAX's configuration, and the library never calls it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax

from idlora_jax import files
from idlora_jax.experiment import TrainConfig
from idlora_jax.sample_config import SampleConfig

LIMIT = 2 << 30
"""Bytes that a folder keeps: the programs of hundreds of sizes and plans."""
VARIABLE, OFF = "IDLORA_PROGRAM_CACHE", "off"
WAIT_S = 10.0
"""For another process that writes into the folder."""
SETTINGS: dict[str, Any] = {
    "jax_compilation_cache_max_size": LIMIT,
    # Operations outside of large programs are many: 0.1 s each on a GPU.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    # XLA's own files make keys depend on the folder, and a full disk an error.
    "jax_persistent_cache_enable_xla_caches": "none",
}
"""What is set where the environment says nothing else."""

_ENTRY, _USED, _SUM, _LOCK = "-cache", "-atime", "-crc32", ".lockfile"
_COMPILED = "/jax/core/compile/backend_compile_duration"

Say = Callable[[str], Any]


def _machine() -> str:
    """What tells machines apart whose programs cannot be exchanged: the CPU's kind."""
    about, lines = pathlib.Path("/proc/cpuinfo"), [platform.machine()]
    if about.is_file():
        names = ("model name", "flags", "Features")
        found = about.read_text(errors="replace").partition("\n\n")[0].splitlines()
        lines += [line for line in found if line.startswith(names)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def folder_of(config: SampleConfig | TrainConfig) -> Path | None:
    """Where a run keeps compiled programs; None: nothing is set up.

    The settings decide, then `IDLORA_PROGRAM_CACHE` (a folder, or "off"), then a folder
    that JAX was told by its own variable or option, which is left as it is.
    """
    said = os.environ.get(VARIABLE, "")
    if not config.use_program_cache:
        return None
    if config.program_cache is not None:
        return config.program_cache / _machine()
    if said.lower() == OFF:
        return None
    if said:
        return Path(said) / _machine()
    own: Any = jax.config.jax_compilation_cache_dir  # pyright: ignore
    root = files.user_cache()
    return None if own or root is None else root / "programs" / _machine()


def start(folder: Path | None, say: Say) -> bool:
    """Turn JAX's persistent cache on, in this folder; whether that was possible.

    Args:
        folder: made if it is not there; None: nothing is done.
        say: takes a line about what was damaged, or why there is no cache.
    """
    if folder is None:
        return False
    try:
        _make(folder)
        with _locked(folder):
            removed = tidy(folder)
    except OSError as error:
        do = f"programs are compiled again; {VARIABLE}={OFF} turns the cache off"
        say(f"program cache: cannot use {folder} ({error}); {do}")
        return False
    if removed:
        do = f"{removed} damaged or unfinished in {folder}, removed and compiled again"
        say(f"program cache: {do}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    _say_once(say)
    jax.monitoring.register_event_duration_secs_listener(_Recorder(folder))
    return True


def _make(folder: Path) -> None:
    """Make the folder, and raise unless files can be written there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(bytes(1 << 16))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While no process writes an entry: by the lock that JAX takes, too."""
    with filelock.FileLock(folder / _LOCK, timeout=WAIT_S):
        yield


def _sum(path: Path) -> bytes:
    """A checksum of a file, and its size."""
    value, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value, size = zlib.crc32(block, value), size + len(block)
    return b"%08x %d" % (value, size)


def _beside(entry: Path, ending: str) -> Path:
    return entry.with_name(entry.name.removesuffix(_ENTRY) + ending)


def _sound(entry: Path) -> bool:
    """Whether an entry is what was recorded of it, and is there with all its files."""
    recorded = _beside(entry, _SUM)
    if not (recorded.is_file() and _beside(entry, _USED).is_file()):
        return False
    return recorded.read_bytes() == _sum(entry)


def tidy(folder: Path) -> int:
    """Remove entries that are damaged or have no checksum, and what is left of others.

    Returns:
        How many entries were removed.

    Raises:
        OSError: if that is not possible.
    """
    entries = {path for path in folder.iterdir() if path.name.endswith(_ENTRY)}
    bad = [path for path in entries if not _sound(path)]
    for path in bad:
        path.unlink(missing_ok=True)
    kept = entries.difference(bad)
    for path in folder.iterdir():
        for ending in (_USED, _SUM):
            name = path.name.removesuffix(ending) + _ENTRY
            if path.name.endswith(ending) and path.with_name(name) not in kept:
                path.unlink(missing_ok=True)
    return len(bad)


class _Recorder:
    """After each compilation, writes the checksum of what was added."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event != _COMPILED:
            return
        # What is not recorded is compiled again one day, which harms nobody.
        with contextlib.suppress(OSError):
            if any(self._new()):
                with _locked(self._folder):
                    for path in self._new():
                        with files.replacing(_beside(path, _SUM)) as temporary:
                            temporary.write_bytes(_sum(path))

    def _new(self) -> Iterator[Path]:
        names = set(os.listdir(self._folder))
        for name in names:
            if name.endswith(_ENTRY):
                path = self._folder / name
                # JAX writes the time of use when the entry is whole.
                whole = _beside(path, _USED).name in names
                if whole and _beside(path, _SUM).name not in names:
                    yield path


def _say_once(say: Say) -> None:
    """What JAX warns of its cache, in one line, and not again for each program."""
    others, told = warnings.showwarning, []

    def show(message: Any, *args: Any, **options: Any) -> None:
        if "persistent compilation cache" not in str(message):
            others(message, *args, **options)
        elif not told:
            told.append(True)
            say(f"program cache: {' '.join(str(message).split())}; going on without it")

    warnings.showwarning = show

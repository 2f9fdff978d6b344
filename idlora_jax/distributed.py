"""Several processes that train together, one for each host or one for each device.

    start(config.distributed)       before anything asks jax for devices
    is_first()                      whether this process prints and writes
    agreed(signal)                  the same number on all, at the same moment
    require_same(settings)          a barrier, and an error where processes differ
    run(work)                       a process that fails ends at once

Processes find each other through a coordinator, which the first of them runs. Under
Slurm and Open MPI jax reads from the environment where it is, how many processes there
are and which one this is; elsewhere `settings.Distributed` says so. One process for
each host has all of its devices; of several on a host, as launchers start them, each
has the device of its number there. With one process every function here returns at
once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from idlora_jax import commandline
from idlora_jax.settings import Distributed, UsageError

LAUNCHERS: Mapping[str, str] = {
    "Slurm": "SLURM_STEP_NUM_TASKS",
    "Open MPI": "OMPI_COMM_WORLD_SIZE",
}
"""How many processes were started together, as the launcher says it to each."""
_ON_THIS_HOST = ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")
_VISIBLE = ("jax_cuda_visible_devices", "jax_rocm_visible_devices")
_GRACE_S = 60
"""How much longer jax itself waits: it ends the process with a dump of its stack."""


def launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    """What started several processes, or None if there is but this one.

    Args:
        environment: its variables.
    """
    for name, variable in LAUNCHERS.items():
        if environment.get(variable, "").isdigit() and int(environment[variable]) > 1:
            return name
    return None


def one_per_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started one process on every host.

    Args:
        environment: its variables.
    """
    found = [environment[name] for name in _ON_THIS_HOST if name in environment]
    return any(re.fullmatch(r"1(\(x\d+\))?", text) for text in found)


def _given_up(said: str, seconds: int) -> NoReturn:
    """End the process in the middle of a call that does not come back."""
    print(
        f"error: distributed: {said}: not all processes met within {seconds} s; start "
        "all of them with the same coordinator, check that they can reach its host and "
        "port, or give --distributed.timeout more seconds",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


@contextlib.contextmanager
def _watched(said: str, seconds: int) -> Iterator[None]:
    timer = threading.Timer(seconds, _given_up, (said, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_port(port: int) -> None:
    """Refuse a port that is taken: jax would crash."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UsageError(
            f"distributed.coordinator: port {port} of this host cannot be used "
            f"({error.strerror}), expected a free one; choose another on all processes"
        ) from None


def _options(settings: Distributed, found: str | None) -> tuple[dict[str, Any], str]:
    """What jax is told, and how errors name it."""
    if settings.coordinator is None:
        return {}, f"started by {found}"
    if settings.process == 0:
        _check_port(int(settings.coordinator.rpartition(":")[2]))
    said = f"process {settings.process} of {settings.processes}"
    options = {
        "coordinator_address": settings.coordinator,
        "num_processes": settings.processes,
        "process_id": settings.process,
        "cluster_detection_method": "deactivate",
    }
    return options, f"{said}, coordinator {settings.coordinator}"


def start(settings: Distributed, environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes, if there are any; before jax is asked for devices.

    Args:
        settings: who the others are; without a coordinator the launcher says so.
        environment: the launcher's variables.

    Raises:
        ValueError: if the launcher's variables are incomplete, or the coordinator
            cannot be started. Where not all processes come in time, this one ends with
            a line on stderr and status 1.
    """
    found = launcher(environment)
    if settings.coordinator is None and found is None:
        return
    options, said = _options(settings, found)
    # A stop is agreed on by `agreed`; jax's own handler would swallow SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _watched(said, settings.timeout):
            jax.distributed.initialize(
                initialization_timeout=settings.timeout + _GRACE_S, **options
            )
        if not options and one_per_host(environment):
            # Under a launcher jax shows each process one device.
            for name in _VISIBLE:
                jax.config.update(name, "all")
    except (ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"distributed: {said}: {reason} Give --distributed.coordinator HOST:PORT "
            "--distributed.processes N --distributed.process I"
        ) from None


def _lost(error: Exception) -> OSError:
    """An error of the devices, or of what they exchange, in words."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return OSError(
        f"process {jax.process_index()} of {jax.process_count()} had to end "
        f"({reason}); see what the others say, and start all again with --resume"
    )


def _one_of_several(work: Callable[[], int | None]) -> int | None:
    try:
        return work()
    except jax.errors.JaxRuntimeError as error:
        raise _lost(error) from None


def run(work: Callable[[], int | None]) -> int | None:
    """What `work` returns, the status of a script.

    One of several processes that fails says why and ends at once: at a usual exit jax
    would wait for the others, which wait for what this one was to send.
    """
    if not jax.distributed.is_initialized():
        return work()
    status = commandline.status_of(lambda: _one_of_several(work))
    if status in (commandline.FAILURE, commandline.USAGE_ERROR):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def agreed(value: int) -> int:
    """The largest of the processes' numbers; all must ask, and wait for each other.

    Raises:
        OSError: if one of them has ended.
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    try:
        return int(np.max(multihost_utils.process_allgather(np.int32(value))))
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise _lost(error) from None


def wait() -> None:
    """Return when all processes have come here."""
    agreed(0)


def require_same(what: str, value: Any) -> None:
    """Wait for all processes, and refuse to go on where they differ.

    Args:
        what: is compared, for the error.
        value: anything JSON.

    Raises:
        ValueError: on every process, if it is not the same on all.
    """
    digest = zlib.crc32(json.dumps(value, sort_keys=True).encode()) >> 1
    if agreed(digest) != -agreed(-digest):
        raise ValueError(
            f"distributed: got processes with different {what}, expected the same on "
            "all; start all with one command, and give them the same files"
        )

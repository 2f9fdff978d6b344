"""Running a script of the tests with eight virtual CPU devices."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import quick_compile

TESTS = pathlib.Path(__file__).parent
DUMP = "dump"


def seen(
    script: str, folder: pathlib.Path, module: str, *arguments: str, timeout: int = 1200
) -> Any:
    """The JSON of its last line. Its compiled programs are in `folder / DUMP`.

    Args:
        script: its file name in tests/.
        folder: in which XLA leaves the programs of that name in `DUMP`.
        module: a pattern of the names of compiled functions.
        arguments: of the script.
        timeout: seconds.
    """
    flags = (
        f"--xla_force_host_platform_device_count=8 {quick_compile.FLAGS} "
        f"--xla_dump_to={folder / DUMP} --xla_dump_hlo_module_re={module}"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(TESTS / script), *arguments],
        capture_output=True,
        text=True,
        env={
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
        },
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

"""Several processes: how they find each other, train, stop and go on together."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import latent_folder
import numpy as np
import pytest
from quick_compile import FLAGS
from train_script import ROOT, lines, wait_for_line

from idlora_jax import distributed, states
from idlora_jax.settings import Distributed, UsageError

TWO_DEVICES = f"{FLAGS} --xla_force_host_platform_device_count=2"
STEPS, STOP = 10, 3


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "processes, process together, or none of them"),
        ({"processes": 2, "process": 0}, r"got \['processes', 'process'\], expected"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "got 'a', expected HOST"),
        ({"coordinator": ":1", "processes": 2, "process": 0}, "HOST:PORT"),
        ({"coordinator": "a:b", "processes": 2, "process": 0}, "HOST:PORT"),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            "got 2, expected 0 to 1",
        ),
        ({"timeout": 0}, "distributed.timeout: got 0, expected 1 or more"),
    ],
)
def test_settings_that_say_too_little_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Distributed(**given)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "16"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": ""}, None),
    ],
    ids=["none", "a script of sbatch", "one task", "srun", "mpirun", "empty"],
)
def test_a_launcher_is_known_by_its_variables(environment, found):
    assert distributed.launcher(environment) == found


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "16"}, False),
    ],
)
def test_one_process_for_a_host_is_known_by_its_variables(environment, alone):
    assert distributed.one_per_host(environment) == alone


def test_one_process_waits_for_nobody():
    distributed.start(Distributed(), {})
    assert distributed.is_first()
    assert [distributed.agreed(n) for n in (0, 15)] == [0, 15]
    distributed.wait()
    distributed.require_same("things", {"any": [1, None]})
    assert distributed.run(lambda: 143) == 143


def test_a_launcher_that_says_too_little_is_refused():
    with pytest.raises(UsageError, match=r"started by Slurm: .* Give --distributed"):
        distributed.start(Distributed(), {"SLURM_STEP_NUM_TASKS": "2"})


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of this host .* choose ano"):
            distributed.start(Distributed(f"localhost:{port}", 2, 0), {})


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": paths}
    return own | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS} | more


def started(arguments: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        env=environment(**more),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def slurm(number: int, job: int) -> dict[str, str]:
    """What srun says to the tasks of a step of two."""
    return {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number),
    }  # fmt: skip


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """No process outlives its test."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_processes_that_do_not_come_are_told_in_one_line(tmp_path):
    settings = f"Distributed('localhost:{free_port()}', 2, 1, 1)"
    code = (
        "from idlora_jax import distributed\n"
        "from idlora_jax.settings import Distributed\n"
        f"distributed.start({settings})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), text=True, capture_output=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: distributed: process 1 of 2, coordinator loc")
    assert "not all processes met within 1 s; start all of them" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[Any], pathlib.Path, str]:
    """What two processes saw, where they wrote, and how the first one ended."""
    folder, job = tmp_path_factory.mktemp("two"), np.random.default_rng().integers(4096)
    arguments = [str(ROOT / "tests" / "two_processes.py"), str(folder)]
    apart = {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    both = [started(arguments, **slurm(n, int(job)), **apart) for n in (0, 1)]
    with ended(*both):
        out = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [1, 0], out
    return [json.loads(text.splitlines()[-1]) for text, _ in out], folder, out[0][1]


@pytest.mark.slow
def test_one_process_for_a_host_may_use_all_of_its_devices(seen):
    """As jax is told; by itself it takes the one of the process's number."""
    assert [f["visible"] for f in seen[0]] == ["all", "all"]


@pytest.mark.slow
def test_each_process_reads_the_rows_of_its_devices(seen):
    found, _, _ = seen
    for name, own in (("data=2", ([0, 1], [2, 3])), ("tensor=2", ([0, 1, 2, 3],) * 2)):
        assert [f[name]["own"] for f in found] == [*own]
        assert [f[name]["held"] for f in found] == [*own]
        assert all(f[name]["whole"] for f in found)


@pytest.mark.slow
def test_what_is_exported_comes_together_on_the_first_process(seen):
    assert [f["gathered"] for f in seen[0]] == ["here", "nowhere"]


@pytest.mark.slow
def test_processes_agree_on_numbers_and_notice_where_they_differ(seen):
    for found in seen[0]:
        assert found["agreed"] == [1, 15, 0]
        assert found["refused"][0].startswith("distributed: got processes with differ")
        assert found["refused"][1] == ""


@pytest.mark.slow
def test_one_process_writes_and_both_save_in_parts(seen):
    found, folder, _ = seen
    assert [f["trained"] for f in found] == [{"step": 6, "saved": 6}] * 2
    logs = [(folder / "toy" / name) for name in ("log.jsonl", "clips.jsonl")]
    assert [lines(log) for log in logs] == [6, 6]
    exported = sorted(path.name for path in (folder / "toy").glob("*.safetensors"))
    assert len(exported) == 2 * 3
    state = folder / "toy" / "state" / "6" / "state"
    assert len([*state.glob("ocdbt.process_*")]) == 2


@pytest.mark.slow
def test_a_value_that_is_not_finite_on_one_process_stops_both_alike(seen):
    texts = {f["poisoned"]["error"] for f in seen[0]}
    assert len(texts) == 1
    assert "first tensor that is not finite: latents audio of clip b4." in texts.pop()


@pytest.mark.slow
def test_hosts_without_a_common_folder_are_refused_on_all(seen):
    for found in seen[0]:
        assert "is not there on all, expected one folder" in found["alone"]


@pytest.mark.slow
def test_a_process_whose_partner_vanished_ends_with_one_line(seen):
    (line,) = (text for text in seen[2].splitlines() if text.startswith("error: "))
    assert line.startswith("error: process 0 of 2 had to end (")
    assert line.endswith("see what the others say, and start all again with --resume")


# The rest trains the tiny model by the script, as users do.


def command(config: Any, output: pathlib.Path, *options: str) -> list[str]:
    """Video alone, which compiles in a third of the time."""
    base, data = config
    given = {"base": base, "data": data, "output": output, "steps": STEPS}
    given |= {"mesh": "fsdp=2", "strategy.name": "text_to_video", "validate-every": 5}
    script = ["train.py", "--config", "configs/tiny.py", "--no-tensorboard"]
    script += ["--strategy.no-with-audio", f"--save-every={STEPS}", "--ema.decay=0.9"]
    script += ["--lora.targets", "blocks/video/self_attn/*", "blocks/video/ff/*"]
    return [*script, *(f"--{name}={value}" for name, value in given.items()), *options]


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_end_bitwise_like_one(
    tiny_model: Any, tmp_path: pathlib.Path
):
    """And one process goes on, bitwise the same, from the state of two."""
    data = latent_folder.write(tmp_path / "clips", 6, text=(128, 48))
    config = tiny_model[0], data
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    two, one, other = (tmp_path / name for name in ("two", "one", "other"))
    where = [f"--distributed.coordinator=localhost:{free_port()}"]
    where += ["--distributed.processes=2"]
    both = [
        started([*command(config, two), *where, f"--distributed.process={n}"], **cache)
        for n in (0, 1)
    ]
    with ended(*both):
        # The first line is of held-out losses, before any step.
        wait_for_line(two / "log.jsonl", both[0], STOP + 1)
        both[1].send_signal(signal.SIGTERM)
        out = [process.communicate(timeout=120) for process in both]
    assert [p.returncode for p in both] == [128 + signal.SIGTERM] * 2, out
    assert "stopped by SIGTERM after" in out[0][0] and "--resume" in out[0][0]
    assert out[1][0].replace("[Gloo]", "").count("\n") <= 1  # gloo's line is not ours
    stopped = states.latest(two / "state")
    assert stopped is not None and STOP <= stopped < STEPS
    shutil.copytree(two, other)

    resume = command(config, two, "--resume")
    job = np.random.default_rng().integers(1, 1 << 20)
    both = [started(resume, **cache, **slurm(n, int(job))) for n in (0, 1)]
    with ended(*both):
        out = [process.communicate(timeout=300) for process in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert "held-out after: loss" in out[0][0] and "held-out" not in out[1][0]

    alone = [command(config, one), command(config, other, "--resume")]
    code = "import json, sys, train\n"
    code += "for sys.argv in json.loads(sys.argv[1]):\n    assert not train.main()"
    process = started(
        ["-c", code, json.dumps(alone)], **cache | {"XLA_FLAGS": TWO_DEVICES}
    )
    with ended(process):
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for end in ("", "_ema"):
        name = f"lora_weights_step_{STEPS:05d}{end}.safetensors"
        files = [(folder / name).read_bytes() for folder in (one, two, other)]
        assert files[0] == files[1] == files[2]
    rows = [
        [json.loads(row) for row in (f / "log.jsonl").read_text().splitlines()]
        for f in (one, two, other)
    ]
    assert [row["step"] for row in rows[1] if "loss" in row] == [*range(1, STEPS + 1)]
    machine = dict.fromkeys(("s_per_step", "tokens_per_s", "peak_memory_gb"), 0)
    for same in zip(*rows, strict=True):
        assert same[0] | machine == same[1] | machine == same[2] | machine

"""Whether a sample is there already, made from the same things.

    origin(job) -> what the sample is made from, as the record beside it says it
    is_finished(job) -> True: nothing to do; False: to be made; an error: made otherwise

A sample is finished if `<name>.json` and all files that it names are there, and its
record names the same settings, weights and inputs. Weights and inputs are compared by
their hashes, so that files may move; settings that change no file do not count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idlora_jax.experiment import flat, plain
from idlora_jax.jobs import Job
from idlora_jax.sample_config import SampleConfig

PATHS = frozenset(
    "base text_encoder upsampler lora lora_strength distilled_lora distilled_strength "
    "reference_audio first_frame continue_from prompts_file input_dir output_dir "
    "name".split()
)
"""Settings for which hashes stand, or that only say where things are."""
WAYS = frozenset(
    "branches batch text_kv without mesh memory tile_size tile_frames text_cache "
    "use_text_cache program_cache use_program_cache precompile preview "
    "save_trajectory overwrite progress verify".split()
)
"""Settings that change how a sample is made, and not the sample."""


def origin(job: Job) -> dict[str, Any]:
    """Settings, and hashes of weights and inputs, as JSON.

    Args:
        job: from `jobs.check`.
    """
    used = [dict(stage.adapters) for stage in job.plan.stages]
    nets = job.nets
    return {
        "settings": plain(job.config),
        "model": {
            "hash": nets.base_hash,
            "generation": nets.generation,
            **job.weights,
        },
        "adapters": [
            {"strength": [stage.get(name, 0.0) for stage in used], **plain(meta)}
            for name, meta in job.adapters.items()
        ],
        "inputs": dict(job.hashes),
    }


def trajectory(config: SampleConfig) -> Path:
    """Where the latents of every step go."""
    return config.output_dir / f"{config.name}.trajectory.safetensors"


def _compared(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal, by name."""
    settings = flat(dict(entry["settings"]))
    kept = {
        name: value
        for name, value in settings.items()
        if name.partition(".")[0] not in PATHS | WAYS
    }
    adapters = {
        str(n): {name: adapter[name] for name in ("content_hash", "strength")}
        for n, adapter in enumerate(entry["adapters"])
    }
    about = {"model": entry["model"], "inputs": entry["inputs"], "lora": adapters}
    return json.loads(json.dumps({**kept, **flat(about)}))


def _read(path: Path) -> tuple[dict[str, Any], dict[Path, int]]:
    """What a record says, and the files that it names, with their sizes.

    Raises:
        ValueError: if it is none of ours.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: int(about["bytes"]) for name, about in entry["files"].items()}
        files = {path.parent / Path(name).name: size for name, size in sizes.items()}
        return _compared(entry), files
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(
            f"{path}: got a file that is no record of a sample, expected none; choose "
            "another name, move it, or give --overwrite"
        ) from None


def is_finished(job: Job) -> bool:
    """Whether the sample is there, made from the same things.

    Args:
        job: from `jobs.check`; `overwrite` makes this False.

    Raises:
        ValueError: if it was made from other things, naming one that differs.
    """
    path = job.config.output_dir / f"{job.config.name}.json"
    if job.config.overwrite or not path.is_file():
        return False
    was, files = _read(path)
    now = _compared(origin(job))
    other = [name for name in {**now, **was} if was.get(name) != now.get(name)]
    if other:
        name = other[0]
        more = f" and {len(other) - 1} more" if other[1:] else ""
        raise ValueError(
            f"{path}: this sample was made with {name} {_short(was.get(name))}, now it "
            f"is {_short(now.get(name))}{more}; choose another name or output_dir, or "
            "give --overwrite"
        )
    if job.config.save_trajectory and not trajectory(job.config).is_file():
        return False
    return all(f.is_file() and f.stat().st_size == size for f, size in files.items())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

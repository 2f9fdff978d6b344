"""Every step of a sample as one safetensors file, and back.

    0/sigmas          f64 [n]          noise level after each step of the first stage
    0/latents/video   f32 [n F H W C]  the latents after it
    0/latents/audio   f32 [n T M C]
    0/x0/video, 0/x0/audio             its guided clean prediction, same shapes
    1/...                              the second stage

Steps are kept in host memory until the sample is done: the format needs the sizes of
all tensors first, and 30 steps of 121 frames of 512 x 512 are 130 MB in float32.
Nothing is rounded: the last latents are those that are decoded, bit by bit.

What else is known stands as JSON in the file's metadata: the names of the stages, the
versions, and what the caller adds (sizes, frames per second, seed).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float64
from safetensors import numpy as tensorfile

import idlora_jax
from idlora_jax import checkpoints
from idlora_jax.files import PathLike, problem, replacing
from idlora_jax.pipeline import Seen
from idlora_jax.types import AV, each

KEY, VERSION = "idlora_trajectory", 1
_KINDS = ("latents", "x0")


class Part(NamedTuple):
    """The n steps of one stage of one sample.

    Attributes:
        stage: its name.
        sigmas: noise levels after the steps, float64 [n].
        latents: after the steps, `AV` of float32 [n F H W C] and [n T M C].
        x0: guided clean predictions of the steps, same shapes.
    """

    stage: str
    sigmas: Float64[np.ndarray, " n"]
    latents: AV
    x0: AV


class Trajectory(NamedTuple):
    """One sample, stage by stage, and what is known of it."""

    parts: tuple[Part, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Recorder:
    """Keeps every step in host memory: pass it as `watch` to `pipeline.sample`.

    Attributes:
        steps: what it saw so far, in float32.
    """

    steps: list[Seen] = field(default_factory=list)

    def __call__(self, seen: Seen) -> None:
        """Copy a step to the host."""

        def copy(x: Any) -> np.ndarray:
            return np.array(x, np.float32)

        latents, x0 = each(copy, seen.latents), each(copy, seen.x0)
        self.steps.append(seen._replace(latents=latents, x0=x0))


def parts(steps: Sequence[Seen], sample: int = 0) -> tuple[Part, ...]:
    """The steps of one sample of the batch, grouped by stage.

    Args:
        steps: in their order; each first step begins a stage.
        sample: its number in the batch.
    """
    starts = [n for n, seen in enumerate(steps) if seen.step == 1]
    pairs = itertools.pairwise([*starts, len(steps)])
    return tuple(_part(steps[a:b], sample) for a, b in pairs)


def _part(steps: Sequence[Seen], sample: int) -> Part:
    def stacked(*arrays: np.ndarray) -> np.ndarray:
        return np.stack([array[sample] for array in arrays])

    sigmas = np.array([seen.sigma for seen in steps], np.float64)
    latents = each(stacked, *(seen.latents for seen in steps))
    x0 = each(stacked, *(seen.x0 for seen in steps))
    return Part(steps[0].stage, sigmas, latents, x0)


def save(
    path: PathLike,
    steps: Sequence[Seen],
    *,
    sample: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write one sample's steps; the file appears when it is complete.

    Args:
        path: the .safetensors file.
        steps: of `Recorder`.
        sample: its number in the batch.
        facts: anything else worth keeping, as JSON.

    Raises:
        ValueError: if there are no steps.
        OSError: if it cannot be written; nothing is left behind.
    """
    found = parts(steps, sample)
    if not found:
        do = "pass the recorder as watch"
        raise problem("trajectories.save", path, "no steps", "at least one", do)
    versions = {"idlora_jax": idlora_jax.__version__, "jax": jax.__version__}
    known = {
        "version": VERSION,
        "stages": [part.stage for part in found],
        "library": versions,
        "facts": dict(facts or {}),
    }
    # Not by save_file, whose files only their owner may read.
    data = tensorfile.save(_tensors(found), {KEY: json.dumps(known)})
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _tensors(found: Sequence[Part]) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for n, part in enumerate(found):
        out[f"{n}/sigmas"] = part.sigmas
        for kind in _KINDS:
            for name, value in getattr(part, kind)._asdict().items():
                if value is not None:
                    out[f"{n}/{kind}/{name}"] = value
    return out


def read(path: PathLike) -> Trajectory:
    """What `save` wrote; the versions stand in its facts under "library".

    Raises:
        ValueError: if the file is missing, damaged or no trajectory.
    """
    tensors, metadata = checkpoints.read_tensors(path)
    expected = f"a trajectory of version {VERSION}"
    try:
        known = json.loads(metadata[KEY])
        good = known["version"] == VERSION
        facts = {**known["facts"], "library": known["library"]}
        names = [str(name) for name in known["stages"]]
        found = tuple(_read(tensors, n, name) for n, name in enumerate(names))
    except (KeyError, TypeError, ValueError):
        good, facts, found = False, {}, ()
    if not good:
        do = "give a file that --save-trajectory wrote, with this version"
        raise problem("trajectories.read", path, "something else", expected, do)
    return Trajectory(found, facts)


def _read(tensors: Mapping[str, np.ndarray], n: int, stage: str) -> Part:
    latents, x0 = (
        AV(*(tensors.get(f"{n}/{kind}/{name}") for name in AV._fields))
        for kind in _KINDS
    )
    return Part(stage, tensors[f"{n}/sigmas"], latents, x0)

"""What the files of a training run say of it, and how a trained base is written.

meta(config, nets, clips) -> AdapterMeta      of every exported adapter
fingerprint(clips) -> str                     what a state's order of clips is of
export_base(path, params, about, like=base)   in mode "full"
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from idlora_jax import as_trained, experiment, geometry, references, strategies
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.data.collection import Collection
from idlora_jax.experiment import TrainConfig
from idlora_jax.types import Tree
from idlora_jax.weights import io, rules
from idlora_jax.weights.networks import Networks


def _lora_facts(config: TrainConfig) -> dict[str, Any]:
    """Ranks and scales as a file says them: alpha is the usual scale times the rank."""
    lora = config.lora
    if config.mode == "full":
        return {"extra": {"mode": "full"}}
    ranks = experiment.patterns("lora.ranks", lora.ranks).values()
    said = {name: " ".join(getattr(lora, name)) for name in ("ranks", "alphas")}
    return {
        "rank": max(lora.rank, *map(int, ranks)) if ranks else lora.rank,
        "alpha": lora.alpha * (math.sqrt(lora.rank) if lora.rslora else 1.0),
        "targets": lora.targets,
        "extra": {name: text for name, text in said.items() if text},
    }


def _downscale(index: Collection) -> int | None:
    """How many times smaller video references are, where there are any.

    Raises:
        ValueError: if that differs between sizes.
    """
    seen = [b for b in index.buckets if b.video_reference]
    found = {
        references.downscale(b.clips[0].video[1:], b.video_reference[1:]) for b in seen
    }
    if len(found) > 1:
        raise ValueError(
            f"data: video references are {sorted(found)} times smaller than their "
            "clips, expected one number for all sizes; preprocess them alike"
        )
    return found.pop() if found else None


def meta(config: TrainConfig, nets: Networks, index: Collection) -> AdapterMeta:
    """What an exported adapter says of the run that trains it.

    Args:
        config: all settings.
        nets: what the networks are.
        index: the clips, held-out ones included.

    Raises:
        ValueError: if video references differ in how much smaller they are.
    """
    spec, sees = config.strategy, strategies.branch(config.strategy)
    facts = _lora_facts(config)
    about = as_trained.recorded(spec, _downscale(index))
    extra = facts.pop("extra") | {"seed": str(config.seed)} | about
    return AdapterMeta(
        generation=nets.generation,
        base_name=Path(config.base).name,
        base_hash=nets.base_hash,
        numerics=config.numerics,
        reference_gap_s=spec.gap_s,
        video_sees_ref=sees.video_sees_ref,
        ref_sees_text=sees.ref_sees_text,
        fps=index.fps,
        reference_s=index.reference / geometry.AUDIO_LATENTS_PER_S,
        extra=extra,
        **facts,
    )


def fingerprint(index: Collection) -> str:
    """What decides the order of the clips: their names, bucket by bucket."""
    buckets = ("\n".join(clip.name for clip in b.clips) for b in index.buckets)
    names = "\n\n".join(buckets)
    return f"{len(index.clips)} clips, {hashlib.sha256(names.encode()).hexdigest()[:8]}"


def as_stored(params: Tree, like: Path) -> Tree:
    """A transformer in the dtypes of a base's file; what is in 8 bits there in 16.

    Args:
        params: its parameters.
        like: the base.
    """
    stored, _ = io.locate(io.open_base(like), "transformer")
    kinds = {p: jnp.bfloat16 if f.narrow else f.spec.dtype for p, f in stored.items()}
    flat = rules.flatten(params)
    return rules.nest({path: w.astype(kinds[path]) for path, w in flat.items()})


def export_base(path: Path, params: Tree, about: AdapterMeta, *, like: Path) -> None:
    """Write a trained transformer under the original key names, in the base's dtypes.

    Args:
        path: of the file.
        params: its parameters, of any device or of the host.
        about: what is said of it in the file's metadata.
        like: the base, whose dtypes and configuration it gets.

    Raises:
        OSError: if it cannot be written; nothing half-written stays.
    """
    opened = io.open_base(like)
    tree = as_stored(jax.device_get(params), like)
    said = opened.metadata | {"training": json.dumps(asdict(about))}
    io.save_original(path, {"transformer": tree}, opened.config, said)

"""A stand-in for the transformer that trains in milliseconds, and clips to train it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idlora_jax import adapters, experiment, runs, strategies, training
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.types import AV, Branch, Prompt, each

WIDTH = 128
TARGETS = ("audio/ff/up", "video/ff/up")
SPEC = experiment.Strategy(coin="sample", sigma="2.0")


class Prepared(NamedTuple):
    prompts: Any


def prepare(variables: Any, streams: AV, prompts: tuple[Prompt, ...]) -> Prepared:
    return Prepared(prompts)


def apply(
    variables: Any,
    prepared: Prepared,
    streams: AV,
    sigma: AV,
    branches: tuple[Branch, ...],
    *,
    targets: AV,
) -> tuple[AV, ...]:
    """One layer of one matrix per modality; the text is added everywhere."""

    def velocity(s: Any, name: str, text: Any) -> Any:
        base, lora = (variables[c]["blocks"][name] for c in ("params", "lora"))
        pair, x = lora["ff"]["up"]["kernel"], s.x
        y = x @ base["ff"]["up"]["kernel"][0] + (x @ pair["a"][0]) @ pair["b"][0]
        return y + 0.01 * jnp.mean(text)

    text = AV(*prepared.prompts[0][:2])
    return (each(velocity, streams, AV("video", "audio"), text),)


def base() -> dict[str, Any]:
    kernel = jnp.asarray(np.random.default_rng(0).normal(0, 0.05, (1, WIDTH, WIDTH)))
    one = {"ff": {"up": {"kernel": kernel.astype(jnp.float32)}}}
    return {"blocks": {"video": one, "audio": one}}


def batch(seed: int, size: int = 2) -> strategies.Batch:
    """Clips whose latents share one pattern, so that there is something to learn."""
    rng = np.random.default_rng(seed)

    def latents(*shape: int) -> jax.Array:
        pattern = np.random.default_rng(1).normal(0, 1, shape[-2:])
        noisy = pattern + 0.1 * rng.normal(0, 1, (size, *shape))
        return jnp.asarray(noisy.astype(np.float32))

    text = jnp.asarray(rng.normal(0, 1, (size, 4, 20)).astype(np.float32))
    return strategies.Batch(
        video=latents(2, 2, 1, WIDTH),
        audio=latents(5, 16, 8),
        reference=latents(3, 16, 8),
        prompt=Prompt(text, text),
    )


def task(**changes: Any) -> training.Task:
    made = training.Task(apply=apply, prepare=prepare, spec=SPEC, scale=0.5)
    return dataclasses.replace(made, **changes)


def adapter(seed: int = 0) -> Any:
    targets = tuple(f"blocks/{t}" for t in TARGETS)
    return adapters.init(jax.random.key(seed), base(), 2, targets)


def run_in(folder: Path, **settings: Any) -> runs.Run:
    """A run of six steps that writes into `folder`."""
    config = experiment.TrainConfig(
        base=Path("base"),
        data=Path("data"),
        output=folder,
        lora=experiment.Lora(rank=2, alpha=1.0),
        optimizer=settings.pop("optimizer", experiment.Optimizer(learning_rate=1e-2)),
        **{"steps": 6, "save_every": 4, **settings},
    )
    return runs.Run(config, AdapterMeta(rank=2, alpha=1.0), {"base": "hash"})

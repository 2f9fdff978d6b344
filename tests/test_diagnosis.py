"""A NaN is planted in every part of a step, and found there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import toy_training as toy

from idlora_jax import diagnosis, experiment, optimizers, training
from idlora_jax.diagnosis import Finding
from idlora_jax.types import AV

KEY = jax.random.key(0)


def found(
    batch: Any = None, base: Any = None, adapter: Any = None, **task: Any
) -> Finding | None:
    tx = optimizers.make_optimizer(experiment.Optimizer(), 10)
    state = training.init(toy.adapter(), toy.base(), tx)
    state = state._replace(adapter=state.adapter if adapter is None else adapter)
    batch = toy.batch(0) if batch is None else batch
    base = toy.base() if base is None else base
    return diagnosis.first(toy.task(**task), KEY, state, base, batch)


def planted(tree: Any, *at: int, value: float = jnp.nan) -> Any:
    """A tree of one shape whose arrays hold one bad value."""
    return jax.tree.map(lambda a: a.at[at].set(value), tree)


def test_nothing_is_found_in_a_step_that_is_finite():
    assert found() is None
    assert "all of that step was finite" in diagnosis.told(None)


@pytest.mark.parametrize("name", ["video", "audio", "reference"])
def test_in_latents_the_clip_is_found(name: str):
    batch = toy.batch(0)
    bad = planted(getattr(batch, name), 1, 0, 0, 0)
    finding = found(batch._replace(**{name: bad}))
    assert finding == Finding("latents", name, 1)
    assert diagnosis.told(finding, ["one", "two"]) == f"latents {name} of clip two"


@pytest.mark.parametrize("name", ["video", "audio"])
def test_in_prompts_the_clip_is_found(name: str):
    batch = toy.batch(0)
    bad = planted(getattr(batch.prompt, name), 0, 3, 5, value=jnp.inf)
    prompt = batch.prompt._replace(**{name: bad})
    finding = found(batch._replace(prompt=prompt))
    assert finding == Finding("prompts", name, 0)
    assert diagnosis.told(finding, ["one"]) == f"prompts {name} of clip one"


def test_in_the_base_the_tensor_and_its_layer_are_found():
    base = toy.base()
    base["blocks"]["video"] = planted(base["blocks"]["video"], 0, 7, 7)
    finding = found(base=base)
    assert finding == Finding("base", "blocks/video/ff/up/kernel", 0)
    assert diagnosis.told(finding) == "base blocks/video/ff/up/kernel[0]"


def test_in_the_adapter_the_tensor_is_found():
    adapter = toy.adapter()
    adapter["blocks"]["audio"] = planted(adapter["blocks"]["audio"], 0, 1, 1)
    assert found(adapter=adapter) == Finding(
        "adapter", "blocks/audio/ff/up/kernel/a", 0
    )


@pytest.mark.parametrize("row", [0, 3])
def test_of_a_batch_in_parts_the_clip_is_found(row: int):
    """What a part computes is told by the row of the batch."""
    bad = planted(toy.batch(0, 4).video, row, 0, 0, 0, value=3e38)

    def apply(*given: Any, **options: Any) -> Any:
        ((video, audio),) = toy.apply(*given, **options)
        return (AV(video * 10, audio),)

    batch = toy.batch(0, 4)._replace(video=bad)
    finding = found(batch, apply=apply, accumulation=2)
    assert finding == Finding("velocities", "video", row)
    names = ["one", "two", "three", "four"]
    assert diagnosis.told(finding, names).endswith(f"of clip {names[row]}")


def velocities(change: Any) -> Any:
    """The toy with its audio velocity changed."""

    def apply(*given: Any, **options: Any) -> Any:
        ((video, audio),) = toy.apply(*given, **options)
        return (AV(video, change(audio)),)

    return apply


def test_of_velocities_the_modality_is_found():
    overflow = velocities(lambda v: v.at[1].multiply(1e38).at[1].multiply(1e38))
    assert found(apply=overflow) == Finding("velocities", "audio", 1)


def test_of_losses_that_overflow_the_modality_is_found():
    finding = found(apply=velocities(lambda v: v + 1e25))
    assert finding == Finding("loss", "audio_loss", None)
    assert diagnosis.told(finding) == "loss audio_loss"


@jax.custom_vjp
def steep(x: jax.Array) -> jax.Array:
    return x


steep.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))


def test_of_gradients_the_tensor_is_found():
    finding = found(apply=velocities(steep))
    assert finding is not None
    assert finding.kind == "gradients"
    assert finding.name.startswith("blocks/audio/ff/up/kernel/")


def test_the_diagnosed_step_is_the_one_of_training():
    tx = optimizers.make_optimizer(experiment.Optimizer(), 10)
    step = training.make_train_step(toy.task(dropout=0.5), tx, KEY)
    state = training.init(toy.adapter(), toy.base(), tx)
    state = state._replace(step=jnp.asarray(3, jnp.int32))

    @jax.jit
    def again(at: Any) -> Any:
        task = toy.task(dropout=0.5)
        inputs, left_out = training.seen(task, KEY, at, toy.batch(0))
        return training.loss(task, toy.base(), toy.adapter(), inputs, key=left_out)

    want, _ = again(state.step)
    _, metrics = step(state, toy.base(), toy.batch(0))
    assert abs(float(want) - float(metrics["loss"])) < 1e-6

"""Training on clips of several sizes and sounds of several lengths, read ahead."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
from typing import Any

import jax
import jax.numpy as jnp
import latent_folder
import numpy as np
import pytest
import toy_training as toy

from idlora_jax import experiment, heldout, loop, optimizers, runs, states, training
from idlora_jax.data import collection, reading
from idlora_jax.data.order import Order
from idlora_jax.strategies import Batch
from idlora_jax.types import AV, Prompt

STEPS = 9


def connect(features: AV, mask: Any) -> Prompt:
    return Prompt(*(jnp.asarray(f, jnp.float32) for f in features))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> collection.Collection:
    """Two sizes, one of them with sounds and references of several lengths."""
    root = tmp_path_factory.mktemp("clips")
    latent_folder.write(root / "64x64x17", 3)
    short = latent_folder.tensors(7, audio=7, reference=3)
    latent_folder.write_clip(root / "64x64x17", "short", short)
    latent_folder.write(root / "64x32x17", 5, size=(3, 2, 1))
    return collection.index(root)


@functools.cache
def step_of(optimizer: experiment.Optimizer) -> tuple[Any, Any, list[int]]:
    """An optimizer, its step, and an entry for each time that step was traced."""
    traced: list[int] = []

    def prepare(variables: Any, streams: AV, prompts: Any) -> Any:
        traced.extend([1] * len(prompts))
        return toy.prepare(variables, streams, prompts)

    tx = optimizers.make_optimizer(optimizer, STEPS)
    task = toy.task(prepare=prepare)
    return tx, training.make_train_step(task, tx, jax.random.key(0)), traced


def train(
    run: runs.Run, clips: collection.Collection, stop: int | None = None, **options: Any
) -> Any:
    """The state after a run."""
    config = run.config
    tx, step, _ = step_of(config.optimizer)
    newest = runs.newest(run)
    new = training.init(toy.adapter(), toy.base(), tx)
    state = runs.start(run, newest, new)
    order = Order(clips.counts, config.batch_size, config.seed)
    data = reading.batches(clips, connect, order, count=config.steps)
    place = {"seen": newest or 0, "position": runs.position(run, newest)}
    with reading.opened(data, **place, **options) as reader:

        def batches(seen: int) -> Batch:
            if seen == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return reader(seen)

        hooks = loop.Hooks(names=data.names, position=reader.position)
        return loop.train(run, step, state, toy.base(), batches, hooks)[0]


def run_in(folder: pathlib.Path, **settings: Any) -> runs.Run:
    return toy.run_in(folder, steps=STEPS, batch_size=2, **settings)


def order_of(run: runs.Run) -> list[Any]:
    return [json.loads(line) for line in run.order.read_text().splitlines()]


def test_a_step_is_traced_once_for_each_size(tmp_path, clips):
    run = run_in(tmp_path)
    train(run, clips)
    *_, traced = step_of(run.config.optimizer)
    assert len(traced) == len(clips.buckets) == 2
    sizes = [{n.split("/")[0] for n in row["clips"]} for row in order_of(run)]
    assert all(len(found) == 1 for found in sizes)
    assert {*map(tuple, sizes)} == {("64x64x17",), ("64x32x17",)}
    seen = [name for row in order_of(run)[:4] for name in row["clips"]]
    assert len(set(seen)) == 8  # of nine clips one waits for the next epoch


def test_a_stopped_run_goes_on_with_the_same_clips_and_ends_bitwise_alike(
    tmp_path, clips
):
    straight = run_in(tmp_path / "straight")
    want = train(straight, clips, ahead=0)
    stopped = run_in(tmp_path / "stopped")
    for stop, ahead in ((2, 3), (5, 1)):
        train(stopped, clips, stop, ahead=ahead)
        newest = states.latest(stopped.states)
        assert newest == stop + 1
        assert states.meta_of(stopped.states, newest)["data"] == {"next_index": newest}
        stopped = run_in(tmp_path / "stopped", resume=True)
    got = train(stopped, clips, ahead=4)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert order_of(stopped) == order_of(straight)
    assert [row["batch"] for row in order_of(straight)] == [*range(1, STEPS + 1)]


def test_a_state_whose_reader_stood_elsewhere_is_refused(tmp_path, clips, monkeypatch):
    run = run_in(tmp_path)
    train(run, clips, 2)
    again = run_in(tmp_path, resume=True)
    monkeypatch.setattr(runs, "position", lambda *_: {"next_index": 1})
    with pytest.raises(ValueError, match="at batch 1, the training state at 3"):
        train(again, clips)


def test_a_batchs_own_frame_rate_comes_before_the_tasks(clips):
    order = Order(clips.counts, 2)
    batch = reading.batches(clips, connect, order, count=1)[0]
    assert batch.rate is not None
    fast = batch._replace(rate=type(batch.rate)(50.0))
    task, key = toy.task(fps=12.5), jax.random.key(0)

    def ends(batch: Batch) -> float:
        inputs, _ = training.seen(task, key, jnp.int32(0), batch)
        return float(inputs.streams.video.pos[0, 0, -1, 1])

    plain = batch._replace(rate=None)
    assert [ends(b) for b in (batch, fast, plain)] == pytest.approx(
        [17 / 25, 17 / 50, 17 / 12.5]
    )


def test_the_held_out_loss_is_the_mean_over_the_clips_of_all_sizes(tmp_path, clips):
    kept = experiment.HeldOut(clips=3, sigmas=(0.25, 0.75))
    run = run_in(tmp_path, heldout=kept, strategy=toy.SPEC)
    _, held = collection.split(clips, 3)
    assert held.counts == (2, 1)
    tx, *_ = step_of(run.config.optimizer)
    adapter = jax.tree.map(lambda x: x + 0.1, toy.adapter())
    state = training.init(adapter, toy.base(), tx)

    def losses(held: collection.Collection) -> dict[str, float]:
        given = run.config, held, toy.task(), state.adapter, toy.base(), connect
        found = heldout.losses(*given)(state)
        assert found is not None
        return found

    together = losses(held)
    apart = [
        losses(collection.Collection(held.root, (bucket,))) for bucket in held.buckets
    ]
    assert "audio_loss@0.75" in together
    for name, value in together.items():
        first, second = (part[name] for part in apart)
        assert first != second
        assert value == pytest.approx((2 * first + second) / 3)

"""One training step: what it changes, what it depends on, what it costs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick_compile
import small_transformer as small
import toy_training as toy

from idlora_jax import (
    adapters,
    evaluation,
    experiment,
    optimizers,
    strategies,
    training,
)
from idlora_jax.config import transformer_config
from idlora_jax.model import transformer
from idlora_jax.types import AV, Branch

OPTIMIZER = experiment.Optimizer(learning_rate=1e-2)
SIGMAS = jnp.asarray(experiment.HeldOut().sigmas)


def state_of(tx: Any, seed: int = 0) -> training.TrainState:
    return training.init(toy.adapter(seed), toy.base(), tx)


@functools.cache
def toy_step(settings: experiment.Optimizer = OPTIMIZER, seed: int = 0) -> Any:
    tx = optimizers.make_optimizer(settings, 100)
    return tx, training.make_train_step(toy.task(), tx, jax.random.key(seed))


def run(steps: int, settings: experiment.Optimizer = OPTIMIZER, **options: Any) -> Any:
    """The state and the metrics after some steps from the start."""
    tx, step = toy_step(settings, options.get("seed", 0))
    state, metrics = state_of(tx), {}
    for n in range(steps):
        state, metrics = step(state, toy.base(), toy.batch(options.get("batch", n)))
    return state, metrics


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def differ(a: Any, b: Any) -> bool:
    return any(
        (np.asarray(x) != np.asarray(y)).any()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_same_key_gives_the_same_step_and_another_key_another():
    same(run(1), run(1))
    assert differ(run(1)[0].adapter, run(1, seed=1)[0].adapter)


def test_every_step_draws_anew_from_its_number():
    tx, step = toy_step()
    first, _ = step(state_of(tx), toy.base(), toy.batch(0))
    later = state_of(tx)._replace(step=jnp.asarray(7, jnp.int32))
    second, _ = step(later, toy.base(), toy.batch(0))
    assert differ(first.adapter, second.adapter)
    assert int(second.step) == 8


def test_given_draws_take_the_place_of_the_keys():
    tx, step = toy_step()
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = jax.jit(strategies.draw, static_argnums=2)(key, toy.batch(0), toy.SPEC)
    given, _ = step(state_of(tx), toy.base(), toy.batch(0), draws)
    # Compiled apart, so that sums may be ordered otherwise.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        given.adapter,
        run(1)[0].adapter,
    )


def test_the_loss_is_the_sum_of_its_parts():
    _, metrics = run(1)
    total = metrics["video_loss"] + metrics["audio_loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    task = toy.task(spec=dataclasses.replace(toy.SPEC, audio_weight=0.0))
    draws = strategies.draw(jax.random.key(0), toy.batch(0), toy.SPEC)
    inputs = strategies.prepare(draws, toy.batch(0), toy.SPEC)
    loss, parts = training.loss(task, toy.base(), toy.adapter(), inputs)
    assert loss == parts["video_loss"]
    assert parts["audio_loss"] > 0


def test_the_adapter_is_scaled_inside_the_loss():
    batch = toy.batch(0)
    draws = strategies.draw(jax.random.key(0), batch, toy.SPEC)
    inputs = strategies.prepare(draws, batch, toy.SPEC)
    trained = run(3)[0].adapter
    half = training.predict(toy.task(scale=0.5), toy.base(), trained, inputs)
    folded = adapters.scale(trained, 0.5)
    whole = training.predict(toy.task(scale=1.0), toy.base(), folded, inputs)
    small.close(half, whole)


def test_the_step_passes_on_the_branch_of_the_strategy():
    seen: list[tuple[Branch, ...]] = []

    def apply(*args: Any, **options: Any) -> Any:
        seen.append(args[4])
        return toy.apply(*args, **options)

    task, batch = toy.task(apply=apply), toy.batch(0)
    inputs = strategies.prepare(
        strategies.draw(jax.random.key(0), batch, toy.SPEC), batch, toy.SPEC
    )
    training.predict(task, toy.base(), toy.adapter(), inputs)
    assert seen == [(strategies.branch(toy.SPEC),)]


def test_a_step_that_is_not_finite_counts_but_changes_nothing():
    tx, step = toy_step()
    good, bad = toy.batch(0), toy.batch(0)
    bad = bad._replace(audio=bad.audio.at[0, 0, 0, 0].set(jnp.nan))
    state, _ = step(state_of(tx), toy.base(), good)
    kept = jax.tree.map(np.asarray, state)
    state, metrics = step(state, toy.base(), bad)
    assert metrics["skipped"] == 1
    assert int(state.step) == 2
    same(kept._replace(step=0), state._replace(step=0))
    state, metrics = step(state, toy.base(), good)
    assert metrics["skipped"] == 0
    assert differ(kept.adapter, state.adapter)


def test_an_adapter_of_another_width_is_refused_when_training_is_set_up():
    tx, _ = toy_step()
    other = jax.tree.map(lambda a: a[..., :-1, :], toy.adapter())
    with pytest.raises(ValueError, match="adapter does not fit the base"):
        training.init(other, toy.base(), tx)


def test_the_step_is_traced_once():
    traces: list[int] = []

    def apply(*args: Any, **options: Any) -> Any:
        traces.append(1)
        return toy.apply(*args, **options)

    tx, _ = toy_step()
    step = training.make_train_step(toy.task(apply=apply), tx, jax.random.key(0))
    state = state_of(tx)
    for n in range(3):
        state, _ = step(state, toy.base(), toy.batch(n))
    assert len(traces) == 1


def test_computing_in_bfloat16_keeps_adapter_and_loss_in_float32():
    seen: list[Any] = []

    def apply(*args: Any, **options: Any) -> Any:
        seen.append((args[2].video.x.dtype, args[1].prompts[0].video.dtype))
        return toy.apply(*args, **options)

    task = toy.task(apply=apply, dtype=jnp.bfloat16)
    tx, _ = toy_step()
    step = training.make_train_step(task, tx, jax.random.key(0))
    state, metrics = step(state_of(tx), toy.base(), toy.batch(0))
    assert seen[0] == (jnp.bfloat16, jnp.bfloat16)
    assert metrics["loss"].dtype == jnp.float32
    np.testing.assert_allclose(metrics["loss"], run(1)[1]["loss"], rtol=1e-2)
    kinds = {x.dtype for x in jax.tree.leaves((state.adapter, state.opt_state))}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}


METHODS = {
    "adamw8bit": {},
    "lion": {"betas": (0.9, 0.99)},
    "prodigy": {"learning_rate": 1.0},
    "schedule_free": {"schedule": "constant", "warmup": 2},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_the_same_step(name: Any):
    settings = dataclasses.replace(OPTIMIZER, name=name, **METHODS[name])
    draws = strategies.draw(jax.random.key(3), toy.batch(0), toy.SPEC)
    inputs = strategies.prepare(draws, toy.batch(0), toy.SPEC)
    loss = lambda adapter: training.loss(toy.task(), toy.base(), adapter, inputs)[0]
    # Prodigy begins with a millionth and takes its time.
    state, _ = run(100 if name == "prodigy" else 20, settings, batch=0)
    assert loss(state.evaluated) < 0.95 * loss(toy.adapter())


def test_the_moving_average_is_part_of_the_state():
    tx = optimizers.make_optimizer(OPTIMIZER, 100, ema=experiment.Ema(0.5))
    step = training.make_train_step(toy.task(), tx, jax.random.key(0))
    state = state_of(tx)
    same(state.ema, state.adapter)
    want = toy.adapter()
    for n in range(3):
        state, _ = step(state, toy.base(), toy.batch(n))
        want = jax.tree.map(lambda e, p: 0.5 * e + 0.5 * p, want, state.adapter)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, want
    )
    kept = jax.tree.map(np.asarray, state.ema)
    bad = toy.batch(0)
    bad = bad._replace(audio=bad.audio.at[0, 0, 0, 0].set(jnp.nan))
    state, _ = step(state, toy.base(), bad)
    same(state.ema, kept)


def test_the_scale_may_differ_from_module_to_module():
    batch = toy.batch(0)
    inputs = strategies.prepare(
        strategies.draw(jax.random.key(0), batch, toy.SPEC), batch, toy.SPEC
    )
    settings = experiment.Lora(rank=2, alpha=1.0, alphas=("blocks/video/*=4",))
    trained = run(3)[0].adapter
    own = training.predict(toy.task(scale=settings.factor), toy.base(), trained, inputs)
    for name, scale in (("video", 2.0), ("audio", 0.5)):
        task = toy.task(scale=scale)
        want = training.predict(task, toy.base(), trained, inputs)
        np.testing.assert_array_equal(getattr(own, name), getattr(want, name))


# With the transformer of two layers.


def real_task(generation: str = "2.0", **options: Any) -> training.Task:
    cfg = small.config(generation)
    return training.Task(
        transformer.bind(cfg, **options),
        functools.partial(transformer.prepare, cfg),
        experiment.Strategy(coin="sample", sigma="2.0"),
        scale=1.0,
    )


def real_batch(seed: int, generation: str = "2.0") -> strategies.Batch:
    made = toy.batch(seed)
    text = small.prompt(generation, batch=2)
    return made._replace(prompt=text, video=made.video)


def test_the_gradient_holds_a_and_b_of_the_adapter_and_nothing_else():
    task, batch, base = real_task(), real_batch(0), small.base("2.0")
    adapter = adapters.init(jax.random.key(0), base, 2)
    draws = strategies.draw(jax.random.key(0), batch, task.spec)
    inputs = strategies.prepare(draws, batch, task.spec)

    def loss(adapter: Any, base: Any) -> Any:
        return training.loss(task, base, adapter, inputs)[0]

    grads = jax.eval_shape(jax.grad(loss), adapter, base)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(grads)}  # pyright: ignore
    assert names == {"a", "b"}
    assert len(jax.tree.leaves(grads)) == 2 * 18


def real_inputs(task: training.Task) -> Any:
    batch = real_batch(0)
    draws = strategies.draw(jax.random.key(0), batch, task.spec)
    return strategies.prepare(draws, batch, task.spec)


@pytest.mark.slow
def test_dropout_leaves_out_inputs_of_the_adapter_in_training_alone():
    adapter = small.random_like(
        jax.eval_shape(
            lambda k: adapters.init(k, small.base("2.0"), 2), jax.random.key(0)
        )
    )
    task = dataclasses.replace(real_task(remat="none"), dropout=0.5)
    inputs, base = real_inputs(task), small.base("2.0")

    @jax.jit
    def grads(key: Any) -> Any:
        f = lambda a: training.loss(task, base, a, inputs, key=key)[0]
        return jax.value_and_grad(f)(adapter)

    without = jax.jit(lambda: training.loss(task, base, adapter, inputs)[0])()
    losses = [grads(jax.random.key(n)) for n in (0, 0, 1)]
    same(losses[0], losses[1])
    assert losses[0][0] != losses[2][0]
    assert losses[0][0] != without
    assert jax.tree.structure(losses[0][1]) == jax.tree.structure(adapter)


@pytest.mark.slow
def test_every_parameter_is_trained_in_mode_full():
    base = jax.tree.map(jnp.copy, small.base("2.0"))
    task = real_task(remat="none", scanned=("params",))
    task = dataclasses.replace(task, mode="full")
    settings = experiment.Optimizer(learning_rate=1e-3, schedule="constant")
    tx = optimizers.make_optimizer(settings, 10)
    step = training.make_train_step(task, tx, jax.random.key(0))
    state = training.init(base, {}, tx)
    draws = strategies.draw(jax.random.key(0), real_batch(0), task.spec)
    losses = []
    for _ in range(4):
        state, metrics = step(state, {}, real_batch(0), draws)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    assert jax.tree.structure(state.adapter) == jax.tree.structure(small.base("2.0"))
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), state.adapter, small.base("2.0")
    )
    still = [p for p, m in jax.tree_util.tree_leaves_with_path(moved) if not m]
    assert not still


def throttle() -> optax.GradientTransformation:
    """Multiply updates by a factor kept in the state: 0 is learning rate 0."""
    return optax.GradientTransformation(
        lambda params: jnp.ones(()),
        lambda updates, factor, params=None: (
            jax.tree.map(lambda u: u * factor, updates),
            factor,
        ),
    )


@pytest.mark.slow
def test_the_held_out_audio_loss_falls_for_every_seed_but_not_at_rate_0():
    settings = dataclasses.replace(OPTIMIZER, learning_rate=5e-3)
    tx = optax.chain(optimizers.make_optimizer(settings, 30), throttle())
    task, base = real_task(remat="none"), small.base("2.0")
    step = training.make_train_step(task, tx, jax.random.key(0))
    evaluate = evaluation.make_evaluate(task)
    draw = jax.jit(strategies.draw, static_argnums=2)

    def audio_losses(seed: int, factor: float) -> tuple[float, float]:
        held = real_batch(1000 + seed)
        key = jax.random.key(seed)
        noise = draw(key, held, task.spec).noise
        adapter = adapters.init(key, base, 4)
        state = training.init(adapter, base, tx)
        state = state._replace(
            opt_state=(*state.opt_state[:-1], jnp.asarray(factor, jnp.float32))
        )
        before = evaluate(adapter, base, held, SIGMAS, noise)["audio_loss"]
        for n in range(30):
            batch = real_batch(100 * seed + n)
            draws = draw(jax.random.fold_in(key, n), batch, task.spec)
            state, _ = step(state, base, batch, draws)
        after = evaluate(state.adapter, base, held, SIGMAS, noise)["audio_loss"]
        return float(before), float(after)

    for seed in range(3):
        before, after = audio_losses(seed, 1.0)
        assert after < 0.95 * before, f"seed {seed}"
    before, after = audio_losses(0, 0.0)
    assert after == before


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
def test_the_backward_pass_never_copies_the_weight_stack(remat: Any):
    width = 64
    wide = {
        "num_layers": 8,
        "attention_head_dim": width,
        "cross_attention_dim": 2 * width,
        "audio_attention_head_dim": width,
        "audio_cross_attention_dim": 2 * width,
    }
    cfg = transformer_config({"transformer": small.COMMON | wide})
    base = jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))
    adapter = jax.eval_shape(
        lambda k: adapters.init(k, base, 1, ("blocks/audio/ff/*",)), jax.random.key(0)
    )
    task = dataclasses.replace(
        real_task(), apply=transformer.bind(cfg, remat=remat),
        prepare=functools.partial(transformer.prepare, cfg),
    )  # fmt: skip
    batch = jax.tree.map(lambda x: x[:1], real_batch(0))
    draws = strategies.draw(jax.random.key(0), batch, task.spec)
    inputs = strategies.prepare(draws, batch, task.spec)

    def loss(adapter: Any, base: Any) -> Any:
        return training.loss(task, base, adapter, inputs)[0]

    # Buffers are assigned before the machine code, which need not be good.
    lowered = jax.jit(jax.grad(loss)).lower(adapter, base)
    memory = lowered.compile(compiler_options=quick_compile.OPTIONS).memory_analysis()
    stack = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base["blocks"]))
    assert memory is not None
    assert memory.temp_size_in_bytes < stack / 2


def test_without_sound_only_the_video_is_trained():
    spec = dataclasses.replace(toy.SPEC, name="text_to_video")
    silent = toy.batch(0)._replace(audio=None, reference=None)
    draws = strategies.draw(jax.random.key(0), silent, spec)
    inputs = strategies.prepare(draws, silent, spec)
    loss, parts = training.loss(toy.task(spec=spec), toy.base(), toy.adapter(), inputs)
    assert loss == parts["video_loss"] > 0
    assert parts["audio_loss"] == 0
    assert strategies.targets(inputs) == AV(4, None)

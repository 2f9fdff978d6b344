"""The training loop: stopping, resuming, logging, refusing."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_training as toy

from idlora_jax import (
    adapters,
    checkpoints,
    diagnosis,
    experiment,
    loop,
    optimizers,
    records,
    runs,
    states,
    training,
)
from idlora_jax.settings import Distributed
from idlora_jax.strategies import Batch


@functools.cache
def step_of(optimizer: experiment.Optimizer, steps: int, ema: experiment.Ema) -> Any:
    tx = optimizers.make_optimizer(optimizer, steps, ema=ema)
    task = toy.task(accumulation=optimizer.accumulation)
    return tx, training.make_train_step(task, tx, jax.random.key(0))


def train(
    run: runs.Run, batches: Any = toy.batch, hooks: loop.Hooks = loop.NOTHING
) -> Any:
    tx, step = step_of(run.config.optimizer, run.config.steps, run.config.ema)
    new = training.init(toy.adapter(), toy.base(), tx)
    state = runs.start(run, runs.newest(run), new)
    return loop.train(run, step, state, toy.base(), batches, hooks)


def rows(run: runs.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.log.read_text().splitlines()]


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stopping_at(n: int, kind: int = signal.SIGTERM) -> Any:
    """Batches whose n-th arrives together with a signal."""

    def batches(at: int) -> Batch:
        if at == n:
            os.kill(os.getpid(), kind)
        return toy.batch(at)

    return batches


ACCUMULATED = experiment.Optimizer(learning_rate=1e-2, accumulation=2)


@pytest.mark.parametrize("optimizer", [None, ACCUMULATED], ids=["plain", "accumulated"])
@pytest.mark.parametrize("stop", [0, 2, 5])
def test_a_stopped_and_resumed_run_ends_bitwise_like_a_straight_one(
    tmp_path: pathlib.Path, optimizer: Any, stop: int
):
    settings = {} if optimizer is None else {"optimizer": optimizer}
    straight = toy.run_in(tmp_path / "straight", **settings)
    want, ended_by = train(straight)
    assert ended_by is None
    first = toy.run_in(tmp_path / "stopped", **settings)
    part, ended_by = train(first, stopping_at(stop))
    assert ended_by == signal.SIGTERM
    assert int(part.step) == stop + 1
    again = toy.run_in(tmp_path / "stopped", resume=True, **settings)
    got, ended_by = train(again)
    assert ended_by is None
    same(got, want)
    assert again.adapter(6).read_bytes() == straight.adapter(6).read_bytes()
    assert [row["step"] for row in rows(again)] == [1, 2, 3, 4, 5, 6]
    for new, old in zip(rows(again), rows(straight), strict=True):
        assert new["lr"] == old["lr"]
        assert new["loss"] == old["loss"]


AVERAGED = {"optimizer": experiment.Optimizer(name="adamw8bit", learning_rate=1e-2)}
AVERAGED |= {"ema": experiment.Ema(0.5, start=1)}
OTHERS = {
    "adamw8bit, averaged": AVERAGED,
    "prodigy": {"optimizer": experiment.Optimizer(name="prodigy", learning_rate=1.0)},
    "schedule_free": {
        "optimizer": experiment.Optimizer(
            name="schedule_free", learning_rate=1e-2, schedule="constant"
        )
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_resume_bitwise_too(tmp_path: pathlib.Path, name: str):
    want, _ = train(toy.run_in(tmp_path / "straight", **OTHERS[name]))
    train(toy.run_in(tmp_path / "stopped", **OTHERS[name]), stopping_at(2))
    got, _ = train(toy.run_in(tmp_path / "stopped", resume=True, **OTHERS[name]))
    same(got, want)


def test_the_average_is_exported_beside_the_adapter(tmp_path: pathlib.Path):
    run = toy.run_in(tmp_path, ema=experiment.Ema(0.5))
    state, _ = train(run)
    key = "diffusion_model.transformer_blocks.0.audio_ff.net.0.proj.lora_B.weight"
    for tree, name in ((state.adapter, ""), (state.ema, "_ema")):
        path = tmp_path / f"lora_weights_step_00006{name}.safetensors"
        tensors, metadata = checkpoints.read_tensors(path)
        b = tree["blocks"]["audio"]["ff"]["up"]["kernel"]["b"]
        np.testing.assert_array_equal(tensors[key], 0.5 * b[0].T)
        extra = json.loads(metadata["idlora"])["extra"]
        assert extra == ({"ema_decay": "0.5"} if name else {})
    assert len([*tmp_path.glob("*_ema.safetensors")]) == 2


def test_schedule_free_exports_its_mean(tmp_path: pathlib.Path):
    run = toy.run_in(tmp_path, **OTHERS["schedule_free"])
    state, _ = train(run)
    tensors, _ = checkpoints.read_tensors(run.adapter(6))
    key = "diffusion_model.transformer_blocks.0.audio_ff.net.0.proj.lora_B.weight"
    mean, last = (
        tree["blocks"]["audio"]["ff"]["up"]["kernel"]["b"][0].T
        for tree in (state.evaluated, state.adapter)
    )
    np.testing.assert_array_equal(tensors[key], 0.5 * mean)
    assert (tensors[key] != 0.5 * last).any()


def test_ctrl_c_stops_like_sigterm_and_the_handlers_come_back(tmp_path: pathlib.Path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    state, ended_by = train(toy.run_in(tmp_path), stopping_at(1, signal.SIGINT))
    assert ended_by == signal.SIGINT
    assert int(state.step) == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_signal_acts_as_if_there_were_no_training():
    before = signal.getsignal(signal.SIGTERM)
    with loop.stopping() as caught:
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == before


def test_adapters_are_exported_scaled_with_their_facts(tmp_path: pathlib.Path):
    run = toy.run_in(tmp_path)
    state, _ = train(run)
    assert run.adapter(6).name == "lora_weights_step_00006.safetensors"
    tensors, metadata = checkpoints.read_tensors(run.adapter(6))
    assert run.adapter(4).is_file()
    key = "diffusion_model.transformer_blocks.0.audio_ff.net.0.proj.lora_B.weight"
    b = state.adapter["blocks"]["audio"]["ff"]["up"]["kernel"]["b"]
    np.testing.assert_array_equal(tensors[key], 0.5 * b[0].T)
    assert tensors[key].dtype == np.float32
    meta = json.loads(metadata["idlora"])
    assert (meta["step"], meta["rank"], meta["alpha"]) == (6, 2, 1.0)


def test_only_the_newest_states_stay(tmp_path: pathlib.Path):
    run = toy.run_in(tmp_path, save_every=1, keep=2)
    train(run)
    assert sorted(int(p.name) for p in run.states.iterdir()) == [5, 6]
    assert len(list(tmp_path.glob("lora_weights_step_*.safetensors"))) == 6


def test_the_state_of_the_lowest_held_out_loss_stays_too(tmp_path: pathlib.Path):
    losses = {1: {"loss": 0.4}, 2: {"loss": 0.3}, 4: {"loss": 0.5}}
    hooks = loop.Hooks(validate=lambda updates, state: losses.get(updates))
    run = toy.run_in(tmp_path, save_every=1, keep=1)
    train(run, hooks=hooks)
    assert sorted(int(p.name) for p in run.states.iterdir()) == [2, 6]


def sampling(run: runs.Run, clips: Any = ("a", "b")) -> Any:
    """A hook that gives these clips after every other step, and what it was asked."""
    asked: list[int] = []

    def sample(updates: int, state: Any) -> Any:
        assert int(state.step) == updates
        if updates % 2 == 0:
            for name in clips:
                asked.append(updates)
                yield records.Sampled(f"samples/{name}", message="full" * (name == "b"))

    return sample, asked


def test_clips_are_sampled_before_the_first_step_and_after_others(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    run = toy.run_in(tmp_path)
    sample, asked = sampling(run)
    state, _ = train(run, hooks=loop.Hooks(sample=sample))
    assert asked == [0, 0, 2, 2, 4, 4, 6, 6]
    told = [row for row in rows(run) if "samples/written" in row]
    assert [row["step"] for row in told] == [0, 2, 4, 6]
    assert {(row["samples/written"], row["samples/failed"]) for row in told} == {(1, 1)}
    assert capsys.readouterr().err.count("warning: samples/b: full") == 4
    # What fails and what is shown changes nothing in training.
    same(state, train(toy.run_in(tmp_path / "straight"))[0])


def test_a_signal_is_heeded_after_the_clip_in_hand(tmp_path: pathlib.Path):
    run = toy.run_in(tmp_path)

    def sample(updates: int, state: Any) -> Any:
        for name in "abc" if updates == 2 else "":
            if name == "b":
                os.kill(os.getpid(), signal.SIGTERM)
            yield records.Sampled(f"samples/{name}")

    state, stopped = train(run, hooks=loop.Hooks(sample=sample))
    assert (int(state.step), stopped) == (2, signal.SIGTERM)
    (told,) = [row for row in rows(run) if "samples/written" in row]
    assert told["samples/written"] == 2
    assert states.latest(run.states) == 2


def test_clips_that_were_there_at_the_start_are_not_logged_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    shown: list[tuple[int, str]] = []
    monkeypatch.setattr(
        records.Records, "show", lambda _, step, clip: shown.append((step, clip.name))
    )
    train(toy.run_in(tmp_path), stopping_at(4))

    def sample(updates: int, state: Any) -> Any:
        # One was there at the state that is gone on from, one came after it.
        yield records.Sampled("old", new=False)
        yield records.Sampled("new")

    train(toy.run_in(tmp_path, resume=True), hooks=loop.Hooks(sample=sample))
    assert shown == [(5, "new"), (6, "old"), (6, "new")]


def test_a_disk_that_is_full_of_clips_ends_the_run_with_its_state_saved(
    tmp_path: pathlib.Path,
):
    def sample(updates: int, state: Any) -> Any:
        if updates == 4:
            raise OSError(28, "No space left on device")
        yield from ()

    run = toy.run_in(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        train(run, hooks=loop.Hooks(sample=sample))
    assert states.latest(run.states) == 4


def test_the_loss_before_the_first_step_is_logged_once(tmp_path: pathlib.Path):
    hooks = loop.Hooks(validate=lambda updates, _: {"loss": 1.0 + updates})
    run = toy.run_in(tmp_path)
    run.log.write_text('{"step": 0, "heldout/loss": 9.0}\n{"step": 1}\n')
    train(run, stopping_at(2), hooks)
    train(toy.run_in(tmp_path, resume=True), hooks=hooks)
    losses = [row["heldout/loss"] for row in rows(run) if "heldout/loss" in row]
    assert losses == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_an_adapter_that_a_kill_kept_from_being_exported_is_at_the_next_start(
    tmp_path: pathlib.Path,
):
    run = toy.run_in(tmp_path, ema=experiment.Ema(0.9))
    train(run)
    averaged = run.adapter(6).with_stem("lora_weights_step_00006_ema")
    want = [path.read_bytes() for path in (run.adapter(6), averaged)]
    half = tmp_path / ".lora_weights_step_00006.77.tmp.safetensors"
    run.adapter(6).rename(half)
    averaged.unlink()
    train(toy.run_in(tmp_path, resume=True, ema=experiment.Ema(0.9)))
    assert [path.read_bytes() for path in (run.adapter(6), averaged)] == want
    assert not half.exists()


def test_the_clips_of_each_batch_are_listed_in_order(tmp_path: pathlib.Path):
    hooks = loop.Hooks(names=lambda seen: [f"clip{seen}"])
    run = toy.run_in(tmp_path)
    train(run, stopping_at(2), hooks)
    with run.order.open("a") as file:  # as if killed in the fourth batch
        file.write('{"batch": 4, "clips": ["other"]}\n{"bat')
    with run.log.open("a") as file:
        file.write('{"step": 4, "loss"')
    train(toy.run_in(tmp_path, resume=True), hooks=hooks)
    listed = [json.loads(line) for line in run.order.read_text().splitlines()]
    assert listed == [{"batch": n + 1, "clips": [f"clip{n}"]} for n in range(6)]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]


def test_a_save_that_fails_ends_the_run_and_leaves_the_one_before(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    real = checkpoints.save_adapter

    def full(path: pathlib.Path, *args: Any) -> Any:
        if path.name == "lora_weights_step_00002.safetensors":
            raise OSError(28, f"could not write {path}: No space left on device")
        return real(path, *args)

    run = toy.run_in(tmp_path, save_every=1)
    monkeypatch.setattr(checkpoints, "save_adapter", full)
    with pytest.raises(OSError, match=r"step_00002.* No space left"):
        train(run)
    assert run.adapter(1).is_file()
    monkeypatch.undo()
    state, _ = train(toy.run_in(tmp_path, save_every=1, resume=True))
    straight, _ = train(toy.run_in(tmp_path / "straight"))
    same(state, straight)


def test_the_log_has_a_line_per_step_with_losses_norm_rate_and_time(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    run = toy.run_in(tmp_path)
    train(run)
    first = rows(run)[0]
    assert set(first) == {
        "step", "loss", "video_loss", "audio_loss", "grad_norm", "lr", "skipped",
        "s_per_step", "tokens_per_s", "peak_memory_gb", "grad_norm/audio_ff",
        "grad_norm/video_ff", "adapter_norm/audio_ff", "adapter_norm/video_ff",
    }  # fmt: skip
    assert first["lr"] == pytest.approx(1e-2)
    assert first["skipped"] == 0
    out = capsys.readouterr().out
    assert "step 6/6 loss" in out
    assert "s/step ETA 0:00:00" in out


def test_the_log_may_skip_steps(tmp_path: pathlib.Path):
    run = toy.run_in(tmp_path, log_every=4)
    train(run)
    assert [row["step"] for row in rows(run)] == [4, 6]


def test_an_output_with_a_state_is_not_overwritten(tmp_path: pathlib.Path):
    train(toy.run_in(tmp_path))
    with pytest.raises(ValueError, match="add --resume to go on"):
        train(toy.run_in(tmp_path))


def test_resuming_without_a_state_starts_anew(tmp_path: pathlib.Path):
    state, _ = train(toy.run_in(tmp_path, resume=True))
    assert int(state.step) == 6


def test_resuming_with_other_settings_names_them(tmp_path: pathlib.Path):
    train(toy.run_in(tmp_path))
    other = toy.run_in(tmp_path, resume=True, seed=5)
    with pytest.raises(ValueError, match="seed: saved with 0, now 5"):
        train(other)
    moved = toy.run_in(tmp_path, resume=True)
    moved = runs.Run(moved.config, moved.meta, {"base": "other"})
    with pytest.raises(ValueError, match="base: saved with 'hash', now 'other'"):
        train(moved)


def test_settings_that_may_differ_are_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    train(toy.run_in(tmp_path))
    changed = {"seed": 5, "optimizer": experiment.Optimizer(clip=2.0), "steps": 7}
    changed |= {"resume": True}
    with pytest.raises(ValueError) as refused:
        train(toy.run_in(tmp_path, **changed, resume_with=("optimizer.clip",)))
    assert "optimizer.clip" not in str(refused.value)
    assert "seed: saved with 0, now 5" in str(refused.value)
    add = "add --resume-with optimizer.learning_rate seed"
    assert add in str(refused.value)
    run = toy.run_in(tmp_path, **changed, resume_with=("seed", "optimizer", "base"))
    moved = runs.Run(run.config, run.meta, {"base": "other"})
    state, _ = train(moved)
    assert int(state.step) == 7
    assert "base: saved with 'hash', now 'other'" in capsys.readouterr().out
    again = toy.run_in(tmp_path, **changed)  # saved with the new ones now
    train(runs.Run(again.config, again.meta, {"base": "other"}))


def test_a_run_goes_on_with_another_mesh_and_other_processes(tmp_path: pathlib.Path):
    train(toy.run_in(tmp_path))
    where = Distributed("host:1", 2, 0)
    changed = {"mesh": "tensor=2", "distributed": where, "resume": True}
    assert runs.newest(toy.run_in(tmp_path, **changed)) == 6


def test_a_name_of_no_setting_is_refused(tmp_path: pathlib.Path):
    run = toy.run_in(tmp_path, resume=True, resume_with=("optimiser",))
    with pytest.raises(ValueError, match=r"got 'optimiser', .* nearest is 'optimizer"):
        runs.newest(run)


def test_a_finished_run_may_go_on_for_more_steps(tmp_path: pathlib.Path):
    train(toy.run_in(tmp_path))
    state, _ = train(toy.run_in(tmp_path, resume=True, steps=8))
    assert int(state.step) == 8


def test_a_damaged_state_is_refused(tmp_path: pathlib.Path):
    run = toy.run_in(tmp_path)
    train(run)
    for file in (run.states / "6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="delete it to resume from an older one"):
        train(toy.run_in(tmp_path, resume=True))


def poisoned(*at: int) -> Any:
    """Batches of which some hold a NaN."""

    def batches(n: int) -> Batch:
        made = toy.batch(n)
        bad = made.audio.at[0, 0, 0, 0].set(jnp.nan)
        return made._replace(audio=bad) if n in at else made

    return batches


def test_single_steps_that_are_not_finite_are_counted_and_passed_over(
    tmp_path: pathlib.Path,
):
    run = toy.run_in(tmp_path)
    state, _ = train(run, poisoned(1, 3))
    assert [row["skipped"] for row in rows(run)] == [0, 1, 0, 1, 0, 0]
    assert rows(run)[1]["loss"] is None
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.adapter))


def test_several_steps_in_a_row_that_are_not_finite_end_the_run(
    tmp_path: pathlib.Path,
):
    run = toy.run_in(tmp_path)
    with pytest.raises(loop.NotFiniteError, match="3 times in a row up to step 5"):
        train(run, poisoned(2, 3, 4, 5))
    want, _ = train(toy.run_in(tmp_path / "short", steps=6), stopping_at(1))
    got, _ = checkpoints.read_tensors(run.adapter(5))
    scaled = adapters.scale(want.adapter, 0.5)
    b = scaled["blocks"]["audio"]["ff"]["up"]["kernel"]["b"]
    key = "diffusion_model.transformer_blocks.0.audio_ff.net.0.proj.lora_B.weight"
    np.testing.assert_array_equal(got[key], b[0].T)


def test_what_ends_the_run_names_the_clips_and_the_first_bad_tensor(
    tmp_path: pathlib.Path,
):
    def explain(state: Any, batch: Batch, names: Any) -> str:
        key = jax.random.key(0)
        found = diagnosis.first(toy.task(), key, state, toy.base(), batch)
        assert int(state.step) == 4
        return diagnosis.told(found, names)

    names = lambda seen: [f"a{seen}", f"b{seen}"]
    run = toy.run_in(tmp_path)
    with pytest.raises(loop.NotFiniteError) as refused:
        train(run, poisoned(2, 3, 4), loop.Hooks(names=names, explain=explain))
    text = str(refused.value)
    assert "first tensor that is not finite: latents audio of clip a4." in text
    assert "step 3: a2, b2\n  step 4: a3, b3\n  step 5: a4, b4\n" in text
    assert states.latest(run.states) == 5


def test_a_run_on_another_thread_ignores_signals(tmp_path: pathlib.Path):
    import threading

    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(train(toy.run_in(tmp_path))))
    thread.start()
    thread.join()
    assert int(done[0][0].step) == 6

"""The memory plan of a training run: exact sizes, estimates against XLA's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import eight_bits
import jax
import jax.numpy as jnp
import latent_folder
import pytest
import sample_files
import sparse_files

from idlora_jax import (
    config,
    config_text,
    experiment,
    fitting,
    flops,
    liveness,
    memory,
    prompts,
    training,
    training_checks,
    training_memory,
    training_outlines,
)
from idlora_jax.assumed import Assume
from idlora_jax.data import latents
from idlora_jax.experiment import Ema, HeldOut, Lora, Optimizer, TrainConfig
from idlora_jax.memory import Device
from idlora_jax.monitoring import Samples
from idlora_jax.presets import tiny_train
from idlora_jax.training_outlines import Outline
from idlora_jax.weights import networks

CLIPS = Assume(frames=17, height=256, width=256, reference_s=0.4)
POLICIES = ("none", "selective", "full")
QUERIES = ("blocks/audio/self_attn/q",)


def outline(tiny_model: Any, **changes: Any) -> Outline:
    """A run on the tiny model that adapts one module of a layer."""
    common = {"lora": Lora(rank=64, targets=QUERIES), "heldout": HeldOut(clips=0)}
    settings = {"assume": CLIPS, "batch_size": 2, **common, **changes}
    made = dataclasses.replace(tiny_train(), base=tiny_model[0], **settings)
    made = experiment.of_generation(made, "2.0")
    nets, _ = networks.load(made.base, ())
    clips = training_outlines.assumed(made.assume, fitting.folders(made.strategy), nets)
    return training_outlines.of(made, nets, clips)


def phases(run: Outline, device: Device | None = None) -> dict[str, dict[str, int]]:
    found = training_memory.of(run, device)
    return {p.name: dict(p.resident) | {"work": p.temporary} for p in found.phases}


@pytest.fixture(scope="module")
def policies(tiny_model: Any) -> dict[str, Outline]:
    return {r: outline(tiny_model, remat=r) for r in POLICIES}


@pytest.fixture(scope="module")
def whole(tiny_model: Any) -> dict[str, Outline]:
    """The same with all scores of an attention at once."""
    off: Any = {"without": ("chunked_attention",)}
    return {r: outline(tiny_model, remat=r, **off) for r in POLICIES}


def xla(run: Outline) -> Any:
    """What XLA says of the compiled step."""
    step = training.make_train_step(run.task, run.tx, jax.random.key(0))
    args = run.state, run.frozen, run.batch(run.share)
    return step.lower(*args).compile().memory_analysis()  # pyright: ignore


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize("remat", POLICIES)
def test_the_estimate_of_a_step_is_near_what_xla_says_of_each_policy(
    policies, whole, remat, chunks
):
    run = (policies if chunks else whole)[remat]
    estimate = liveness.temporary(run.step, donated=len(jax.tree.leaves(run.state)))
    exact = xla(run)
    assert exact.alias_size_in_bytes == memory.size(run.state)
    # Loops over chunks keep more on a CPU than is counted.
    least = 0.8 if chunks else 0.9
    assert (
        least * exact.temp_size_in_bytes <= estimate <= 1.6 * exact.temp_size_in_bytes
    )


def test_a_batch_in_parts_needs_the_activations_of_one_and_a_sum(tiny_model):
    options: Any = {"remat": "none", "without": ("chunked_attention",)}
    batch = lambda size, parts: outline(
        tiny_model,
        batch_size=size,
        optimizer=Optimizer(accumulation=parts),
        **options,
    )
    one, parts, whole = batch(1, 1), batch(1, 4), batch(4, 1)
    exact = [xla(run) for run in (one, parts, whole)]
    for run, found in zip((one, parts, whole), exact, strict=True):
        estimate = liveness.temporary(run.step, donated=len(jax.tree.leaves(run.state)))
        most = found.temp_size_in_bytes
        assert 0.9 * most <= estimate <= 1.6 * most
        assert found.alias_size_in_bytes == memory.size(run.state)
    least, some, most = (found.temp_size_in_bytes for found in exact)
    assert some < 0.5 * most
    assert some < 1.1 * least + 2 * memory.size(one.state.adapter)
    rows = phases(parts)["training step"]
    assert rows["accumulated gradients"] == memory.size(one.state.adapter)
    assert "accumulated gradients" not in phases(whole)["training step"]
    assert rows["work"] < 0.5 * phases(whole)["training step"]["work"]


def needs(runs: dict[str, Outline]) -> list[int]:
    return [phases(run)["training step"]["work"] for run in runs.values()]


def test_a_lighter_policy_needs_less_and_does_more(whole):
    needed = needs(whole)
    assert needed == sorted(needed, reverse=True) and needed[0] > 2 * needed[2]
    work = [flops.count(run.step) for run in whole.values()]
    # A forward pass is a third of a step.
    assert work == sorted(work) and 1.2 * work[0] < work[2] < 1.5 * work[0]


def test_chunks_of_attention_need_less_and_make_scores_again(policies, whole):
    less, more = needs(policies), needs(whole)
    assert less == sorted(less, reverse=True)
    assert all(a < b for a, b in zip(less, more, strict=True)) and less[2] < more[2] / 2
    for remat in POLICIES:
        work = [flops.count(runs[remat].step) for runs in (whole, policies)]
        # A layer that is computed again as a whole has made its scores three times.
        assert work[0] <= work[1] < (1.1 if remat == "full" else 1.001) * work[0]


def test_what_lasts_is_what_a_run_holds_to_the_byte(tiny_model, tmp_path):
    clips = latent_folder.write(
        tmp_path / "clips", 4, text=(128, 48), audio=9, reference=5
    )
    settings = dataclasses.replace(
        tiny_train(),
        base=tiny_model[0],
        data=clips,
        output=tmp_path / "out",
        ema=Ema(0.9),
        optimizer=Optimizer(name="adamw8bit", accumulation=2),
        heldout=HeldOut(clips=1),
        dtype="bfloat16",
        batch_size=3,
    )
    fit = fitting.plan(settings)
    settings = fit.run.config
    clips = training_outlines.of_collection(fit.clips)
    run = training_outlines.of(settings, fit.nets, clips)
    names, dtype = training_outlines.NAMES, jnp.dtype(settings.dtype)
    _, params = networks.load(settings.base, names, dtype=dtype)
    adapter, base = fitting.trained(settings, params["transformer"])
    state = training.init(adapter, base, run.tx)

    def connect(features: Any, mask: Any) -> Any:
        return prompts.prompts(fit.nets, params, features, mask)

    (bucket,) = fit.clips.buckets
    batch = latents.whole(bucket, connect)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(run.state) == kinds(state)
    kernel = lambda tree: tree["blocks"]["audio"]["self_attn"]["q"]["kernel"]
    assert kernel(base).dtype == jnp.bfloat16
    assert {x.dtype for x in kernel(adapter).values()} == {jnp.dtype("float32")}
    assert kinds(run.batch(3)) == kinds(batch)
    assert run.share == 6  # two batches
    live = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    step = phases(run)["training step"]
    want = {name.replace("_", " "): live(params[name]) for name in names}
    want |= {"adapter": live(adapter), "gradients": live(adapter)}
    want |= {"accumulated gradients": live(adapter), "average": live(adapter)}
    want |= {"batch": 2 * live(batch), "optimizer": live(state) - 2 * live(adapter)}
    assert {name: step[name] for name in want} == want


def test_full_fine_tuning_holds_the_trained_copy_and_no_frozen_one(tiny_model):
    run = outline(tiny_model, mode="full", dtype="bfloat16", lora=Lora(rank=8))
    found = phases(run)
    assert "transformer" not in found["training step"]
    trained = found["training step"]["trained"]
    # Scale and shift tables are in float32 already.
    assert 1.9 * found["load"]["transformer"] < trained
    assert found["training step"]["optimizer"] == pytest.approx(2 * trained, abs=64)
    assert found["load"]["work"] == trained


def test_a_mesh_divides_clips_weights_and_state(tiny_model):
    # Chunks would leave less to divide than what every device has to itself.
    given: Any = {"batch_size": 4, "without": ("chunked_attention",)}
    one = phases(outline(tiny_model, **given))["training step"]
    run = outline(tiny_model, **given, mesh="fsdp=2,tensor=2")
    four = phases(run)["training step"]
    assert four["transformer"] < 0.5 * one["transformer"]
    assert four["batch"] == one["batch"] // 2
    assert four["work"] < 0.7 * one["work"]
    for name in ("adapter", "gradients", "optimizer"):
        assert 0.2 * one[name] < four[name] < 0.7 * one[name]


def test_a_cpu_also_holds_what_its_scans_and_saves_copy(tiny_model):
    run = outline(tiny_model, dtype="bfloat16")
    here, there = phases(run, Device("cpu")), phases(run, Device("gpu"))
    step = here["training step"]
    blocks = jax.tree.leaves(run.frozen["blocks"])
    stacks = sum(x.size for x in blocks if x.dtype == jnp.bfloat16)
    assert step["float32 copies"] == 4 * stacks
    assert here["save"]["work"] - there["save"]["work"] == memory.size(run.state)
    assert "float32 copies" not in there["training step"]


def changed(run: Outline, text: str) -> Outline:
    """The run with the settings that a message names."""
    words = text.split()
    named = {
        k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)
    }
    settings = run.config
    for name, value in named.items():
        value = int(value) if value.isdigit() else value
        first, _, rest = name.replace("-", "_").partition(".")
        if rest:
            value = dataclasses.replace(getattr(settings, first), **{rest: value})
        settings = dataclasses.replace(settings, **{first: value})
    return run.other(settings)


def named(message: str) -> list[str]:
    """The settings that a message offers, with what they would need."""
    return message.split("makes it fit: ")[1].split(" (--memory")[0].split(", ")


def test_too_little_memory_is_an_error_that_names_what_helps(policies):
    run, device = policies["selective"], Device("tpu")
    found = training_memory.of(run, device)
    most = found.peak.total - 1
    assert training_checks.check(run, found, device, most + 1) is None
    with pytest.raises(ValueError, match="'training step' needs about") as error:
        training_checks.check(run, found, device, most)
    offers = named(str(error.value))
    assert [offer.partition(" (")[0] for offer in offers] == [
        "--remat full",
        "--optimizer.name adamw8bit",
        "--weights int8",
        "--weights-in host --remat full",
        "--batch-size 1 --optimizer.accumulation 2",
    ]
    text, _, size = offers[-1].partition(" (")
    needs = training_memory.of(changed(run, text), device).peak.total
    assert needs <= most and size == f"{needs / 1e9:.2f} GB)"


def test_more_devices_are_offered_where_there_are_some(tiny_model):
    lion = Optimizer(name="lion", betas=(0.9, 0.99))
    run = outline(tiny_model, optimizer=lion, batch_size=1)
    most = training_memory.of(run).peak.total - 1
    offers = training_checks.helps(run, "tpu", most, devices=3)
    lighter = ["--weights int8", "--weights-in host"]
    named = [offer.partition(" (")[0] for offer in offers]
    assert named == [*lighter, "--mesh tensor=2"]
    assert training_checks.helps(run, "tpu", most) == offers[:2]


def test_settings_that_do_not_help_alone_are_offered_together(policies):
    run, device = policies["selective"], Device("tpu")
    every = "--remat full --optimizer.name adamw8bit --weights int8 --weights-in host "
    every += "--batch-size 1 --optimizer.accumulation 2"
    most = training_memory.of(changed(run, every), device).peak.total
    offers = training_checks.helps(run, "tpu", most)
    assert [offer.partition(" (")[0] for offer in offers] == [every]


def test_a_base_in_8_bits_may_stay_so(tiny_model, tmp_path):
    tensors, said = eight_bits.read(tiny_model[0])
    scaled = eight_bits.scaled(tensors, eight_bits.in_layers(1, 2))
    base = eight_bits.write(tmp_path / "base.safetensors", scaled, said)
    run, device = outline((base,), batch_size=1), Device()
    most = training_memory.of(run, device).peak.total - 1
    said = training_checks.helps(run, "tpu", most)
    assert any(line.startswith("--weights keep (") for line in said)
    assert any(line.startswith("--weights-in host (") for line in said)


@pytest.mark.parametrize("weights", ["upcast", "int8"])
def test_of_weights_in_host_memory_a_step_needs_two_layers(tiny_model, weights):
    device = Device("gpu")
    run = outline(tiny_model, batch_size=1, weights=weights)
    before, after = (
        training_memory.of(changed(run, f"--weights-in {where}"), device)
        for where in ("device", "host")
    )
    held = lambda plan: dict(plan.phases[1].resident)["transformer"]
    assert before.host == 0 and after.host == held(before) - held(after) > 0
    assert after.peak.total < before.peak.total


def test_clips_sampled_on_the_way_count_beside_what_training_holds(
    tiny_model, tmp_path
):
    files = sample_files.written(tiny_model, tmp_path)
    clip = sample_files.config(files, tmp_path / "elsewhere")
    settings = dataclasses.replace(
        tiny_train(),
        base=tiny_model[0],
        data=latent_folder.write(tmp_path / "clips", 4, text=(128, 48)),
        output=tmp_path / "out",
        lora=Lora(rank=64, targets=QUERIES),
        heldout=HeldOut(clips=0),
        samples=Samples(every=1, clips=(dataclasses.replace(clip, lora=()),)),
    )
    fit = fitting.plan(settings)
    clips = training_outlines.of_collection(fit.clips)
    run = training_outlines.of(fit.run.config, fit.nets, clips)
    found = training_memory.of(run, planned=fit.samples)
    rows = {phase.name: dict(phase.resident) for phase in found.phases}
    both = {"transformer", "text connector", "adapter", "optimizer"}
    assert {n: rows["samples"][n] for n in both} == {n: rows["save"][n] for n in both}
    assert {"video vae", "audio vae", "vocoder"} < rows["samples"].keys()
    work = {phase.name: phase.temporary for phase in found.phases}
    assert work["samples"] > 0 and "samples" not in phases(run)


def test_the_plan_of_a_run_is_said_before_weights_are_read(tiny_model, tmp_path):
    clips = latent_folder.write(tmp_path / "clips", 4, text=(128, 48))
    settings = dataclasses.replace(
        tiny_train(), base=tiny_model[0], data=clips, output=tmp_path / "out"
    )
    said: list[str] = []
    training_checks.announce(fitting.plan(settings), said.append)
    assert len(said) == 1 and said[0].startswith("memory plan in GB: training, batch 2")
    off = dataclasses.replace(settings, memory="off")
    training_checks.announce(fitting.plan(off), said.append)
    assert len(said) == 1 and not settings.output.exists()


@pytest.mark.parametrize(
    ("generation", "name"), [("2.0", "ltx-2-19b"), ("2.3", "ltx-2.3-22b")]
)
def test_built_in_networks_are_those_of_published_files(generation, name):
    embedded, own = sparse_files.config(name), config.published(generation)
    read = config.transformer_config
    assert read(own, generation) == read(embedded, generation)
    text = config_text.text_connector_config
    assert text(own, generation) == text(embedded, generation)


@pytest.mark.parametrize(
    ("generation", "file", "choice"),
    [
        ("2.0", "ltx-2-19b-dev", "upcast"),
        ("2.3", "ltx-2.3-22b-dev", "upcast"),
        ("2.0", "ltx-2-19b-dev-fp8", "keep"),
    ],
)
def test_built_in_shapes_are_those_of_published_files(
    generation, file, choice, tmp_path
):
    path = sparse_files.write(tmp_path / "base.safetensors", file)
    _, own = training_outlines.built_in(generation, "bfloat16", choice)
    settings = TrainConfig(
        path, tmp_path, tmp_path, generation=generation, weights=choice
    )
    nets, _ = networks.load(path, ())
    clips = training_outlines.assumed(Assume(), (), nets)
    read = training_outlines.of(settings, nets, clips).params
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for network in training_outlines.NAMES:
        assert kinds(own[network]) == kinds(read[network])

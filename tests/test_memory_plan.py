"""The memory plan: exact weights, estimates against XLA's own, and what is said."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import eight_bits
import jax
import jax.numpy as jnp
import pytest
import sparse_files
from jax.extend import core

from idlora_jax import (
    adapters,
    codecs,
    jobs,
    lighter,
    memory,
    outlines,
    pipeline,
    plans,
)
from idlora_jax.jobs import Inputs, Job
from idlora_jax.memory import Device
from idlora_jax.outlines import Asked
from idlora_jax.phases import MemoryPlan, Phase
from idlora_jax.sample_config import Guidance, SampleConfig
from idlora_jax.weights import io, networks

CPU = Device("cpu")
LAYOUT = pipeline.clip(33, 256, 256)
ASKED = Asked(dtype="float32", text_length=128)
FILES = {
    "19b": ("ltx-2-19b-dev", "ltx-2-spatial-upscaler-x2-1.0"),
    "22b": ("ltx-2.3-22b-dev", "ltx-2.3-spatial-upscaler-x2-1.1"),
}


@pytest.fixture(scope="module")
def eight(tiny_model, tmp_path_factory):
    """The tiny base with two of four layers in 8 bits."""
    tensors, said = eight_bits.read(tiny_model[0])
    scaled = eight_bits.scaled(tensors, eight_bits.in_layers(1, 2))
    path = tmp_path_factory.mktemp("eight") / "base.safetensors"
    return eight_bits.write(path, scaled, said)


def opened(base: Any, text: Any, larger: Any = None, **options: Any) -> Any:
    """Networks and the shapes of their parameters."""
    paths = {"text_encoder_path": text, "upsampler_path": larger}
    nets, _ = networks.load(base, (), **paths)
    return nets, outlines.parameters(base, **paths, **options)


def layout_of(config: SampleConfig) -> Any:
    return pipeline.clip(config.frames, config.height or 512, config.width or 512)


def job_of(base: Any, text: Any, **changes: Any) -> Job:
    given: dict[str, Any] = {
        "frames": 65,
        "height": 512,
        "width": 512,
        "dtype": "float32",
        "guidance": Guidance(stg_layer=3),
    }
    config = SampleConfig(base, text, "a person", **(given | changes))
    nets, _ = networks.load(base, (), text_encoder_path=text)
    return Job(config, nets, layout_of(config), jobs.plan_of(config), {}, {})


NOTHING = Inputs((), None, {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_loaded_networks_to_the_byte(
    tiny_model, larger, dtype
):
    base, text = tiny_model
    nets, shapes = opened(base, text, larger, dtype=dtype)
    names = (*io.NETWORKS, "text_encoder", "upsampler")
    paths = {"text_encoder_path": text, "upsampler_path": larger}
    _, params = networks.load(base, names, **paths, dtype=jnp.dtype(dtype))
    for name in names:
        got = jax.tree.map(lambda x: (x.shape, x.dtype), shapes[name])
        assert got == jax.tree.map(lambda x: (x.shape, x.dtype), params[name])
    live = {n: sum(x.nbytes for x in jax.tree.leaves(params[n])) for n in names}
    found = memory.of(
        plans.two_stage(stg=0), nets, shapes, pipeline.clip(9, 64, 64), asked=ASKED
    )
    text_side, others = found.phases[0], found.phases[1]
    wanted = {n.replace("_", " "): live[n] for n in memory.TEXT_SIDE}
    assert dict(text_side.resident) == wanted
    wanted = {n.replace("_", " "): live[n] for n in names if n not in memory.TEXT_SIDE}
    assert dict(others.resident) == wanted


def test_kernels_kept_in_8_bits_count_a_byte_each(eight):
    base = io.open_base(eight)
    for choice in ("keep", "upcast"):
        live = io.load_network(base, "transformer", jnp.bfloat16, weights=choice)
        shapes = outlines.parameters(eight, choice=choice)["transformer"]
        nbytes = sum(x.nbytes for x in jax.tree.leaves(live))
        assert memory.size(shapes) == nbytes
    assert outlines.stored_as(eight) == "fp8"


def test_weights_in_host_memory_are_told_apart(tiny_model):
    """On a GPU the device has two layers of them; on CPU the same memory has all."""
    job = job_of(*tiny_model, frames=9, height=64, width=64)
    config = dataclasses.replace(job.config, weights_in="host")
    other = dataclasses.replace(job, config=config)
    gpu, cpu = memory.Device("gpu"), memory.Device("cpu")
    plan = lambda job, device: memory.for_job(
        job, NOTHING, device=device, encodes=False
    )
    before, after = plan(job, gpu), plan(other, gpu)
    layers = job.nets.transformer.layers
    decode = before.phases[-1].resident, after.phases[-1].resident
    all_, rest = (dict(rows)["transformer"] for rows in decode)
    assert before.host == 0 and after.host == all_ - rest > all_ / 2
    assert f"in host memory: {after.host / 1e9:.2g} of weights" in after.table()
    assert after.phases[1].temporary > 1.5 * after.host / layers
    assert after.phases[1].total < before.phases[1].total
    on_cpu = dict(plan(other, cpu).phases[-1].resident)["transformer"]
    assert on_cpu == all_ and plan(other, cpu).host == 0


def test_weights_in_host_memory_are_advised_where_they_help(eight, tiny_model):
    job = job_of(eight, tiny_model[1], frames=9, height=64, width=64)
    options: Any = {"encodes": False, "device": memory.Device("gpu")}
    found = memory.for_job(job, NOTHING, **options)
    said = [*memory.helps(job, NOTHING, found, found.peak.total - 1, **options)]
    assert any(line.startswith("--weights keep (") for line in said)
    assert any(line.startswith("--weights-in host (") for line in said)
    narrow = lighter.weights("keep", "device", eight, "gpu")
    assert [{"weights": "int8"}] in narrow
    assert lighter.weights("int8", "host", eight, "gpu") == [[]]
    assert lighter.weights("int8", "device", eight, "cpu") == [[]]


def needed(traced: Any) -> int:
    """Bytes that XLA's compiler says the same function needs."""
    avals = [v.aval for v in traced.jaxpr.invars]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    compiled = jax.jit(core.jaxpr_as_fun(traced)).lower(*shapes).compile()
    found: Any = compiled.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


FEW: dict[str, Any] = {"stg": 0.0, "bimodal": 1.0, "identity": 0.0}


@pytest.mark.parametrize(
    ("mode", "number"), [("sweep", 0), ("pair", 0), ("batch", 0), ("sweep", 1)]
)
def test_the_estimate_of_a_stage_is_near_what_xla_says(
    tiny_model, larger, mode, number
):
    nets, params = opened(tiny_model[0], tiny_model[1], larger, dtype="float32")
    plan = plans.two_stage(branches=mode, steps=2, **FEW)
    own = outlines.variables(plan.stages[number], params, {})
    traced = outlines.stage(plan, number, nets, params, own, LAYOUT, ASKED)
    exact = max(map(needed, traced))
    assert 0.65 * exact <= CPU.work(traced) <= 1.6 * exact


@pytest.mark.parametrize("part", ["text", "decoding"])
def test_the_estimates_around_the_stages_are_near_what_xla_says(tiny_model, part):
    nets, params = opened(tiny_model[0], tiny_model[1], dtype="float32")
    layout = pipeline.clip(17, 128, 128)
    if part == "text":
        traced = [outlines.text(nets, params, ASKED)]
    else:
        traced = outlines.decoding(nets, params, layout, ASKED)
    for one in traced:
        exact = needed(one)
        assert 0.65 * exact <= CPU.work([one]) <= 1.6 * exact


def test_an_adapter_counts_where_a_stage_uses_it(tiny_model, larger):
    nets, params = opened(tiny_model[0], tiny_model[1], larger, dtype="float32")
    init = lambda key: adapters.init(key, params["transformer"], 4)
    adapter = jax.eval_shape(init, jax.random.key(0))
    plan = plans.two_stage(
        steps=2, video_cfg=1, audio_cfg=1, adapters={"a": 1.0}, **FEW
    )
    args = (plan, nets, params, pipeline.clip(9, 64, 64))
    found = memory.of(*args, adapters={"a": adapter}, asked=ASKED)
    sizes = {p.name: dict(p.resident).get("adapters", 0) for p in found.phases}
    wanted = memory.size(adapter)
    assert sizes == {"text": 0, "inputs": 0, "first": wanted, "refine": 0, "decode": 0}


def test_what_waits_on_the_host_counts_where_it_is_used(tiny_model, larger):
    nets, params = opened(tiny_model[0], tiny_model[1], larger, dtype="float32")
    plan = plans.two_stage(steps=2, video_cfg=1, audio_cfg=1, **FEW)
    args = (plan, nets, params, pipeline.clip(9, 64, 64))
    found = memory.of(*args, asked=ASKED, wait=True)
    waiting = {p.name: {*dict(p.resident)} & memory.WAITING for p in found.phases}
    assert waiting == {
        "text": set(),
        "inputs": {"video vae", "audio vae"},
        "first": set(),
        "enlarge": {"upsampler"},
        "refine": set(),
        "decode": {"video vae", "audio vae", "vocoder"},
    }
    whole = memory.of(*args, asked=ASKED)
    peaks = {p.name: p.temporary for p in whole.phases}
    assert peaks["refine"] == max(p.temporary for p in found.phases[3:5])


def test_a_mesh_divides_the_weights_as_the_rules_say(tiny_model):
    _, params = opened(tiny_model[0], tiny_model[1], dtype="float32")
    whole = memory.size(params["transformer"])
    half = memory.size(params["transformer"], "transformer", {"tensor": 2})
    assert 0.5 * whole < half < 0.7 * whole
    assert memory.size(params["transformer"], "transformer", {"data": 2}) == whole
    assert Device(mesh={"data": 2, "fsdp": 2}).own(8) == 2


def plan_of(*totals: int) -> MemoryPlan:
    phases = [Phase(f"p{n}", (("w", 10**9),), t) for n, t in enumerate(totals)]
    return MemoryPlan("a plan", tuple(phases))


def test_the_table_is_short_and_marks_the_peak():
    lines = plan_of(10**9, 3 * 10**9, 0).table().splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["p0", "p1*", "p2"],
        ["w", "1.00", "1.00", "1.00"],
        ["temporary", "(estimate)", "1.00", "3.00", "-"],
        ["together", "2.00", "4.00", "1.00"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def config_of(job: Job, settings: str) -> SampleConfig:
    """The job's settings with those that a message names."""
    words = settings.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    names = lambda k: k.removeprefix("--").replace("-", "_")
    given = {names(k): int(v) if v.isdigit() else v for k, v in pairs}
    return dataclasses.replace(job.config, **given)


OFF = Guidance(audio_cfg=1.0, identity=0.0, stg=0.0, bimodal=1.0)


def test_too_little_memory_is_an_error_that_names_what_helps(tiny_model):
    job = job_of(tiny_model[0], tiny_model[1], branches="batch", batch=2, guidance=OFF)
    options: Any = {"encodes": False}
    found = memory.for_job(job, NOTHING, most=1, **options)  # in the smallest tiles
    most = found.peak.total - 1
    assert memory.check(job, NOTHING, found, most + 1, **options) is None
    with pytest.raises(ValueError, match="each of these makes it fit") as error:
        memory.check(job, NOTHING, found, most, **options)
    text = str(error.value)
    assert "--batch 1" in text and "--height 448 --width 448" in text
    assert "--weights int8" in text and "keep" not in text and "-in host" not in text
    assert "--dtype" not in text and "--mesh" not in text
    named = text.split("makes it fit: ")[1].split(" (--memory")[0].split(", ")
    options = [setting.split()[0] for setting in named]
    assert options == ["--weights", "--batch", "--height", "--frames"]
    for setting in named[:-1]:
        config = config_of(job, setting.partition(" (")[0])
        other = dataclasses.replace(job, config=config, layout=layout_of(config))
        assert memory.for_job(other, NOTHING, most=most).peak.total <= most


def test_weights_that_are_too_large_are_not_blamed_on_the_size(eight, tiny_model):
    job = job_of(eight, tiny_model[1], frames=9, height=64, width=64)
    job = dataclasses.replace(
        job, config=dataclasses.replace(job.config, memory="warn")
    )
    found = MemoryPlan("", (Phase("first", (("transformer", 10**9),), 0),))
    line = memory.check(job, NOTHING, found, 10**9 - 1)
    assert line is not None and "--weights keep" in line
    assert "--height" not in line and "--frames" not in line
    off = dataclasses.replace(job, config=dataclasses.replace(job.config, memory="off"))
    assert memory.check(off, NOTHING, found, 1) is None


def test_the_machine_says_how_much_memory_it_has():
    most = memory.limit()
    assert most is not None and most > 2**28


def test_a_run_has_the_shapes_of_its_outline_also_in_tiles(
    tiny_model, larger, monkeypatch
):
    nets, params = opened(tiny_model[0], tiny_model[1], larger, dtype="float32")
    plan = plans.two_stage(steps=2, video_cfg=1, audio_cfg=1, **FEW)
    args = (plan, nets, params, pipeline.clip(17, 64, 64))
    whole = outlines.outline(*args, asked=ASKED)
    monkeypatch.setattr(codecs, "WHOLE", 0)
    tiled = outlines.outline(*args, asked=ASKED)
    shapes = [
        jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (whole, tiled)
    ]
    assert shapes[0] == shapes[1]
    assert whole.video.shape == (1, 17, 128, 128, 3)
    assert whole.latents.audio.shape == (1, 17, 16, 8)


def full_size(name: str, folder: pathlib.Path, plan: str) -> Any:
    """Networks and shapes of published files."""
    base, larger = FILES[name]
    text = folder / "gemma"
    text.mkdir(exist_ok=True)
    config = json.dumps(sparse_files.config("gemma-3-12b-it"))
    (text / "config.json").write_text(config)
    sparse_files.write(text / "model.safetensors", "gemma-3-12b-it")
    path = sparse_files.write(folder / "base.safetensors", base)
    upsampler_path = None
    if plan.startswith("two_stage"):
        upsampler_path = sparse_files.write(folder / "x2.safetensors", larger)
    return opened(path, text, upsampler_path)


def test_published_weights_have_the_published_sizes(tmp_path):
    path = sparse_files.write(tmp_path / "fp8.safetensors", "ltx-2-19b-dev-fp8")
    shapes = outlines.parameters(path, choice="keep")
    sizes = {"transformer": 21.6, "text_connector": 2.86, "video_vae": 2.44}
    found = {name: memory.size(shapes[name]) / 1e9 for name in sizes}
    assert found == pytest.approx(sizes, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plan"),
    [(n, p) for n in FILES for p in ("one_stage", "two_stage", "distilled")]
    + [("22b", "two_stage_hq")],
)
def test_every_plan_traces_at_full_size(name, plan, tmp_path, capsys):
    nets, params = full_size(name, tmp_path, plan)
    made, layout = getattr(plans, plan)(), pipeline.clip(121, 512, 512)
    out = outlines.outline(made, nets, params, layout)
    side = 1024 if plan.startswith("two_stage") else 512
    assert out.video.shape == (1, 121, side, side, 3)
    assert out.latents.video.shape == (1, 16, side // 32, side // 32, 128)
    assert out.latents.audio.shape == (1, 121, 16, 8)
    assert out.wave.shape[:2] == (1, 2)
    found = memory.of(made, nets, params, layout, title=f"{plan} {name}")
    with capsys.disabled():
        print(f"\n{found.table()}")
    weights = dict(found.phases[2].resident)["transformer"]
    assert weights / 1e9 == pytest.approx({"19b": 37.8, "22b": 38.0}[name], abs=0.05)
    assert found.phases[0].name == "text"
    assert 40e9 < found.peak.total < 50e9

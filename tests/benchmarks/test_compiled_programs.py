"""What can be said without a clock: FLOPs, memory, traces, compiled blocks."""

import dataclasses
import functools

import jax
import pytest

from benchmarks import cases, programs, random_weights
from benchmarks.backends import jax_training
from benchmarks.configs import SIZES
from benchmarks.suites import compiling, loading, scaling
from benchmarks.works import Facts
from idlora_jax.memory import size as nbytes

TINY = SIZES["tiny"]


@functools.cache
def facts(kind: str, layers: int = 4) -> Facts:
    """Of a traced function of shapes."""
    calls = compiling.calls(compiling.deep(TINY, layers), "2.0")
    return programs.traced(*calls[kind]())


def test_flops_of_a_pass_grow_linearly_with_its_layers():
    four, eight, twelve = (facts("pass", n).flops or 0 for n in (4, 8, 12))
    assert twelve - eight == eight - four > 0


def test_a_step_does_less_than_five_passes():
    one, five = facts("pass").flops or 0, facts("step").flops or 0
    assert 3 * one < five < 5 * one


def test_compiled_blocks_do_not_grow_with_the_layers():
    assert facts("pass").blocks == 1
    assert facts("step").blocks == facts("step", 8).blocks
    assert (facts("step").blocks or 0) <= 10


def test_programs_hold_no_copy_of_the_weights():
    """Of many layers, so that one layer is a small part of all."""
    deep = compiling.deep(TINY, 24)
    shapes = random_weights.shapes(deep.transformer("2.0"))
    weights = nbytes(shapes)
    prepared = sum(nbytes(shapes[name]["caption"]) for name in ("video", "audio"))
    call = compiling.calls(deep, "2.0")["pass"]()
    found = programs.build(*call).facts
    assert 0 < (found.temp_bytes or 0) < weights / 4
    # `prepare` alone reads the projection of prompts.
    assert (found.arg_bytes or 0) > weights - prepared


def test_training_needs_more_flops_than_two_passes():
    case, base = (
        cases.training(TINY, "2.0"),
        random_weights.shapes(TINY.transformer("2.0")),
    )
    call = jax_training.train_call(case, base, "full")
    found = programs.traced(*call)
    assert (found.flops or 0) > 2.5 * (facts("pass").flops or 0)
    kinds = {type(x) for x in jax.tree.leaves(call.args[0])}
    assert kinds == {jax.ShapeDtypeStruct}, "nothing was allocated"


def test_facts_of_programs_add_up():
    a, b = Facts(1.0, 2.0, 3.0, 4, 5, 6, 7, 1.0), Facts(1.0, 1.0, 1.0, 9, 1, 1)
    assert a + b == Facts(2.0, 3.0, 4.0, 9, 5, 7, 7, 1.0)


def test_random_weights_have_the_shapes_and_are_all_finite():
    cfg = TINY.transformer("2.3")
    made = random_weights.base(cfg)
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(
        lambda x: x.shape, random_weights.shapes(cfg)
    )
    kernel = made["blocks"]["video"]["ff"]["up"]["kernel"]
    assert float(abs(kernel[0] - kernel[1]).max()) > 0, "layers differ"
    assert all(bool(jax.numpy.isfinite(x).all()) for x in jax.tree.leaves(made))


@pytest.mark.parametrize(("share", "frames"), [(0.25, 1), (1.0, 2), (2.0, 4)])
def test_longer_clips_keep_their_sides(share, frames):
    assert scaling.longer(TINY, share).grid == (frames, 2, 2)


def test_a_checkpoint_has_about_the_size_asked_for(tmp_path):
    size = loading.sized(TINY, "2.0", 0.004)
    path = tmp_path / "random.safetensors"
    assert loading.write(path, size, "2.0") == pytest.approx(4e6, rel=0.15)
    seen = loading.read(path, "float32")
    assert seen["arrays"] == pytest.approx(2 * path.stat().st_size, rel=0.05)
    assert seen["wall"] > 0 and seen["above"] > 0
    assert dataclasses.replace(size, layers=4, stg=2) == TINY

"""Keys of LoRA files: what fits, why something does not, what is broken."""

import functools
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import sparse_files

from idlora_jax import config, tiny
from idlora_jax.weights import io, lora, lora_match, lora_names
from idlora_jax.weights.lora_names import FORMATS
from idlora_jax.weights.rules import KeyMismatchError

QUERY = "diffusion_model.transformer_blocks.{}.audio_attn1.to_q"
FIRST = QUERY.format(0)
TEXT = "text_embedding_projection.aggregate_embed"
GATE = "diffusion_model.transformer_blocks.0.attn1.to_gate_logits"
PUBLISHED = {
    "id-lora-19b": ("ltx-2-19b", "2.0", "", {"transformer": 864}),
    "id-lora-22b": ("ltx-2.3-22b", "2.3", "", {"transformer": 864}),
    "ltx-2-19b-distilled-lora-384": (
        "ltx-2-19b",
        "2.0",
        "2.0",
        {"transformer": 1370, "text_connector": 1},
    ),
    "ltx-2.3-22b-distilled-lora-384": (
        "ltx-2.3-22b",
        "2.3",
        "2.3",
        {"transformer": 1660},
    ),
}


@functools.cache
def base():
    return io.shapes_of("transformer", config.tiny())


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def pair(name=FIRST, rank=3, wide=32, out=32, **kinds):
    a, b = spec(rank, wide, **kinds), spec(out, rank, **kinds)
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}


def match(*files, **bases):
    tensors = functools.reduce(lambda a, b: a | b, files)
    return lora_match.match(tensors, bases or {"transformer": base()})


@functools.cache
def full_size(name, generation):
    embedded = sparse_files.config(name)
    return {
        network: io.shapes_of(network, io.read_config(network, embedded, generation))
        for network in ("transformer", "text_connector")
    }


def published(file):
    tensors = sparse_files.manifest(file)
    kinds = {"BF16": ml_dtypes.bfloat16}
    return {k: spec(*t["shape"], dtype=kinds[t["dtype"]]) for k, t in tensors.items()}


@pytest.mark.parametrize("file", PUBLISHED)
def test_every_key_of_a_published_file_has_its_place_and_shape(file):
    model, generation, spoken, modules = PUBLISHED[file]
    bases, tensors = full_size(model, generation), published(file)
    start = time.process_time()
    report = lora_match.match(tensors, bases)
    assert time.process_time() - start < 5
    assert (
        str(report) == f"{len(tensors)} keys matched, 0 unmatched, 0 of a wrong shape"
    )
    assert set(report.matched) == set(tensors)
    places = [p.slot for p in report.pairs]
    assert len({*places}) == len(places) == sum(modules.values())
    for network, count in modules.items():
        assert [s.module.network for s in places].count(network) == count
    assert (report.formats, report.generation) == (("comfyui",), spoken)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("file", PUBLISHED)
def test_a_published_file_fits_in_every_format_s_names(file, format):
    model, generation, *_ = PUBLISHED[file]
    bases, tensors = full_size(model, generation), published(file)
    report = lora_match.match(tensors, bases)
    other = {}
    for found in report.pairs:
        template = lora_names.spelled(found.slot.module, format)
        if template is None:
            continue
        name = lora_names.filled(template, found.slot.layer)
        sides = ("lora_down", "lora_up") if format == "kohya" else ("lora_A", "lora_B")
        for side, key in zip(sides, found.keys, strict=True):
            other[f"{name}.{side}.weight"] = tensors[key]
        if format == "kohya":
            other[f"{name}.alpha"] = spec()
    again = lora_match.match(other, bases)
    assert not again.bad and again.formats == (format,)
    got = [(p.slot, p.rank) for p in again.pairs]
    kept = [(p.slot, p.rank) for p in report.pairs]
    assert got == [k for k in kept if lora_names.spelled(k[0].module, format)]


@pytest.mark.parametrize(("file", "other"), [(0, 1), (1, 0)])
def test_a_distilled_file_does_not_fit_the_other_generation(file, other):
    files = [name for name in PUBLISHED if "distilled" in name]
    model, generation, *_ = PUBLISHED[files[other]]
    report = lora_match.match(published(files[file]), full_size(model, generation))
    assert report.unmatched and len(report.wrong_shape) == 4
    assert report.generation == PUBLISHED[files[file]][1]
    message = f"those of generation {report.generation}; is the base"
    with pytest.raises(KeyMismatchError, match=message):
        lora.require(report)


SPELLINGS = {
    "lora_A.weight": "lora_B.weight",
    "lora_A.default.weight": "lora_B.default.weight",
    "lora_down.weight": "lora_up.weight",
    "lora.down.weight": "lora.up.weight",
}


@pytest.mark.parametrize("first", SPELLINGS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", ""])
def test_sides_have_several_spellings(first, prefix):
    name = prefix + QUERY.format(1).removeprefix("diffusion_model.")
    tensors = {
        f"{name}.{first}": spec(3, 32),
        f"{name}.{SPELLINGS[first]}": spec(32, 3),
        f"{name}.alpha": spec(1),
    }
    (found,) = match(tensors).pairs
    assert (found.slot.layer, found.rank) == (1, 3)
    assert found.keys == tuple(tensors)


def test_what_fits_nothing_is_reported_with_a_reason():
    odd = pair("diffusion_model.transformer_blocks.0.audio_attn1.to_qu")
    text = pair(TEXT)
    plain = {"model.diffusion_model.proj_out.weight": spec(3, 3)}
    wide = pair(QUERY.format(1), wide=48)
    deep = pair(QUERY.format(9))
    report = match(pair(), odd, text, plain, wide, deep, pair(GATE))
    assert str(report) == "2 keys matched, 9 unmatched, 2 of a wrong shape"
    reasons = [*report.unmatched.items()]
    assert reasons[0] == (*plain, "no key of a LoRA file")
    found = {key.rpartition(".lora_A")[0]: why for key, why in report.unmatched.items()}
    nearest = f"no module has this name; the nearest is {QUERY.format(0)}"
    assert found[QUERY.format(0) + "u"] == nearest
    assert "text_connector, which was not asked" in found[TEXT]
    assert found[QUERY.format(9)] == "layer 9 of a base of 4 layers"
    assert found[GATE] == "the base has no such module"
    assert report.wrong_shape == {
        f"{QUERY.format(1)}.lora_A.weight": "got [3, 48], expected [3, 32]",
        f"{QUERY.format(1)}.lora_B.weight": "its partner has a wrong shape",
    }


def test_requiring_refuses_all_that_fits_nothing_unless_a_part_is_allowed():
    report = match(pair(), pair(QUERY.format(9)))
    with pytest.raises(KeyMismatchError, match=r"2 unmatched.*\n.*\.9\.audio_attn1"):
        lora.require(report)
    lora.require(report, allow_partial=True)
    nothing = match(pair(QUERY.format(9)))
    with pytest.raises(KeyMismatchError, match="0 keys matched"):
        lora.require(nothing, allow_partial=True)


def test_the_modulation_s_width_tells_the_generation():
    name = "diffusion_model.adaln_single.linear"
    report = match(pair(name, wide=64, out=9 * 64))
    assert report.generation == "2.3" and report.wrong_shape
    assert match(pair(name, wide=64, out=6 * 64)).generation == "2.0"


def lone(side):
    return {k: v for k, v in pair(QUERY.format(1)).items() if f"lora_{side}" in k}


BROKEN = {
    "only A": (lone("A"), r"only one of lora_A and lora_B.*\.1\.audio_attn1\.to_q"),
    "only B": (lone("B"), "only one of lora_A and lora_B"),
    "alpha alone": ({f"{QUERY.format(1)}.alpha": spec()}, "alphas stand without"),
    "two prefixes": (
        pair(QUERY.format(0).replace("diffusion_model", "transformer")),
        r"two spellings of one module: diffusion_model\..* and transformer\.",
    ),
    "two adapters": (
        {QUERY.format(0) + ".lora_A.other.weight": spec(3, 32)},
        "are there twice",
    ),
    "ranks": (
        {
            f"{QUERY.format(1)}.lora_A.weight": spec(3, 32),
            f"{QUERY.format(1)}.lora_B.weight": spec(32, 4),
        },
        r"rank 3 of .*lora_A.weight is not rank 4",
    ),
    "size zero": (pair(QUERY.format(1), rank=0), "a tensor of no size"),
    "axes": (
        {
            f"{QUERY.format(1)}.lora_A.weight": spec(3, 32, 1, 1),
            f"{QUERY.format(1)}.lora_B.weight": spec(32, 3, 1, 1),
        },
        "expected two axes",
    ),
    "integers": (pair(QUERY.format(1), dtype="int8"), r"as .*\(int8\)"),
    "fp8": (pair(QUERY.format(1), dtype="float8_e4m3fn"), "16 bits or more"),
    "wide alpha": ({f"{QUERY.format(0)}.alpha": spec(3)}, "expected one number"),
    "DoRA": ({f"{QUERY.format(0)}.dora_scale": spec(32, 1)}, "got DoRA"),
    "LoHa": ({f"{QUERY.format(0)}.hada_w1_a": spec(3, 3)}, "got LoHa"),
    "LoKr": ({f"{QUERY.format(0)}.lokr_w1": spec(3, 3)}, "got LoKr"),
    "bias": ({f"{QUERY.format(0)}.lora_B.bias": spec(32)}, "LoRA with biases"),
    "difference": ({f"{QUERY.format(0)}.diff": spec(32, 32)}, "full differences"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_that_is_broken_in_itself_is_refused(fault):
    extra, message = BROKEN[fault]
    with pytest.raises(KeyMismatchError, match=message):
        match(pair(), extra)


def test_numpy_sizes_do_not_matter():
    tensors = {k: np.ones(s.shape, np.float16) for k, s in pair().items()}
    assert len(lora_match.match(tensors, {"transformer": base()}).pairs) == 1


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_the_text_connector_s_modules_are_matched_when_asked_for(generation):
    embedded = tiny.tiny_config(generation)
    cfg = io.read_config("text_connector", embedded, generation, 7)
    shapes = io.shapes_of("text_connector", cfg)
    tensors = {}
    for slot in lora_names.slots({"text_connector": shapes}):
        tensors |= pair(slot.name, wide=slot.wide, out=slot.out)
    assert not match(tensors, text_connector=shapes).bad

"""Files told apart by their headers, and named when given in another's place."""

import json

import cpu_time
import ml_dtypes
import numpy as np
import pytest
import sparse_files
from safetensors.numpy import save_file

from idlora_jax.weights import convert, io
from idlora_jax.weights.header import Spec, header
from idlora_jax.weights.identify import identify
from idlora_jax.weights.lora_generation import lora_generation

INDEX = json.loads((sparse_files.MANIFESTS / "index.json").read_text("utf-8"))

PUBLISHED = {
    "gemma-3-12b-it": ("text_encoder", ""),
    "gemma-3-12b-text": ("text_encoder", ""),
    "id-lora-19b": ("lora", ""),
    "id-lora-22b": ("lora", ""),
    "ltx-2-19b-dev": ("base", "2.0"),
    "ltx-2-19b-dev-fp8": ("base", "2.0"),
    "ltx-2-19b-distilled-lora-384": ("lora", "2.0"),
    "ltx-2-spatial-upscaler-x2-1.0": ("upsampler", ""),
    "ltx-2.3-22b-dev": ("base", "2.3"),
    "ltx-2.3-22b-distilled-lora-384": ("lora", "2.3"),
    "ltx-2.3-spatial-upscaler-x2-1.1": ("upsampler", ""),
}


@pytest.mark.parametrize("name", sparse_files.NAMES)
def test_every_published_file_is_known_by_its_header(name, tmp_path):
    path = sparse_files.write(tmp_path / "x.safetensors", name)
    found = identify(path)
    assert cpu_time.best(lambda: identify(path)) < 60 * cpu_time.of_json(path)
    facts = INDEX[name]
    assert (found.kind, found.generation) == PUBLISHED[name]
    assert (found.tensors, found.parameters) == (facts["tensors"], facts["params"])
    assert set(found.dtypes) == set(facts["by_dtype"])


@pytest.mark.parametrize("name", sparse_files.NAMES)
def test_names_alone_tell_the_same_where_the_metadata_is_lost(name, tmp_path):
    path = sparse_files.write(tmp_path / "x.safetensors", name, "")
    found = identify(path)
    assert (found.kind, found.generation) == PUBLISHED[name]


def test_a_description_is_one_line_for_people(tmp_path):
    path = sparse_files.write(tmp_path / "x", "ltx-2.3-22b-distilled-lora-384")
    assert identify(path).description == (
        "an adapter (LoRA) of generation 2.3 "
        "(3,320 tensors, 3.802 B parameters, rank 384, BF16)"
    )
    assert "convert/lora.py" in identify(path).advice


def saved(path, names, **metadata):
    arrays = {name: np.zeros((2, 2), np.float32) for name in names}
    save_file(arrays, path, metadata=metadata or None)
    return path


SMALL = {
    "model.diffusion_model.x.weight": ("base", "a base checkpoint ("),
    "vae.decoder.x": ("base", "a part of a base checkpoint"),
    "transformer_blocks.0.attn1.to_q.weight": ("base", "a base checkpoint"),
    "diffusion_model.x.lora_A.weight": ("lora", "an adapter"),
    "transformer.x.lora.down.weight": ("lora", "an adapter"),
    "base_model.model.x.lora_B.weight": ("lora", "an adapter"),
    "lora_unet_x.alpha": ("lora", "an adapter"),
    "vocoder.resblocks.0.acts1.0.act.alpha": ("base", "a part of a base"),
    "model.layers.0.self_attn.q_proj.weight": ("text_encoder", "a text encoder"),
    "vision_tower.x": ("text_encoder", "a text encoder"),
    "latents": ("latents", "latents or text features"),
    "video_prompt_embeds": ("latents", "latents or text features"),
    "a": ("unknown", "a file of unknown tensors ['a']"),
}


@pytest.mark.parametrize("name", SMALL)
def test_names_of_one_tensor_tell_the_kind(name, tmp_path):
    found = identify(saved(tmp_path / "x.safetensors", [name]))
    kind, text = SMALL[name]
    assert found.kind == kind and found.description.startswith(text)


def test_a_file_without_tensors_is_unknown(tmp_path):
    assert identify(saved(tmp_path / "x.safetensors", [])).kind == "unknown"


def specs(
    module, rows, wide, spelling="diffusion_model.{}.lora_{}.weight", sides=("A", "B")
):
    shapes = zip(sides, ((4, wide), (rows, 4)), strict=True)
    return {
        spelling.format(module, side): Spec(shape, np.dtype(ml_dtypes.bfloat16))
        for side, shape in shapes
    }


KOHYA = ("lora_unet_{}.lora_{}.weight", ("down", "up"))
DIFFUSERS = "transformer.{}.lora_{}.weight"
OLD_DIFFUSERS = ("transformer.{}.lora.{}.weight", ("down", "up"))
TOLD = {
    "gates": (specs("transformer_blocks.0.attn1.to_gate_logits", 32, 64), "2.3"),
    "prompt": (specs("prompt_adaln_single.linear", 128, 64), "2.3"),
    "captions": (specs("caption_projection.linear_1", 64, 64), "2.0"),
    "six rows": (specs("adaln_single.linear", 6 * 64, 64), "2.0"),
    "nine rows": (specs("audio_adaln_single.linear", 9 * 64, 64), "2.3"),
    "diffusers": (
        specs("time_embed.linear", 9 * 64, 64, "transformer.{}.lora_{}.weight"),
        "2.3",
    ),
    "old diffusers": (
        specs(
            "time_embed.linear",
            6 * 64,
            64,
            "transformer.{}.lora.{}.weight",
            ("down", "up"),
        ),
        "2.0",
    ),
    "text of diffusers": (
        specs("text_proj_in", 8, 8, "connectors.{}.lora_{}.weight"),
        "2.0",
    ),
    "kohya": (specs("adaln_single_linear", 9 * 64, 64, *KOHYA), "2.3"),
    "gates of kohya": (
        specs("transformer_blocks_0_attn1_to_gate_logits", 8, 64, *KOHYA),
        "2.3",
    ),
    "cross modulation": (
        specs("av_ca_video_scale_shift_adaln_single.linear", 4 * 64, 64),
        "",
    ),
    "attention": (specs("transformer_blocks.0.attn1.to_q", 64, 64), ""),
    "odd rows": (specs("adaln_single.linear", 7 * 64, 64), ""),
    "nothing": ({}, ""),
}


@pytest.mark.parametrize("case", TOLD)
def test_the_generation_of_a_lora_follows_from_modules_and_widths(case):
    tensors, want = TOLD[case]
    assert lora_generation(tensors) == want


def test_half_a_pair_and_odd_shapes_tell_nothing():
    dtype = np.dtype(np.float32)
    name = "diffusion_model.adaln_single.linear.lora_{}.weight"
    for a, b in (((), (384, 4)), ((4,), (384,)), ((4, 0), (384, 4)), ((4, 64), ())):
        tensors = {name.format("A"): Spec(a, dtype), name.format("B"): Spec(b, dtype)}
        assert lora_generation(tensors) == ""
    assert lora_generation({name.format("B"): Spec((384, 4), dtype)}) == ""


def test_our_adapter_says_its_generation_itself(tmp_path):
    name = "diffusion_model.transformer_blocks.0.audio_attn1.to_q.lora_A.weight"
    said = json.dumps({"generation": "2.3"})
    found = identify(saved(tmp_path / "x.safetensors", [name], idlora=said))
    assert (found.kind, found.generation) == ("adapter of ours", "2.3")
    for odd in ("[", "[1]", '{"generation": 3}', "[" * 5000):
        found = identify(saved(tmp_path / "x.safetensors", [name], idlora=odd))
        assert (found.kind, found.generation) == ("adapter of ours", "")


def test_a_converted_base_and_its_parts_are_known(checkpoint, tmp_path):
    folder = tmp_path / "converted"
    convert.convert_base(checkpoint, folder, say=lambda line: None)
    whole, original = identify(folder), identify(checkpoint)
    assert (whole.kind, whole.generation) == ("base", "2.0")
    assert whole.parameters == original.parameters
    assert whole.description.startswith("a converted base of generation 2.0")
    path = min(folder.glob("transformer*.safetensors"))
    part = identify(path)
    assert part.kind == "converted network"
    assert part.description.startswith("the transformer")
    with pytest.raises(ValueError, match="give the folder it lies in"):
        io.open_base(path)


def gemma(folder, shards=3):
    """A folder of shards with an index, of published names and sizes."""
    folder.mkdir()
    names = sorted(sparse_files.manifest("gemma-3-12b-text"))
    place = {}
    for number in range(shards):
        own = set(names[number::shards])
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        sparse_files.write(folder / file, "gemma-3-12b-text", only=own.__contains__)
        place |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text = json.dumps(sparse_files.config("gemma-3-12b-it"))
    (folder / "config.json").write_text(text)
    return folder


def test_a_folder_of_shards_is_one_thing(tmp_path):
    folder = gemma(tmp_path / "gemma")
    found, facts = identify(folder), INDEX["gemma-3-12b-text"]
    assert found.kind == "text_encoder"
    assert (found.tensors, found.parameters) == (facts["tensors"], facts["params"])
    (folder / "model-00002-of-00003.safetensors").unlink()
    found = identify(folder)
    assert found.kind == "unknown"
    assert "without ['model-00002-of-00003.safetensors']" in found.description


def test_folders_of_other_things_are_known(tmp_path):
    for name in ("latents", "conditions"):
        (tmp_path / "data" / name).mkdir(parents=True)
    assert identify(tmp_path / "data").kind == "latents"
    (tmp_path / "data/latents/a.pt").write_bytes(b"PK\x03\x04")
    assert identify(tmp_path / "data/latents/a.pt").kind == "latents"
    other = tmp_path / "pipeline"
    (other / "transformer").mkdir(parents=True)
    (other / "model_index.json").write_text("{}")
    gate = "transformer_blocks.0.attn1.to_gate_logits.weight"
    saved(other / "transformer/diffusion_pytorch_model.safetensors", [gate])
    found = identify(other)
    assert (found.kind, found.generation, found.tensors) == ("base", "2.3", 1)
    assert "diffusers" in found.description
    scaler = tmp_path / "latent_upsampler"
    scaler.mkdir()
    (scaler / "config.json").write_text('{"_class_name": "LTX2LatentUpsamplerModel"}')
    saved(scaler / "diffusion_pytorch_model.safetensors", ["initial_conv.weight"])
    assert identify(scaler).kind == "upsampler"
    (tmp_path / "empty").mkdir()
    assert "without .safetensors" in identify(tmp_path / "empty").description


DAMAGED = {
    b"": "an empty file",
    b"version https://git-lfs.github.com/spec/v1\n": "a git-lfs pointer",
    b"<!doctype html><title>Sign in": "a web page",
    b"PK\x03\x04" + bytes(60): "a zip archive (.pt",
    b"\x80\x02}q\x00.": "a pickle (.pt",
    b"something else": "a damaged file",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_what_is_no_checkpoint_at_all_is_named_too(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    found = identify(path)
    assert found.kind == "unknown" and found.tensors == 0
    assert found.description.startswith(DAMAGED[content])
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        io.open_base(path)


def test_nothing_at_a_path_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        identify(tmp_path / "absent")


GIVEN_AS_A_BASE = {
    "id-lora-22b": ("an adapter (LoRA)", "convert/lora.py"),
    "ltx-2.3-22b-distilled-lora-384": ("of generation 2.3", "convert/lora.py"),
    "ltx-2-spatial-upscaler-x2-1.0": ("a latent upsampler", "convert/upsampler.py"),
    "ltx-2.3-spatial-upscaler-x2-1.1": ("a latent upsampler", "convert/upsampler.py"),
    "gemma-3-12b-text": ("a text encoder", "convert/text_encoder.py"),
}


@pytest.mark.parametrize("name", GIVEN_AS_A_BASE)
def test_another_file_given_as_a_base_is_named_with_its_script(name, tmp_path):
    path = sparse_files.write(tmp_path / "x.safetensors", name)
    what, script = GIVEN_AS_A_BASE[name]
    with pytest.raises(ValueError, match="expected a base checkpoint") as caught:
        io.open_base(path)
    text = str(caught.value)
    assert what in text and script in text and "\n" not in text


def test_a_folder_given_as_a_base_is_named_with_its_script(tmp_path):
    with pytest.raises(ValueError, match=r"a text encoder.*convert/text_encoder"):
        io.open_base(gemma(tmp_path / "gemma", shards=2))


def test_a_base_without_its_config_is_no_base(tmp_path):
    path = sparse_files.write(tmp_path / "x.safetensors", "ltx-2-19b-dev", "")
    with pytest.raises(ValueError, match=r"a base checkpoint of gen.*no 'con"):
        io.open_base(path)


def test_a_base_of_full_size_is_opened_in_a_moment(tmp_path):
    path = sparse_files.write(tmp_path / "x.safetensors", "ltx-2.3-22b-dev")
    assert io.open_base(path).generation == "2.3"
    assert cpu_time.best(lambda: io.open_base(path)) < 60 * cpu_time.of_json(path)
    assert header(path).metadata["model_version"] == "2.3.0"

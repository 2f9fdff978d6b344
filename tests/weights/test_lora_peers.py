"""LoRA files between this library and peft and diffusers, on equal models."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model import test_transformer_parity as peer

from idlora_jax import checkpoints
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.config_text import text_connector_config
from idlora_jax.model import transformer
from idlora_jax.types import Branch
from idlora_jax.weights import io, lora, lora_files, lora_formats, lora_names, rules

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of torch, peft and diffusers
]
pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("diffusers")

generations = pytest.mark.parametrize("generation", ["2.0", "2.3"])
FILE = "pytorch_lora_weights.safetensors"


def model(generation):
    """(diffusers' model, our config, our base, inputs), small and random."""
    theirs, cfg, base = peer.make(generation, "split", (2, 12), (2, 8), 2, 5)
    return theirs, cfg, base, peer.inputs(cfg, 0)


@functools.cache
def slots(generation):
    return lora_names.slots({"transformer": model(generation)[2]})


def adapter(generation, *, seed=0):
    """Every kernel, of three ranks, some layers left out, changes of a tenth."""
    rng = np.random.default_rng(seed)
    flat = {}
    for n, slot in enumerate(slots(generation)):
        depth = 2 if slot.layer is not None else None
        rank, path = 2 + n % 3 if depth else 4, slot.module.path
        if depth and path not in flat:
            flat[path] = {
                "a": np.zeros((depth, slot.wide, 4), np.float32),
                "b": np.zeros((depth, 4, slot.out), np.float32),
            }
        a = rng.normal(0, 0.3, (slot.wide, rank)).astype(np.float32)
        b = rng.normal(0, 0.3, (rank, slot.out)).astype(np.float32)
        if depth is None:
            flat[path] = {"a": a, "b": b}
        elif n % 5:
            flat[path]["a"][slot.layer, :, :rank] = a
            flat[path]["b"][slot.layer, :rank] = b
    return rules.nest(flat)


@functools.cache
def forward(cfg):
    @jax.jit
    def run(base, change, streams, sigma, text):
        variables = {"params": base, "lora": change}
        prepared = transformer.prepare(cfg, variables, streams, (text,))
        branches = (Branch(),)
        return transformer.apply(cfg, variables, prepared, streams, sigma, branches)

    return run


def ours(cfg, base, change, i):
    """Our velocities with the adapter as a collection."""
    run = functools.partial(forward(cfg), base, jax.tree.map(jnp.asarray, change))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "ours", lambda *_: lambda _, *rest: run(*rest))
        return peer.run_ours(base, cfg, i, (Branch(),))[0]


def distance(got, want):
    return max(peer.relative(g, w) for g, w in zip(got, want, strict=True))


def pipeline(**models):
    """What diffusers' pipeline is to its LoRA loader."""
    from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin

    class Pipeline(LTX2LoraLoaderMixin):
        hf_device_map = None
        components = models

    made = Pipeline()
    for name, model in models.items():
        setattr(made, name, model)
    return made


def loaded(theirs, path):
    """Their model with our file, or our folder of PEFT's."""
    if path.is_dir():
        from peft import PeftModel

        return PeftModel.from_pretrained(theirs, path).base_model.model
    pipeline(transformer=theirs).load_lora_weights(path.parent, weight_name=path.name)
    return theirs


@generations
@pytest.mark.parametrize("format", ["comfyui", "diffusers", "peft"])
def test_our_file_does_there_what_it_does_here(generation, format, tmp_path, caplog):
    theirs, cfg, base, i = model(generation)
    change = adapter(generation)
    plain = peer.run_theirs(theirs, cfg, i)
    path = tmp_path / ("folder" if format == "peft" else FILE)
    checkpoints.save_adapter(path, change, AdapterMeta(), format=format)
    want = ours(cfg, base, change, i)
    got = peer.run_theirs(loaded(theirs, path), cfg, i)
    assert distance(got, want) < 1e-4
    assert distance(plain, want) > 0.1
    assert "unexpected" not in caplog.text and "missing" not in caplog.text
    again, _ = checkpoints.load_adapter(path, base)
    assert distance(ours(cfg, base, within(again, change), i), want) < 1e-6


def within(found, full):
    """`found` in the shapes of `full`, zero elsewhere: for the one compiled program."""
    out, flat = jax.tree.map(np.zeros_like, full), rules.flatten(found)
    shapes = rules.flatten(full)
    for path, leaf in flat.items():
        *parents, side = path.split("/")
        node = out
        for parent in parents:
            node = node[parent]
        assert all(np.array(leaf.shape) <= shapes[path].shape)
        node[side][tuple(slice(0, n) for n in leaf.shape)] = leaf
    return out


@generations
def test_readers_that_ignore_alpha_and_that_use_it_agree(generation, tmp_path):
    """kohya's names and alpha, by a reader of a few lines: W + scale * up @ down."""
    import torch
    from safetensors.torch import load_file

    theirs, cfg, base, i = model(generation)
    change = adapter(generation)
    path = tmp_path / "kohya.safetensors"
    checkpoints.save_adapter(path, change, AdapterMeta(), format="kohya")
    tensors, used = load_file(path), set()
    with torch.no_grad():
        for name, module in theirs.named_modules():
            original = peer.original_name(f"{name}.")[len("model.diffusion_model.") :]
            stem = "lora_unet_" + original.rstrip(".").replace(".", "_")
            if f"{stem}.alpha" in tensors:
                used.add(stem)
                down = tensors[f"{stem}.lora_down.weight"]
                assert float(tensors[f"{stem}.alpha"]) == down.shape[0]
                module.weight += tensors[f"{stem}.lora_up.weight"] @ down
    assert len(used) * 3 == len(tensors)
    assert distance(peer.run_theirs(theirs, cfg, i), ours(cfg, base, change, i)) < 1e-4


def trained(theirs, **settings):
    """Their model with a random adapter of their own, as peft's settings say."""
    import torch
    from peft import LoraConfig

    names = ["to_q", "to_out.0", "ff.net.2", "proj_in", "time_embed.linear"]
    names += ["av_cross_attn_audio_v2a_gate.linear", "audio_ff.net.0.proj"]
    config = LoraConfig(r=3, target_modules=names, **settings)
    torch.manual_seed(1)
    return config, lambda model: [
        torch.nn.init.normal_(p, std=0.3)
        for n, p in model.named_parameters()
        if "lora_B" in n
    ]


SETTINGS = {
    "alpha": {"lora_alpha": 6},
    "root": {"lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "lora_alpha": 6,
        "rank_pattern": {"audio_attn1.to_q": 2, "^proj_in": 4},
        "alpha_pattern": {"attn2.to_q": 1.5, r"transformer_blocks\.1\..*": 9},
    },
}


def written(theirs, way, settings, folder):
    """A file of theirs, and their model in the state that the file was made in."""
    from peft import get_peft_model
    from peft.utils import get_peft_model_state_dict

    config, fill = trained(theirs, **settings)
    if way == "peft":
        wrapped = get_peft_model(theirs, config)
        fill(wrapped)
        wrapped.save_pretrained(folder)
        return folder, wrapped.base_model.model
    theirs.add_adapter(config)
    fill(theirs)
    if way == "model":
        theirs.save_lora_adapter(folder)
        return folder, theirs
    metadata = theirs.peft_config["default"].to_dict()
    metadata = {k: [*v] if isinstance(v, set) else v for k, v in metadata.items()}
    pipeline().save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(theirs),
        transformer_lora_adapter_metadata=metadata,
    )
    return folder / FILE, theirs


@pytest.mark.parametrize(
    ("generation", "way", "name"),
    [
        ("2.0", "peft", "root"),
        ("2.0", "pipeline", "patterns"),
        ("2.3", "peft", "patterns"),
        ("2.3", "model", "alpha"),
    ],
)
def test_a_file_of_theirs_does_here_what_it_does_there(generation, way, name, tmp_path):
    theirs, cfg, base, i = model(generation)
    plain = peer.run_theirs(theirs, cfg, i)
    path, changed = written(theirs, way, SETTINGS[name], tmp_path / "out")
    want = peer.run_theirs(changed, cfg, i)
    found, _ = checkpoints.load_adapter(path, base)
    assert distance(plain, want) > 0.1
    full = within(found, adapter(generation))
    assert distance(ours(cfg, base, full, i), want) < 1e-4


SECTION = {
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 8,
    "connector_num_layers": 2,
    "connector_num_learnable_registers": 4,
    "connector_positional_embedding_max_pos": [64],
    "rope_type": "split",
    "frequencies_precision": "float64",
}
NEWER = {
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "connector_apply_gated_attention": True,
    "audio_connector_attention_head_dim": 4,
}


def connectors(generation):
    """(diffusers' connectors, shapes of ours)."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    newer = generation == "2.3"
    theirs = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_learnable_registers=4,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4 if newer else 8,
        audio_connector_num_learnable_registers=4,
        video_gated_attn=newer,
        audio_gated_attn=newer,
        per_modality_projections=newer,
        video_hidden_dim=16,
        audio_hidden_dim=8,
    )
    section = SECTION | (NEWER if newer else {})
    cfg = text_connector_config(
        {"transformer": section}, generation, text_width=16, text_states=3
    )
    return theirs, io.shapes_of("text_connector", cfg)


def connector_part(shapes):
    """An adapter of every kernel of the connectors."""
    rng, out = np.random.default_rng(0), {}
    for slot in lora_names.slots({"text_connector": shapes}):
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
        pair = draw(slot.wide, 2), draw(2, slot.out)
        out.setdefault(slot.module.path, []).append(pair)
    return {
        path: {
            side: np.stack(found) if "blocks" in path else found[0]
            for side, found in zip("ab", zip(*pairs, strict=True), strict=True)
        }
        for path, pairs in out.items()
    }


@generations
@pytest.mark.parametrize("format", ["comfyui", "diffusers", "peft"])
def test_the_text_connector_s_part_reaches_diffusers_connectors(
    generation, format, tmp_path
):
    theirs, shapes = connectors(generation)
    part = connector_part(shapes)
    if format == "comfyui":  # of which diffusers reads the projections alone
        part = {path: pair for path, pair in part.items() if "projection" in path}
    both = {"text_connector": rules.nest(part)}
    path = tmp_path / ("folder" if format == "peft" else FILE)
    lora_formats.write(path, lora.items(both), {}, format)
    if format == "peft":
        theirs = loaded(theirs, path)
    else:
        transformer_ = model(generation)[0]
        reader = pipeline(transformer=transformer_, connectors=theirs)
        reader.load_lora_weights(tmp_path, weight_name=FILE)
    deltas = {
        name: module.get_delta_weight(next(iter(module.lora_A))).numpy(force=True)
        for name, module in theirs.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    for slot in lora_names.slots({"text_connector": shapes}):
        pair, layer = part.get(slot.module.path), slot.layer
        if pair:
            a, b = (pair[s] if layer is None else pair[s][layer] for s in "ab")
            name = lora_names.filled(slot.module.diffusers, layer)
            np.testing.assert_allclose(deltas.pop(name), (a @ b).T, atol=1e-5)
    assert part and not deltas
    found, _ = checkpoints.load_adapters(path, {"text_connector": shapes})
    jax.tree.map(np.testing.assert_array_equal, found, both)


def test_diffusers_metadata_says_alpha_equal_to_rank_for_every_module(tmp_path):
    path = tmp_path / FILE
    checkpoints.save_adapter(path, adapter("2.0"), AdapterMeta(), format="diffusers")
    _, metadata = checkpoints.read_tensors(path)
    said = json.loads(metadata[lora_files.THEIRS])
    assert said["transformer.r"] == said["transformer.lora_alpha"]
    assert said["transformer.rank_pattern"] == said["transformer.alpha_pattern"]

"""Every published key and its name in diffusers; every config and its way back."""

import dataclasses

import pytest
import sparse_files

from idlora_jax.weights import (
    diffusers_audio,
    diffusers_config,
    diffusers_keys,
    diffusers_open,
    diffusers_vae,
    io,
)

FILES = {"2.0": "ltx-2-19b", "2.3": "ltx-2.3-22b"}
generations = pytest.mark.parametrize("generation", FILES)


def embedded(generation):
    return sparse_files.config(FILES[generation])


def manifest(generation):
    return sparse_files.manifest(f"{FILES[generation]}-dev")


def theirs(generation):
    """config.json of every component, from the published config."""
    config = embedded(generation)
    nets = {n: io.read_config(n, config, generation) for n in io.NETWORKS}
    voc = diffusers_audio.vocoder_to_diffusers(config["vocoder"])
    newer = generation == "2.3"
    return {
        "transformer": diffusers_config.transformer_to_diffusers(nets["transformer"]),
        "text_connector": diffusers_config.connectors_to_diffusers(
            nets["text_connector"]
        ),
        "video_vae": diffusers_vae.video_vae_to_diffusers(
            nets["video_vae"], generation
        ),
        "audio_vae": diffusers_audio.audio_vae_to_diffusers(nets["audio_vae"]),
        "vocoder": voc | ({"_class_name": "LTX2VocoderWithBWE"} if newer else {}),
    }


def back(generation, configs):
    parts = diffusers_open.COMPONENTS
    return diffusers_config.merged(
        (name, parts[name].sections(config, generation))
        for name, config in configs.items()
    )


@generations
def test_every_published_key_has_one_name_in_diffusers_and_back(generation):
    config, seen, dropped = embedded(generation), set(), []
    names = {
        n: part.names(config, generation)
        for n, part in diffusers_open.COMPONENTS.items()
    }
    for key in manifest(generation):
        owner = io.owner(key)
        spelled = diffusers_keys.to_diffusers(names[owner], key)
        if spelled is None:
            dropped.append(key)
            continue
        assert diffusers_keys.to_original(names[owner], spelled) == key
        assert (owner, spelled) not in seen
        seen.add((owner, spelled))
    assert dropped == (sorted(diffusers_keys.DROPPED) if generation == "2.0" else [])


SPELLED = """
2.0 encoder.down_blocks.7.conv.conv.bias
    encoder.down_blocks.3.downsamplers.0.conv.conv.bias
2.0 encoder.down_blocks.8.res_blocks.1.conv2.conv.bias
    encoder.mid_block.resnets.1.conv2.conv.bias
2.0 decoder.up_blocks.0.res_blocks.4.conv1.conv.weight
    decoder.mid_block.resnets.4.conv1.conv.weight
2.0 decoder.last_time_embedder.timestep_embedder.linear_1.bias
    decoder.time_embedder.timestep_embedder.linear_1.bias
2.3 decoder.up_blocks.7.conv.conv.weight
    decoder.up_blocks.3.upsamplers.0.conv.conv.weight
2.3 per_channel_statistics.std-of-means
    latents_std
""".split()


def test_blocks_of_the_video_vae_are_numbered_in_groups():
    part = diffusers_open.COMPONENTS["video_vae"]
    names = {g: part.names(embedded(g), g) for g in FILES}
    columns = (SPELLED[n::3] for n in range(3))
    for generation, inner, name in zip(*columns, strict=True):
        key = f"vae.{inner}"
        assert diffusers_keys.to_diffusers(names[generation], key) == name
        assert diffusers_keys.to_original(names[generation], name) == key


def test_a_name_of_neither_spelling_has_no_other():
    names = diffusers_keys.TRANSFORMER
    for key in ("patchify_proj.weight", "adaln_single.linear.bias"):
        assert diffusers_keys.to_original(names, key) is None
    assert diffusers_keys.to_diffusers(names, "vae.x") is None
    mixed = "transformer_blocks.0.attn1.q_norm.weight"
    assert diffusers_keys.to_original(names, mixed) is None


@generations
def test_a_config_there_and_back_says_the_same_to_every_reader(generation):
    config = embedded(generation)
    again = back(generation, theirs(generation))
    for name in io.NETWORKS:
        want = io.read_config(name, config, generation)
        got = io.read_config(name, again, generation)
        if name == "video_vae":
            assert got.statistics == ("mean", "std")
            got = dataclasses.replace(got, statistics=want.statistics)
        assert got == want


@generations
def test_a_config_of_absent_fields_is_that_of_the_class(generation):
    configs = theirs(generation)
    kept = ("transformer", "text_connector")
    if generation == "2.0":
        short = {n: {} for n in configs if n not in kept}
        short["video_vae"] = {"decoder_causal": False}
        short |= {n: {"rope_type": "split"} for n in kept}
    else:
        short = {n: configs[n] for n in (*kept, "video_vae")} | {"audio_vae": {}}
        short["vocoder"] = {"_class_name": "LTX2VocoderWithBWE"}
    assert back(generation, short) == back(generation, configs)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("transformer", {"ff_bias": False}, "ff_bias = False is not supported"),
        ("transformer", {"patch_size": 2}, "patch_size = 2"),
        ("transformer", {"audio_gated_attn": False}, "audio_gated_attn = False"),
        ("transformer", {"rope_type": "other"}, "disagree on rope_type"),
        ("text_connector", {"caption_channels": 9}, "disagree on caption_channels"),
        ("text_connector", {"video_hidden_dim": 9}, "video_hidden_dim = 9"),
        ("text_connector", {"proj_bias": False}, "proj_bias = False"),
        ("video_vae", {"resnet_norm_eps": 1.0}, "resnet_norm_eps = 1.0"),
        ("video_vae", {"upsample_factor": [2, 2]}, "has 2 entries, expected 4"),
        ("video_vae", {"downsample_type": ["conv"] * 4}, "resampling 'conv'"),
        ("video_vae", {"block_out_channels": [9] * 4}, "not multiples"),
        ("video_vae", {"decoder_block_out_channels": [8] * 4}, "expected"),
        ("video_vae", {"decoder_spatial_padding_mode": "reflect"}, "reflect"),
        ("video_vae", {"spatio_temporal_scaling": [True, False]}, "= False"),
        ("audio_vae", {"norm_type": "group"}, "norm_type = 'group'"),
        ("vocoder", {"bwe_final_act_fn": "tanh"}, "final_act_fn = 'tanh'"),
        ("vocoder", {"in_channels": 64}, "in_channels = 64"),
    ],
)  # fmt: skip
def test_what_no_ltx_2_has_is_refused_by_name(name, change, message):
    configs = theirs("2.3")
    configs[name] |= change
    with pytest.raises(ValueError, match=message):
        back("2.3", configs)


def test_a_vae_that_diffusers_cannot_describe_is_refused():
    config = embedded("2.0")
    blocks = config["vae"]["decoder_blocks"]
    for changed in ([blocks[0], *blocks], [["res_x_y", {"multiplier": 2}], *blocks]):
        section = config["vae"] | {"decoder_blocks": changed}
        cfg = io.read_config("video_vae", {"vae": section}, "2.0")
        with pytest.raises(ValueError, match="cannot describe"):
            diffusers_vae.video_vae_to_diffusers(cfg, "2.0")
    section = config["vae"] | {"decoder_blocks": [blocks[0], *blocks]}
    cfg = io.read_config("video_vae", {"vae": section}, "2.0")
    with pytest.raises(ValueError, match="two residual stages in a row"):
        diffusers_keys.video_vae(cfg)


@generations
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of torch and diffusers, on import
def test_the_published_models_have_the_keys_and_shapes_of_diffusers_classes(generation):
    import diffusers
    import torch
    from diffusers.pipelines import ltx2

    config, configs = embedded(generation), theirs(generation)
    held = manifest(generation)
    for name, part in diffusers_open.COMPONENTS.items():
        kind = part.classes[-1 if generation == "2.3" else 0]
        kind = getattr(diffusers, kind, None) or getattr(ltx2, kind)
        with torch.device("meta"):
            model = kind.from_config(configs[name])
        want = {k: list(v.shape) for k, v in model.state_dict().items()}
        names = part.names(config, generation)
        owned = {k: e["shape"] for k, e in held.items() if io.owner(k) == name}
        got = {diffusers_keys.to_diffusers(names, k): s for k, s in owned.items()}
        got.pop(None, None)
        assert got == want

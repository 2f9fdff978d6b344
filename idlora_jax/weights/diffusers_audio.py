"""Embedded config <-> config.json of diffusers: the audio VAE and the vocoders.

Source: diffusers, models/autoencoders/autoencoder_kl_ltx2_audio.py and
pipelines/ltx2/vocoder.py (parameters of the classes).
"""

from __future__ import annotations

from typing import Any

from idlora_jax.config import Json
from idlora_jax.config_codecs import AudioVAEConfig
from idlora_jax.weights.diffusers_config import Section, demand

_AUDIO_FIXED = {
    "norm_type": "pixel",
    "causality_axis": "height",
    "dropout": 0.0,
    "is_causal": True,
    "double_z": True,
}
_AUDIO_DEFAULTS = {
    "base_channels": 128,
    "output_channels": 2,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": None,
    "in_channels": 2,
    "resolution": 256,
    "latent_channels": 8,
    "mid_block_add_attention": False,
    "sample_rate": 16000,
    "mel_hop_length": 160,
    "mel_bins": 64,
}
_AUDIO_NAMES = {
    "ch": "base_channels",
    "out_ch": "output_channels",
    "ch_mult": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "in_channels": "in_channels",
    "resolution": "resolution",
    "z_channels": "latent_channels",
    "mid_block_add_attention": "mid_block_add_attention",
    "mel_bins": "mel_bins",
}
_N_FFT = 1024
"""Of the mel front end; diffusers has no field for it."""


def audio_vae_to_diffusers(cfg: AudioVAEConfig) -> Section:
    """The config.json of `AutoencoderKLLTX2Audio`.

    Raises:
        ValueError: if diffusers has no field for what it says.
    """
    if cfg.n_fft != _N_FFT:
        raise ValueError(
            f"audio_vae config: filter_length = {cfg.n_fft} has no place in diffusers, "
            f"expected {_N_FFT}"
        )
    levels = range(len(cfg.multipliers))
    resolution = _AUDIO_DEFAULTS["resolution"]
    attention = [resolution // 2**n for n in levels if cfg.attention[n]]
    return {
        "base_channels": cfg.width,
        "output_channels": cfg.out_channels,
        "ch_mult": list(cfg.multipliers),
        "num_res_blocks": cfg.res_blocks,
        "attn_resolutions": attention or None,
        "in_channels": cfg.in_channels,
        "resolution": resolution,
        "latent_channels": cfg.latent_channels,
        "mid_block_add_attention": cfg.mid_attention,
        "sample_rate": cfg.sample_rate,
        "mel_hop_length": cfg.hop,
        "mel_bins": cfg.mel_bins,
        **_AUDIO_FIXED,
    }


def audio_vae_to_original(config: Json) -> dict[str, Section]:
    """Sections of an original file from the audio VAE's config.json.

    Raises:
        ValueError: if it describes another kind of network.
    """
    demand("audio_vae", config, _AUDIO_FIXED)
    c = {**_AUDIO_DEFAULTS, **config}
    dd: Section = {ours: c[theirs] for ours, theirs in _AUDIO_NAMES.items()}
    fixed = ("norm_type", "causality_axis", "dropout", "double_z")
    dd |= {key: _AUDIO_FIXED[key] for key in fixed}
    dd |= {
        "attn_resolutions": list(c["attn_resolutions"] or ()),
        "downsample_time": False,
    }
    rate, hop = c["sample_rate"], c["mel_hop_length"]
    stft = {"filter_length": _N_FFT, "hop_length": hop, "win_length": _N_FFT}
    mel = {"n_mel_channels": c["mel_bins"], "mel_fmin": 0, "mel_fmax": rate // 2}
    params = {"sampling_rate": rate, "embed_dim": c["latent_channels"], "ddconfig": dd}
    audio = {"sampling_rate": rate, "stereo": True}
    front = {"audio": audio, "stft": {**stft, "causal": True}, "mel": mel}
    return {"audio_vae": {"model": {"params": params}, "preprocessing": front}}


_MELS = {"in_channels": 128, "out_channels": 2}
_SLOPE = {"leaky_relu_negative_slope": 0.1}
_FILTERS = {"antialias_ratio": 2, "antialias_kernel_size": 12}
_VOCODER_NAMES = {
    "upsample_initial_channel": "hidden_channels",
    "upsample_rates": "upsample_factors",
    "upsample_kernel_sizes": "upsample_kernel_sizes",
    "resblock_kernel_sizes": "resnet_kernel_sizes",
    "resblock_dilation_sizes": "resnet_dilations",
}
_VOCODER_DEFAULTS = {
    "upsample_initial_channel": 1024,
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
}
_EXTENSION_NAMES = {
    "n_fft": "filter_length",
    "hop_length": "hop_length",
    "win_size": "window_length",
    "num_mels": "num_mel_channels",
    "input_sampling_rate": "input_sampling_rate",
    "output_sampling_rate": "output_sampling_rate",
}
_EXTENSION_DEFAULTS = {
    "filter_length": 512,
    "hop_length": 80,
    "window_length": 512,
    "num_mel_channels": 64,
    "input_sampling_rate": 16000,
    "output_sampling_rate": 48000,
}


def _generator_to_diffusers(voc: Json) -> Section:
    """One generator; `voc` has the keys of an original file."""
    demand("vocoder", voc, {"stereo": True})
    last = "tanh" if voc.get("use_tanh_at_final", True) else "clamp"
    snake = voc.get("resblock", "1") != "1"
    return {
        **_MELS,
        **{b: voc.get(a, _VOCODER_DEFAULTS[a]) for a, b in _VOCODER_NAMES.items()},
        "act_fn": voc.get("activation", "snakebeta") if snake else "leaky_relu",
        **_SLOPE,
        "antialias": snake,
        **_FILTERS,
        "final_act_fn": last if voc.get("apply_final_activation", True) else None,
        "final_bias": voc.get("use_bias_at_final", True),
    }


def _generator_to_original(config: Json) -> Section:
    """The keys of an original file for one generator of diffusers."""
    snake = config["act_fn"] != "leaky_relu"
    fixed = {"antialias": snake, **_MELS, **_SLOPE, **(_FILTERS if snake else {})}
    demand("vocoder", config, fixed)
    section = {a: config[b] for a, b in _VOCODER_NAMES.items()}
    last = config["final_act_fn"]
    section |= {
        "resblock": "AMP1" if snake else "1",
        "stereo": True,
        "use_tanh_at_final": last == "tanh",
        "use_bias_at_final": config["final_bias"],
    }
    return section | ({"activation": config["act_fn"]} if snake else {})


def has_extension(vocoder: Json) -> bool:
    """Whether a `vocoder` section, or a config.json, is of 2.3's two generators."""
    return "bwe" in vocoder or vocoder.get("_class_name") == "LTX2VocoderWithBWE"


def vocoder_to_diffusers(section: Json) -> Section:
    """The config.json of `LTX2Vocoder` or `LTX2VocoderWithBWE`.

    Args:
        section: `vocoder` of an embedded config.
    """
    if not has_extension(section):
        newer = section.get("output_sampling_rate", 24000)
        rate = section.get("output_sample_rate", newer)
        return {**_generator_to_diffusers(section), "output_sampling_rate": rate}
    extension = section["bwe"]
    second = _generator_to_diffusers(extension)
    return {
        **_generator_to_diffusers(section["vocoder"]),
        **{f"bwe_{key}": value for key, value in second.items()},
        **{
            theirs: extension.get(ours, _EXTENSION_DEFAULTS[theirs])
            for ours, theirs in _EXTENSION_NAMES.items()
        },
    }


def _defaults(names: Json, values: Json, **more: Any) -> Section:
    return {b: values[a] for a, b in names.items()} | more


_PLAIN = _defaults(
    _VOCODER_NAMES,
    _VOCODER_DEFAULTS,
    act_fn="leaky_relu",
    antialias=False,
    final_act_fn="tanh",
    final_bias=True,
)
_SNAKE = {"act_fn": "snakebeta", "antialias": True, "final_act_fn": None}
_FIRST = (
    _PLAIN
    | _SNAKE
    | {
        "hidden_channels": 1536,
        "upsample_factors": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
        "final_bias": False,
    }
)
_SECOND = (
    _PLAIN
    | _SNAKE
    | {
        "hidden_channels": 512,
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "final_bias": False,
    }
)


def vocoder_to_original(config: Json) -> dict[str, Section]:
    """Sections of an original file from a vocoder's config.json.

    Raises:
        ValueError: if it describes another kind of network.
    """
    if not has_extension(config):
        c = {**_PLAIN, **config}
        demand("vocoder", c, {"final_act_fn": c["final_act_fn"] or "tanh"})
        section = _generator_to_original(c)
        rate = config.get("output_sampling_rate", 24000)
        return {"vocoder": {**section, "output_sampling_rate": rate}}
    c = {**_EXTENSION_DEFAULTS, **config}
    second = {
        key.removeprefix("bwe_"): value
        for key, value in config.items()
        if key.startswith("bwe_")
    }
    demand("vocoder", second, {"final_act_fn": None})
    extension = _generator_to_original({**_SECOND, **second})
    extension |= {ours: c[theirs] for ours, theirs in _EXTENSION_NAMES.items()}
    extension["apply_final_activation"] = False
    # Published folders have no bound on the first waveform; their original has one.
    first = _generator_to_original({**_FIRST, **config})
    return {"vocoder": {"vocoder": first, "bwe": extension}}

"""What the latent networks are: video VAE, audio VAE, vocoder of a checkpoint.

Readers turn the sections `vae`, `audio_vae` and `vocoder` of the embedded JSON into
frozen dataclasses in which every width is already resolved, so that the networks hold
no arithmetic on channel multipliers. A key that asks for something the networks do not
do is an error here, not a wrong picture later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from idlora_jax.config import Generation, Json

SpatialPadding = Literal["zeros", "reflect"]
Stride = tuple[int, int, int]


@dataclass(frozen=True)
class Residual:
    """A stage of `layers` residual blocks, `width` channels in and out."""

    width: int
    layers: int
    inject_noise: bool = False


@dataclass(frozen=True)
class Resample:
    """A change of resolution by `stride` (time, height, width).

    `shortcut`: the input, rearranged to the new shape, is added to the output.
    """

    stride: Stride
    width_in: int
    width_out: int
    shortcut: bool


Block = Residual | Resample


@dataclass(frozen=True)
class VideoVAEConfig:
    """The video VAE of either generation.

    `encoder` and `decoder` are in order of execution. `log_var_channels` is what the
    encoder emits beyond the means (unused). `statistics` names the buffers of the file;
    only `mean` and `std` are used.
    """

    latent_channels: int
    in_channels: int
    out_channels: int
    patch: int
    log_var_channels: int
    encoder: tuple[Block, ...]
    decoder: tuple[Block, ...]
    encoder_padding: SpatialPadding
    decoder_padding: SpatialPadding
    causal_decoder: bool
    timestep_conditioning: bool
    statistics: tuple[str, ...]

    @property
    def time_factor(self) -> int:
        """Frames per latent frame (the first latent frame holds one)."""
        return math.prod(b.stride[0] for b in self.encoder if isinstance(b, Resample))

    @property
    def space_factor(self) -> int:
        """Pixels per latent cell along each side."""
        strides = (b.stride[1] for b in self.encoder if isinstance(b, Resample))
        return self.patch * math.prod(strides)


@dataclass(frozen=True)
class AudioVAEConfig:
    """The audio VAE: log-mel spectrogram <-> latent frames.

    `attention` says per resolution level whether its residual blocks are followed by
    self-attention. `sample_rate` and `hop` are in samples, of the mel front end.
    """

    width: int
    multipliers: tuple[int, ...]
    res_blocks: int
    latent_channels: int
    in_channels: int
    out_channels: int
    mel_bins: int
    mid_attention: bool
    attention: tuple[bool, ...]
    sample_rate: int
    hop: int
    n_fft: int

    @property
    def factor(self) -> int:
        """Mel frames per latent frame, and mel bins per latent bin."""
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class VocoderConfig:
    """The HiFi-GAN vocoder of generation 2.0: stereo mel -> stereo waveform."""

    width: int
    mel_bins: int
    rates: tuple[int, ...]
    up_kernels: tuple[int, ...]
    kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    sample_rate: int

    @property
    def factor(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.rates)


def _section(config: Json, name: str) -> Json:
    if name not in config:
        raise ValueError(
            f"config has no {name!r} section, got {sorted(config)}; "
            "is this an LTX-2 checkpoint?"
        )
    return config[name]


def _require(section: str, values: Json, required: Json) -> None:
    """Raise unless every key of `required` that `values` holds has that value."""
    for key, value in required.items():
        if values.get(key, value) != value:
            raise ValueError(
                f"{section} config: {key} = {values[key]!r} is not supported, "
                f"expected {value!r}"
            )


def _padding(value: str) -> SpatialPadding:
    if value == "zeros" or value == "reflect":
        return value
    raise ValueError(
        f"vae config: spatial padding {value!r} is not supported, "
        "expected 'zeros' or 'reflect'"
    )


_STRIDES: dict[str, Stride] = {
    "compress_time": (2, 1, 1),
    "compress_space": (1, 2, 2),
    "compress_all": (2, 2, 2),
}
_LOG_VAR = {"uniform": lambda c: 1, "constant": lambda c: 1, "per_channel": lambda c: c}
STATISTICS: dict[Generation, tuple[str, ...]] = {
    "2.0": (
        "mean",
        "std",
        "mean_of_stds",
        "mean_of_stds_over_std_of_means",
        "channel",
    ),
    "2.3": ("mean", "std"),
}
"""Names of the statistics buffers in a generation's file; the first two are used."""


def _named(blocks: Iterable[Any]) -> list[tuple[str, Json]]:
    """`[name, layers]` and `[name, {..}]` in the one form `(name, {..})`."""
    pairs = ((name, given) for name, given in blocks)
    return [(n, {"num_layers": g} if isinstance(g, int) else g) for n, g in pairs]


def _unknown(side: str, name: str, known: Iterable[str]) -> ValueError:
    return ValueError(
        f"vae config: {side} block {name!r} is not supported, expected one of "
        f"{sorted(known)}"
    )


def _encoder_blocks(section: Json, width: int) -> tuple[Block, ...]:
    known = {f"{name}_res": stride for name, stride in _STRIDES.items()}
    out: list[Block] = []
    for name, given in _named(section.get("encoder_blocks", ())):
        if name == "res_x":
            out.append(Residual(width, given["num_layers"]))
        elif name in known:
            wider = width * given.get("multiplier", 2)
            out.append(Resample(known[name], width, wider, shortcut=True))
            width = wider
        else:
            raise _unknown("encoder", name, ["res_x", *known])
    return tuple(out)


def _divisor(name: str, given: Json, generation: Generation) -> int:
    """By how much an upsampling block divides the width.

    2.0 has a multiplier for `compress_all` alone and ignores it elsewhere.
    """
    if generation == "2.0" and name != "compress_all":
        return 1
    return given.get("multiplier", 1)


def _decoder_width(section: Json, blocks: list[tuple[str, Json]], old: bool) -> int:
    """Width of the first decoder stage: from the multipliers (2.0), or 8x a base."""
    if not old:
        return 8 * section.get("decoder_base_channels", 128)
    multipliers = (g.get("multiplier", 1) for n, g in blocks if n == "compress_all")
    return section.get("latent_channels", 128) * math.prod(multipliers)


def _decoder_blocks(section: Json, generation: Generation) -> tuple[Block, ...]:
    # Files list decoder blocks from the pixels to the latent.
    blocks = _named(section.get("decoder_blocks", ()))[::-1]
    width = _decoder_width(section, blocks, generation == "2.0")
    out: list[Block] = []
    for name, given in blocks:
        if name == "res_x":
            noise = given.get("inject_noise", False)
            out.append(Residual(width, given["num_layers"], noise))
        elif name in _STRIDES:
            narrower = width // _divisor(name, given, generation)
            shortcut = name == "compress_all" and given.get("residual", False)
            out.append(Resample(_STRIDES[name], width, narrower, shortcut))
            width = narrower
        else:
            raise _unknown("decoder", name, ["res_x", *_STRIDES])
    return tuple(out)


def video_vae_config(
    config: Json, generation: Generation | None = None
) -> VideoVAEConfig:
    """Read the `vae` section of an embedded config.

    Args:
        config: the whole embedded JSON.
        generation: overrides what the section's keys suggest (only 2.3 files have
            `spatial_padding_mode`). It decides the decoder's first width, which blocks
            take a multiplier, and how many statistics buffers there are.

    Raises:
        ValueError: if the section describes another kind of network.

    Source: `ltx_core/model/video_vae/model_configurator.py`.
    """
    vae = _section(config, "vae")
    found: Generation = "2.3" if "spatial_padding_mode" in vae else "2.0"
    generation = generation or found
    required = {"dims": 3, "norm_layer": "pixel_norm", "use_quant_conv": False}
    _require("vae", vae, {**required, "normalize_latent_channels": False})
    log_var = vae.get("latent_log_var", "uniform")
    if log_var not in _LOG_VAR:
        raise ValueError(
            f"vae config: latent_log_var {log_var!r} is not supported, "
            f"expected one of {sorted(_LOG_VAR)}"
        )
    channels = vae.get("latent_channels", 128)
    both = vae.get("spatial_padding_mode")
    return VideoVAEConfig(
        latent_channels=channels,
        in_channels=vae.get("in_channels", 3),
        out_channels=vae.get("out_channels", 3),
        patch=vae.get("patch_size", 4),
        log_var_channels=_LOG_VAR[log_var](channels),
        encoder=_encoder_blocks(vae, channels),
        decoder=_decoder_blocks(vae, generation),
        encoder_padding=_padding(
            both or vae.get("encoder_spatial_padding_mode", "zeros")
        ),
        decoder_padding=_padding(
            both or vae.get("decoder_spatial_padding_mode", "reflect")
        ),
        causal_decoder=vae.get("causal_decoder", False),
        timestep_conditioning=vae.get("timestep_conditioning", True),
        statistics=STATISTICS[generation],
    )


_AUDIO_REQUIRED = {
    "attn_type": "vanilla",
    "causality_axis": "height",
    "double_z": True,
    "norm_type": "pixel",
    "resamp_with_conv": True,
}


def audio_vae_config(config: Json) -> AudioVAEConfig:
    """Read the `audio_vae` section of an embedded config (both generations).

    Raises:
        ValueError: if the section describes another kind of network, or its mel bins do
            not fit its statistics.

    Source: `ltx_core/model/audio_vae/model_configurator.py`.
    """
    section = _section(config, "audio_vae")
    params = section.get("model", {}).get("params", {})
    dd = params.get("ddconfig", {})
    front = section.get("preprocessing", {})
    stft, mel = front.get("stft", {}), front.get("mel", {})
    _require("audio_vae", dd, _AUDIO_REQUIRED)
    multipliers = tuple(dd.get("ch_mult", (1, 2, 4)))
    size = dd.get("resolution", 256)
    at = dd.get("attn_resolutions", (8, 16, 32))
    cfg = AudioVAEConfig(
        width=dd.get("ch", 128),
        multipliers=multipliers,
        res_blocks=dd.get("num_res_blocks", 2),
        latent_channels=dd.get("z_channels", 8),
        in_channels=dd.get("in_channels", 2),
        out_channels=dd.get("out_ch", 2),
        mel_bins=dd.get("mel_bins") or mel.get("n_mel_channels", 64),
        mid_attention=dd.get("mid_block_add_attention", True),
        attention=tuple(size // 2**n in at for n in range(len(multipliers))),
        sample_rate=params.get("sampling_rate", 16000),
        hop=stft.get("hop_length", 160),
        n_fft=stft.get("filter_length", 1024),
    )
    # The statistics have one entry per latent channel and bin, but are sized by `ch`.
    if cfg.width * cfg.factor != cfg.latent_channels * cfg.mel_bins:
        raise ValueError(
            f"audio_vae config: ch = {cfg.width} must equal z_channels "
            f"{cfg.latent_channels} x mel_bins {cfg.mel_bins} / {cfg.factor}"
        )
    return cfg


_VOCODER_REQUIRED = {
    "resblock": "1",
    "stereo": True,
    "use_tanh_at_final": True,
    "use_bias_at_final": True,
}


def vocoder_config(config: Json) -> VocoderConfig:
    """Read the `vocoder` section of an embedded config (generation 2.0).

    Raises:
        ValueError: for the two-stage vocoder of 2.3 (snake activations and bandwidth
            extension), which is not supported yet, and for other networks.

    Source: `ltx_core/model/audio_vae/model_configurator.py: VocoderConfigurator`.
    """
    voc = _section(config, "vocoder")
    if "bwe" in voc:
        raise ValueError(
            "vocoder config: the vocoder with bandwidth extension of LTX-2.3 ('bwe') "
            "is not supported yet; use the vocoder of an LTX-2 2.0 checkpoint"
        )
    _require("vocoder", voc, _VOCODER_REQUIRED)
    dilations = voc.get("resblock_dilation_sizes", ((1, 3, 5),) * 3)
    newer_key = voc.get("output_sampling_rate", 24000)
    cfg = VocoderConfig(
        width=voc.get("upsample_initial_channel", 1024),
        mel_bins=64,
        rates=tuple(voc.get("upsample_rates", (6, 5, 2, 2, 2))),
        up_kernels=tuple(voc.get("upsample_kernel_sizes", (16, 15, 8, 4, 4))),
        kernels=tuple(voc.get("resblock_kernel_sizes", (3, 7, 11))),
        dilations=tuple(tuple(d) for d in dilations),
        sample_rate=voc.get("output_sample_rate", newer_key),
    )
    per_stage = ("upsample_kernel_sizes", cfg.up_kernels, cfg.rates)
    per_block = ("resblock_dilation_sizes", cfg.dilations, cfg.kernels)
    for name, values, others in (per_stage, per_block):
        if len(values) != len(others):
            raise ValueError(
                f"vocoder config: {name} has {len(values)} entries, "
                f"expected {len(others)}"
            )
    return cfg

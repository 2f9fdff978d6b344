"""What the audio VAE of a checkpoint is, and what all codecs read their configs with.

The reader turns the section `audio_vae` of the embedded JSON into a frozen dataclass. A
key that asks for something the network does not do is an error here, not a wrong sound
later.
"""

from __future__ import annotations

from dataclasses import dataclass

from idlora_jax.config import Json


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


def section_of(config: Json, name: str) -> Json:
    """The named section of a config.

    Raises:
        ValueError: naming the sections there are.
    """
    if name not in config:
        raise ValueError(
            f"config has no {name!r} section, got {sorted(config)}; "
            "is this an LTX-2 checkpoint?"
        )
    return config[name]


def require(section: str, values: Json, required: Json) -> None:
    """Check that every key of `required` that `values` holds has that value.

    Raises:
        ValueError: naming the key, its value, and the supported one.
    """
    for key, value in required.items():
        if values.get(key, value) != value:
            raise ValueError(
                f"{section} config: {key} = {values[key]!r} is not supported, "
                f"expected {value!r}"
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
    section = section_of(config, "audio_vae")
    params = section.get("model", {}).get("params", {})
    dd = params.get("ddconfig", {})
    front = section.get("preprocessing", {})
    stft, mel = front.get("stft", {}), front.get("mel", {})
    require("audio_vae", dd, _AUDIO_REQUIRED)
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

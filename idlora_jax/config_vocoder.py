"""What the vocoder of a checkpoint is: one generator, or two with bandwidth extension.

Files of generation 2.0 describe one generator, `{"upsample_rates": .., ..}`. Those of
2.3 describe two, `{"vocoder": {..}, "bwe": {..}}`: the first makes sound at a low rate,
the second raises the rate of that sound. Both are the same network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from idlora_jax.config import Json
from idlora_jax.config_codecs import require, section_of

Activation = Literal["leaky", "snake", "snakebeta"]
Bound = Literal["tanh", "clamp", "none"]

MEL_BINS = 64
"""Of the log-mel that the audio VAE gives; no config says it."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Stereo log-mel of `mel_bins` bands -> stereo waveform.

    `width` is that of the first layer, halved by each of the `rates`. A "leaky"
    activation is a leaky ReLU, the others are anti-aliased. `bound` is what holds the
    waveform in [-1, 1]; `bias` is whether the last layer has one.
    """

    width: int
    mel_bins: int
    rates: tuple[int, ...]
    up_kernels: tuple[int, ...]
    kernels: tuple[int, ...]
    dilations: tuple[tuple[int, ...], ...]
    activation: Activation
    bound: Bound
    bias: bool

    @property
    def factor(self) -> int:
        """Samples per mel frame, where kernels exceed rates by even numbers."""
        return math.prod(self.rates)


@dataclass(frozen=True)
class ExtensionConfig:
    """The second generator, and the log-mel it reads of the first one's sound.

    `n_fft` and `hop` are in samples at the low rate, `input_rate` in Hz; `ratio` is how
    many samples come out for each that goes in.
    """

    generator: GeneratorConfig
    n_fft: int
    hop: int
    input_rate: int
    ratio: int


@dataclass(frozen=True)
class VocoderConfig:
    """Stereo log-mel -> stereo waveform at `sample_rate` Hz, of either generation."""

    generator: GeneratorConfig
    extension: ExtensionConfig | None
    sample_rate: int

    @property
    def mel_bins(self) -> int:
        """Bands of the log-mel that goes in."""
        return self.generator.mel_bins

    @property
    def factor(self) -> int:
        """Samples of the output per mel frame."""
        ratio = self.extension.ratio if self.extension else 1
        return self.generator.factor * ratio


def _one_of(where: str, key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(
            f"{where} config: {key} = {value!r} is not supported, expected one of "
            f"{[*known]}"
        )


def _activation(where: str, given: Json) -> Activation:
    block = given.get("resblock", "1")
    _one_of(where, "resblock", block, ("1", "AMP1"))
    if block == "1":
        return "leaky"
    activation = given.get("activation", "snake")
    _one_of(where, "activation", activation, ("snake", "snakebeta"))
    return activation


def _check_lengths(where: str, cfg: GeneratorConfig) -> None:
    per_stage = ("upsample_kernel_sizes", cfg.up_kernels, cfg.rates)
    per_block = ("resblock_dilation_sizes", cfg.dilations, cfg.kernels)
    for name, values, others in (per_stage, per_block):
        if len(values) != len(others):
            raise ValueError(
                f"{where} config: {name} has {len(values)} entries, "
                f"expected {len(others)}"
            )


def _generator(
    where: str, given: Json, *, mel_bins: int = MEL_BINS, bounded: bool = True
) -> GeneratorConfig:
    """One generator; `bounded` is what `apply_final_activation` is when not given."""
    require(where, given, {"stereo": True})
    dilations = given.get("resblock_dilation_sizes", ((1, 3, 5),) * 3)
    bound: Bound = "tanh" if given.get("use_tanh_at_final", True) else "clamp"
    cfg = GeneratorConfig(
        width=given.get("upsample_initial_channel", 1024),
        mel_bins=mel_bins,
        rates=tuple(given.get("upsample_rates", (6, 5, 2, 2, 2))),
        up_kernels=tuple(given.get("upsample_kernel_sizes", (16, 15, 8, 4, 4))),
        kernels=tuple(given.get("resblock_kernel_sizes", (3, 7, 11))),
        dilations=tuple(tuple(d) for d in dilations),
        activation=_activation(where, given),
        bound=bound if given.get("apply_final_activation", bounded) else "none",
        bias=given.get("use_bias_at_final", True),
    )
    _check_lengths(where, cfg)
    return cfg


_NUMBERS = (
    "input_sampling_rate",
    "output_sampling_rate",
    "hop_length",
    "n_fft",
    "num_mels",
)


def _extension(given: Json) -> ExtensionConfig:
    where = "vocoder.bwe"
    absent = [name for name in _NUMBERS if name not in given]
    if absent:
        raise ValueError(f"{where} config: got {sorted(given)}, expected also {absent}")
    rate_in, rate_out, hop, n_fft, bins = (given[name] for name in _NUMBERS)
    require(where, given, {"win_size": n_fft})
    cfg = _generator(where, given, mel_bins=bins, bounded=False)
    odd = any((k - r) % 2 for k, r in zip(cfg.up_kernels, cfg.rates, strict=True))
    # Otherwise its waveform and the resampled one would differ in length.
    if rate_out % rate_in or cfg.factor * rate_in != hop * rate_out or odd:
        raise ValueError(
            f"{where} config: got upsample_rates {list(cfg.rates)}, kernels "
            f"{list(cfg.up_kernels)}, hop {hop}, {rate_in} -> {rate_out} Hz; expected "
            "a whole ratio, rates whose product is hop x ratio, kernels that exceed "
            "their rates by even numbers"
        )
    return ExtensionConfig(cfg, n_fft, hop, rate_in, rate_out // rate_in)


def vocoder_config(config: Json) -> VocoderConfig:
    """Read the `vocoder` section of an embedded config, in either form.

    Raises:
        ValueError: if the section describes another kind of network, or its numbers do
            not fit each other.

    Source: `ltx_core/model/audio_vae/model_configurator.py: VocoderConfigurator`.
    """
    given = section_of(config, "vocoder")
    if "bwe" in given:
        first = _generator("vocoder.vocoder", section_of(given, "vocoder"))
        extension = _extension(given["bwe"])
        rate = extension.input_rate * extension.ratio
        return VocoderConfig(first, extension, rate)
    newer_key = given.get("output_sampling_rate", 24000)
    rate = given.get("output_sample_rate", newer_key)
    return VocoderConfig(_generator("vocoder", given), None, rate)

"""Original key names <-> those of diffusers' LTX-2 classes: one table per component.

diffusers keeps a network per folder and renames beginnings of keys and some parts of
them; no value is changed, no axis moved, no tensor split. A key's longest matching
beginning is replaced, then the parts behind it, in either direction:

    model.diffusion_model.patchify_proj.weight               proj_in.weight
    model.diffusion_model.transformer_blocks.3.attn1.q_norm.weight
                                            transformer_blocks.3.attn1.norm_q.weight

The video VAE numbers its blocks in groups (residual blocks and the resampling that
belongs to them), so that its table is made from its configuration. Three statistics of
the 2.0 file, which nothing uses, have no place in diffusers: `DROPPED`.

Source: diffusers, scripts/convert_ltx2_to_diffusers.py (names, as facts).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from idlora_jax.config_video_vae import Residual, VideoVAEConfig

_DIT = "model.diffusion_model."
Pairs = tuple[tuple[str, str], ...]

DROPPED = tuple(
    f"vae.per_channel_statistics.{name}"
    for name in ("channel", "mean-of-stds", "mean-of-stds_over_std-of-means")
)
"""Original keys that diffusers does not hold."""


class Names(NamedTuple):
    """The spellings of one component: (original, diffusers) beginnings and parts.

    A part is one or several of the words between the dots of a key.
    """

    beginnings: Pairs
    parts: Pairs = ()


_NORMS = (("q_norm", "norm_q"), ("k_norm", "norm_k"))


def _adaln(prefix: str) -> Pairs:
    """The AdaLN networks of one modality (`prefix` "" or "audio_")."""
    names = (("adaln_single", "time_embed"), ("prompt_adaln_single", "prompt_adaln"))
    return tuple((f"{_DIT}{prefix}{a}.", f"{prefix}{b}.") for a, b in names)


TRANSFORMER = Names(
    (
        (f"{_DIT}patchify_proj.", "proj_in."),
        (f"{_DIT}audio_patchify_proj.", "audio_proj_in."),
        *_adaln(""),
        *_adaln("audio_"),
        *(
            (f"{_DIT}av_ca_{a}_adaln_single.", f"av_cross_attn_{b}.")
            for a, b in (
                ("video_scale_shift", "video_scale_shift"),
                ("audio_scale_shift", "audio_scale_shift"),
                ("a2v_gate", "video_a2v_gate"),
                ("v2a_gate", "audio_v2a_gate"),
            )
        ),
        (_DIT, ""),
    ),
    (
        *_NORMS,
        *(
            (f"scale_shift_table_a2v_ca_{n}", f"{n}_a2v_cross_attn_scale_shift_table")
            for n in ("video", "audio")
        ),
    ),
)

_PROJECTION = "text_embedding_projection."

CONNECTORS = Names(
    (
        (f"{_DIT}video_embeddings_connector.", "video_connector."),
        (f"{_DIT}audio_embeddings_connector.", "audio_connector."),
        (f"{_PROJECTION}aggregate_embed.", "text_proj_in."),
        (f"{_PROJECTION}video_aggregate_embed.", "video_text_proj_in."),
        (f"{_PROJECTION}audio_aggregate_embed.", "audio_text_proj_in."),
    ),
    (("transformer_1d_blocks", "transformer_blocks"), *_NORMS),
)


def _statistics(prefix: str) -> Pairs:
    full = f"{prefix}per_channel_statistics."
    names = (("mean-of-means", "latents_mean"), ("std-of-means", "latents_std"))
    return tuple((full + a, b) for a, b in names)


AUDIO_VAE = Names((*_statistics("audio_vae."), ("audio_vae.", "")))

_VOCODER_PARTS = (
    ("ups", "upsamplers"),
    ("resblocks", "resnets"),
    ("conv_pre", "conv_in"),
    ("conv_post", "conv_out"),
    ("act_post", "act_out"),
    ("downsample.lowpass", "downsample"),
)
VOCODER = Names((("vocoder.", ""),), _VOCODER_PARTS)
VOCODER_WITH_EXTENSION = Names(
    tuple((f"vocoder.{n}", n) for n in ("vocoder.", "bwe_generator.", "mel_stft.")),
    _VOCODER_PARTS,
)

LATENT_UPSAMPLER = Names((("", ""),))


def _encoder_blocks(residual: Iterable[bool]) -> list[str]:
    """diffusers' names of the encoder's blocks: a resampling ends its group."""
    names, group = [], 0
    for is_residual in residual:
        name = f"down_blocks.{group}."
        names.append(name if is_residual else f"{name}downsamplers.0.")
        group += not is_residual
    last = f"down_blocks.{group}."
    return ["mid_block." if name == last else name for name in names]


def _decoder_blocks(residual: Iterable[bool]) -> list[str]:
    """diffusers' names of the decoder's blocks: a resampling begins its group."""
    names, group = [], -1
    for is_residual in residual:
        group += not is_residual
        name = f"up_blocks.{group}." if group >= 0 else "mid_block."
        names.append(name if is_residual else f"{name}upsamplers.0.")
    return names


def video_vae(cfg: VideoVAEConfig) -> Names:
    """The table of a video VAE with the blocks of `cfg`.

    Raises:
        ValueError: if two residual stages follow one another, which diffusers cannot
            name.
    """
    pairs: list[tuple[str, str]] = []
    sides = (
        ("encoder.down_blocks.", cfg.encoder, _encoder_blocks),
        ("decoder.up_blocks.", cfg.decoder, _decoder_blocks),
    )
    for torch, blocks, name in sides:
        half = torch.partition(".")[0]
        theirs = name([isinstance(block, Residual) for block in blocks])
        if len(set(theirs)) < len(theirs):
            raise ValueError(
                f"vae config: {half} has two residual stages in a row, which diffusers "
                "has no names for"
            )
        pairs += [(f"vae.{torch}{n}.", f"{half}.{t}") for n, t in enumerate(theirs)]
    ends = tuple(
        (f"vae.{half}.{a}", f"{half}.{b}")
        for half in ("encoder", "decoder")
        for a, b in (
            ("conv_in.", "conv_in."),
            ("conv_out.", "conv_out."),
            ("last_time_embedder.", "time_embedder."),
            ("last_scale_shift_table", "scale_shift_table"),
            ("timestep_scale_multiplier", "timestep_scale_multiplier"),
        )
    )
    return Names((*_statistics("vae."), *ends, *pairs), (("res_blocks", "resnets"),))


def _renamed(key: str, beginnings: Iterable[tuple[str, str]], parts: Pairs) -> str:
    """The key in the other spelling; KeyError if no beginning fits."""
    hits = [(len(old), old, new) for old, new in beginnings if key.startswith(old)]
    if not hits:
        raise KeyError(key)
    _, old, new = max(hits)
    rest = f".{key[len(old) :]}."
    for a, b in parts:
        rest = rest.replace(f".{a}.", f".{b}.")
    return new + rest[1:-1]


def _swapped(pairs: Pairs) -> Pairs:
    return tuple((b, a) for a, b in pairs)


def to_diffusers(names: Names, key: str) -> str | None:
    """An original key in diffusers' spelling; None if it is not of this component."""
    return _there_and_back(names, key)


def to_original(names: Names, key: str) -> str | None:
    """A key of diffusers in the original spelling; None if it has none."""
    swapped = Names(_swapped(names.beginnings), _swapped(names.parts))
    return _there_and_back(swapped, key)


def _there_and_back(names: Names, key: str) -> str | None:
    """The renamed key if renaming it again gives it back, so that no two collide."""
    try:
        there = _renamed(key, names.beginnings, names.parts)
        back = _renamed(there, _swapped(names.beginnings), _swapped(names.parts))
    except KeyError:
        return None
    return there if back == key else None

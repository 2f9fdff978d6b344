"""Embedded-config sections of the latent networks: tiny and published ones."""

from __future__ import annotations

from typing import Any

Section = dict[str, Any]


def _blocks(*pairs: tuple[str, int], residual: bool = False) -> list[list[Any]]:
    """`res_x` takes its number of layers, the others their multiplier."""
    more = {"residual": True} if residual else {}
    return [
        [n, {"num_layers": v} if n == "res_x" else {"multiplier": v, **more}]
        for n, v in pairs
    ]


TINY_VIDEO: Section = {
    "latent_channels": 4,
    "timestep_conditioning": False,
    "encoder_blocks": _blocks(
        ("res_x", 1),
        ("compress_space_res", 2),
        ("compress_time_res", 2),
        ("compress_all_res", 2),
        ("compress_all_res", 1),
    ),
    "decoder_blocks": _blocks(
        ("res_x", 1),
        ("compress_all", 2),
        ("compress_all", 2),
        ("compress_all", 2),
        residual=True,
    ),
}

TINY_VIDEO_23: Section = TINY_VIDEO | {
    "decoder_base_channels": 4,
    "spatial_padding_mode": "zeros",
    "decoder_blocks": _blocks(
        ("compress_space", 2),
        ("res_x", 1),
        ("compress_time", 2),
        ("compress_all", 1),
        ("compress_all", 2),
    ),
}


def audio_section(**changes: Any) -> Section:
    base = {"ch": 8, "z_channels": 2, "mel_bins": 16, "num_res_blocks": 1}
    more = {"attn_resolutions": [], "mid_block_add_attention": False}
    return {"model": {"params": {"ddconfig": base | more | changes}}}


TINY_AUDIO: Section = audio_section()

TINY_VOCODER: Section = {
    "upsample_initial_channel": 8,
    "upsample_rates": [3, 2],
    "upsample_kernel_sizes": [7, 4],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
}

_PUBLISHED_AUDIO = audio_section(ch=128, z_channels=8, mel_bins=64, num_res_blocks=2)

LTX_2: Section = {
    "vae": {
        "timestep_conditioning": False,
        "decoder_base_channels": 128,
        "encoder_blocks": _blocks(
            ("res_x", 4),
            ("compress_space_res", 2),
            ("res_x", 6),
            ("compress_time_res", 2),
            ("res_x", 6),
            ("compress_all_res", 2),
            ("res_x", 2),
            ("compress_all_res", 2),
            ("res_x", 2),
        ),
        "decoder_blocks": _blocks(
            *[("res_x", 5), ("compress_all", 2)] * 3, ("res_x", 5), residual=True
        ),
    },
    "audio_vae": _PUBLISHED_AUDIO,
    "vocoder": {"upsample_initial_channel": 1024, "resblock": "1", "stereo": True},
}

LTX_2_3: Section = {
    "vae": {
        "timestep_conditioning": False,
        "decoder_base_channels": 128,
        "spatial_padding_mode": "zeros",
        "encoder_blocks": _blocks(
            ("res_x", 4),
            ("compress_space_res", 2),
            ("res_x", 6),
            ("compress_time_res", 2),
            ("res_x", 4),
            ("compress_all_res", 2),
            ("res_x", 2),
            ("compress_all_res", 1),
            ("res_x", 2),
        ),
        "decoder_blocks": _blocks(
            ("res_x", 4),
            ("compress_space", 2),
            ("res_x", 6),
            ("compress_time", 2),
            ("res_x", 4),
            ("compress_all", 1),
            ("res_x", 2),
            ("compress_all", 2),
            ("res_x", 2),
        ),
    },
    "audio_vae": _PUBLISHED_AUDIO,
}

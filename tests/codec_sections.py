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


NOISY_VIDEO: Section = {
    "latent_channels": 2,
    "timestep_conditioning": True,
    "encoder_blocks": [
        ["res_x_y", {"multiplier": 2}],
        ["compress_time", {}],
        ["compress_space", {}],
        ["compress_all", {}],
        ["compress_all_x_y", {"multiplier": 1}],
    ],
    "decoder_blocks": [
        ["res_x", {"num_layers": 1, "inject_noise": True}],
        ["compress_all", {"multiplier": 2}],
        ["compress_space", {}],
        ["compress_time", {}],
        ["res_x_y", {"multiplier": 2}],
        ["res_x_y", {"multiplier": 1, "inject_noise": True}],
        ["compress_all", {}],
    ],
}
"""Every kind of block that the published files do not have."""

GROUP_VIDEO: Section = NOISY_VIDEO | {
    "latent_channels": 32,
    "norm_layer": "group_norm",
    "latent_log_var": "per_channel",
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

_SNAKES: Section = {
    "resblock": "AMP1",
    "activation": "snakebeta",
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
    "stereo": True,
}
_EXTENSION: Section = {
    "apply_final_activation": False,
    "input_sampling_rate": 16000,
    "output_sampling_rate": 48000,
    "hop_length": 4,
    "n_fft": 16,
    "num_mels": 6,
}

TINY_VOCODER_23: Section = {
    "vocoder": {
        **_SNAKES,
        "upsample_initial_channel": 8,
        "upsample_rates": [3, 2],
        "upsample_kernel_sizes": [7, 4],
    },
    "bwe": {
        **_SNAKES,
        **_EXTENSION,
        "upsample_initial_channel": 4,
        "upsample_rates": [12],
        "upsample_kernel_sizes": [14],
    },
}
"""6 samples a frame; 4 a frame of the spectrogram between, so that some are padded."""

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
    "vocoder": {
        "vocoder": {
            **_SNAKES,
            "upsample_initial_channel": 1536,
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
            "resblock_kernel_sizes": [3, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        },
        "bwe": {
            **_SNAKES,
            **_EXTENSION,
            "upsample_initial_channel": 512,
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "resblock_kernel_sizes": [3, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5]] * 3,
            "hop_length": 80,
            "n_fft": 512,
            "num_mels": 64,
        },
    },
}

UPSAMPLER = {
    "in_channels": 128,
    "mid_channels": 32,
    "num_blocks_per_stage": 1,
    "dims": 3,
    "spatial_upsample": True,
    "temporal_upsample": False,
    "spatial_scale": 2.0,
    "rational_resampler": False,
}
"""A small latent upsampler, to twice the sides."""

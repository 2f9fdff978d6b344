import pytest
from codec_sections import GROUP_VIDEO, NOISY_VIDEO, TINY_VIDEO, TINY_VIDEO_23

from idlora_jax.config_video_vae import (
    Resample,
    Residual,
    Strided,
    Transition,
    video_vae_config,
)

CONFIGS = {
    "2.0": video_vae_config({"vae": TINY_VIDEO}),
    "2.3": video_vae_config({"vae": TINY_VIDEO_23}),
}
CFG = CONFIGS["2.0"]
NOISY = video_vae_config({"vae": NOISY_VIDEO})


def test_widths_follow_the_multipliers_in_2_0_and_the_base_in_2_3():
    first = [CONFIGS[g].decoder[0] for g in ("2.0", "2.3")]
    assert first == [
        Resample((2, 2, 2), 32, 16, shortcut=True),
        Resample((2, 2, 2), 32, 16, shortcut=False),
    ]
    assert CONFIGS["2.3"].decoder[2] == Resample((2, 1, 1), 16, 8, shortcut=False)
    assert CONFIGS["2.0"].decoder[-1] == Residual(4, 1)
    assert CONFIGS["2.0"].encoder[-1] == Resample((2, 2, 2), 32, 32, shortcut=True)
    assert (CFG.time_factor, CFG.space_factor) == (8, 32)


def test_width_changing_blocks_count_in_the_first_width_of_2_0():
    assert NOISY.decoder_width == 2 * 2 * 2
    assert NOISY.decoder[2:4] == (
        Transition(8, 4),
        Resample((2, 1, 1), 4, 4, shortcut=False),
    )
    newer = video_vae_config({"vae": NOISY_VIDEO | {"decoder_base_channels": 3}}, "2.3")
    assert newer.decoder_width == 24


def test_the_encoder_has_strided_blocks_where_the_file_does_not_say_res():
    assert NOISY.encoder == (
        Transition(2, 4),
        Strided((2, 1, 1), 4, 4),
        Strided((1, 2, 2), 4, 4),
        Strided((2, 2, 2), 4, 4),
        Strided((2, 2, 2), 4, 4),
    )


def test_a_number_instead_of_settings_is_the_number_of_layers():
    blocks = {"encoder_blocks": [["res_x", 3], ["res_x_y", 1]]}
    cfg = video_vae_config({"vae": TINY_VIDEO | blocks})
    assert cfg.encoder == (Residual(4, 3), Transition(4, 8))


def test_factors_are_those_of_either_half():
    assert (NOISY.time_factor, NOISY.space_factor) == (8, 32)
    assert NOISY.decoder_factors == (8, 32)
    cfg = video_vae_config({"vae": TINY_VIDEO | {"encoder_blocks": []}})
    assert (cfg.time_factor, cfg.space_factor) == (1, 4)
    assert cfg.decoder_factors == (8, 32)


def test_noise_has_a_map_per_convolution_at_the_resolution_there():
    assert NOISY.noise_factors == (2, 2, 8, 8)
    assert CFG.noise_factors == ()


def test_a_file_that_does_not_say_is_conditioned_on_a_timestep():
    section = {k: v for k, v in TINY_VIDEO.items() if k != "timestep_conditioning"}
    assert video_vae_config({"vae": section}).timestep_conditioning


def test_other_norms_and_log_variances_are_read():
    cfg = video_vae_config({"vae": GROUP_VIDEO})
    assert (cfg.norm, cfg.log_var_channels) == ("group_norm", 32)
    cfg = video_vae_config({"vae": TINY_VIDEO | {"latent_log_var": "constant"}})
    assert (cfg.norm, cfg.log_var_channels) == ("pixel_norm", 1)


def test_padding_defaults_are_zeros_for_the_encoder_and_reflect_for_the_decoder():
    assert (CFG.encoder_padding, CFG.decoder_padding) == ("zeros", "reflect")
    newer = CONFIGS["2.3"]
    assert (newer.encoder_padding, newer.decoder_padding) == ("zeros", "zeros")


def test_a_generation_reads_its_own_padding_keys():
    keys = {
        "spatial_padding_mode": "circular",
        "decoder_spatial_padding_mode": "replicate",
    }
    section = {"vae": TINY_VIDEO | keys}
    assert video_vae_config(section, "2.0").decoder_padding == "replicate"
    assert video_vae_config(section, "2.3").decoder_padding == "circular"
    assert video_vae_config(section).encoder_padding == "circular"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_layer": "layer_norm"}, "norm_layer 'layer_norm' is not supported"),
        ({"dims": 2}, "dims = 2 is not supported"),
        ({"latent_log_var": "none"}, "latent_log_var 'none' is not supported"),
        ({"spatial_padding_mode": "mirror"}, "spatial padding 'mirror' is not"),
        ({"encoder_blocks": [["res_z", {}]]}, "encoder block 'res_z' is not"),
        ({"decoder_blocks": [["attn_res_x", {}]]}, "decoder block 'attn_res_x' is"),
    ],
)
def test_a_config_of_another_network_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        video_vae_config({"vae": TINY_VIDEO | change})


def test_a_checkpoint_without_the_section_is_refused():
    with pytest.raises(ValueError, match=r"no 'vae' section, got \['transformer'\]"):
        video_vae_config({"transformer": {}})

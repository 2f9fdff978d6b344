"""Embedded configs of latent upsamplers: published, every form, and refused ones."""

import itertools
import json
import pathlib

import pytest

from idlora_jax.config_upsampler import (
    SCALES,
    UpsamplerConfig,
    embedded_config,
    upsampler_config,
)

CONFIGS = pathlib.Path(__file__).parent / "manifests" / "configs"


@pytest.mark.parametrize(
    ("name", "rational"),
    [
        ("ltx-2-spatial-upscaler-x2-1.0", True),
        ("ltx-2.3-spatial-upscaler-x2-1.1", False),
    ],
)
def test_the_published_upscalers_double_height_and_width(name, rational):
    path = CONFIGS / f"{name}.json"
    cfg = upsampler_config(json.loads(path.read_text("utf-8")))
    assert cfg == UpsamplerConfig(128, 1024, 4, 3, (2, 1), 1, rational)


def test_absent_keys_have_the_defaults_of_the_code_not_of_the_published_files():
    assert upsampler_config({}) == UpsamplerConfig(128, 512, 4, 3, (2, 1), 1, False)


def test_the_keys_of_diffusers_say_the_same():
    theirs = {
        "_class_name": "LTX2LatentUpsamplerModel",
        "_diffusers_version": "0.1",
        "in_channels": 16,
        "mid_channels": 64,
        "use_rational_resampler": True,
        "rational_spatial_scale": 1.5,
    }
    ours = {"in_channels": 16, "mid_channels": 64, "spatial_scale": 1.5}
    ours["rational_resampler"] = True
    assert upsampler_config(theirs) == upsampler_config(ours)
    default = upsampler_config({"_class_name": "LTX2LatentUpsamplerModel"})
    assert (default.width, default.rational) == (1024, True)


FORMS = [
    {"rational_resampler": True, "spatial_scale": scale, "dims": dims}
    for scale, dims in itertools.product(SCALES, (2, 3))
] + [
    {"dims": 2},
    {"temporal_upsample": True},
    {"temporal_upsample": True, "spatial_upsample": False},
]


@pytest.mark.parametrize("form", FORMS)
def test_a_config_written_back_reads_the_same(form):
    cfg = upsampler_config(form)
    written = embedded_config(cfg)
    assert upsampler_config(json.loads(json.dumps(written))) == cfg


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ({}, (3, 10, 14)),
        ({"rational_resampler": True, "spatial_scale": 0.75}, (3, 4, 6)),
        ({"rational_resampler": True, "spatial_scale": 1.5}, (3, 8, 11)),
        ({"rational_resampler": True, "spatial_scale": 4}, (3, 20, 28)),
        ({"temporal_upsample": True}, (5, 10, 14)),
        ({"temporal_upsample": True, "spatial_upsample": False}, (5, 5, 7)),
    ],
)
def test_the_size_of_a_latent_changes_as_the_form_says(form, size):
    assert upsampler_config(form).size(3, 5, 7) == size


def test_the_plain_form_and_time_ignore_what_only_the_rational_form_reads():
    assert upsampler_config({"spatial_scale": 1.5}).space == (2, 1)
    both = {"temporal_upsample": True, "rational_resampler": True, "spatial_scale": 4.0}
    assert upsampler_config(both) == upsampler_config({"temporal_upsample": True})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL' is not supported"),
        ({"mid_channels": 48}, "mid_channels = 48 .* a multiple of 32"),
        ({"mid_channels": "512"}, "mid_channels = '512' .* a whole number"),
        ({"mid_channels": 10**12}, "a whole number from 32 to 65536"),
        ({"in_channels": True}, "in_channels = True .* a whole number"),
        ({"num_blocks_per_stage": -1}, "num_blocks_per_stage = -1"),
        ({"dims": 1}, "dims = 1 .* from 2 to 3"),
        ({"spatial_upsample": 1}, "spatial_upsample = 1 .* true or false"),
        ({"spatial_upsample": False}, "true, or temporal_upsample = true"),
        ({"dims": 2, "temporal_upsample": True}, "false, or dims = 3"),
        (
            {"rational_resampler": True, "spatial_scale": 3.0},
            r"spatial_scale = 3.0 .* \[0.75, 1.5, 2.0, 4.0\]",
        ),
        ({"rational_resampler": True, "spatial_scale": [2]}, "spatial_scale"),
    ],
)
def test_a_value_that_the_network_cannot_follow_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        upsampler_config(values)

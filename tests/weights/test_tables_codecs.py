"""The rules of the latent networks: every key once, every parameter once."""

import math

import codec_sections
import jax
import numpy as np
import pytest

from idlora_jax.config_codecs import audio_vae_config
from idlora_jax.config_video_vae import video_vae_config
from idlora_jax.config_vocoder import vocoder_config
from idlora_jax.model import audio_vae, video_vae, vocoder
from idlora_jax.weights import rules, tables

NETS = {
    "video_vae": ("vae.", video_vae_config, video_vae.init),
    "audio_vae": ("audio_vae.", audio_vae_config, audio_vae.init),
    "vocoder": ("vocoder.", vocoder_config, vocoder.init),
}
TINY = {
    "video_vae": {"vae": codec_sections.TINY_VIDEO},
    "video_vae 2.3": {"vae": codec_sections.TINY_VIDEO_23},
    "video_vae noisy": {"vae": codec_sections.NOISY_VIDEO},
    "video_vae groups": {"vae": codec_sections.GROUP_VIDEO},
    "audio_vae": {"audio_vae": codec_sections.TINY_AUDIO},
    "audio_vae attending": {
        "audio_vae": codec_sections.audio_section(
            attn_resolutions=[128], mid_block_add_attention=True
        )
    },
    "vocoder": {"vocoder": codec_sections.TINY_VOCODER},
    "vocoder 2.3": {"vocoder": codec_sections.TINY_VOCODER_23},
}
# File, network -> tensors and parameters of the published checkpoint.
PUBLISHED = [
    ("ltx-2-19b-dev", codec_sections.LTX_2, "video_vae", 187, 1_222_480_241),
    ("ltx-2-19b-dev", codec_sections.LTX_2, "audio_vae", 102, 53_248_402),
    ("ltx-2-19b-dev", codec_sections.LTX_2, "vocoder", 194, 55_592_802),
    ("ltx-2.3-22b-dev", codec_sections.LTX_2_3, "video_vae", 170, 726_106_225),
    ("ltx-2.3-22b-dev", codec_sections.LTX_2_3, "audio_vae", 102, 53_248_402),
    ("ltx-2.3-22b-dev", codec_sections.LTX_2_3, "vocoder", 1227, 129_085_032),
]


def shapes_of(name, config):
    """Path -> shape of every parameter, without allocating any."""
    _, read, init = NETS[name]
    cfg = read(config)
    tree = jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))
    return {path: s.shape for path, s in rules.flatten(tree, name).items()}


@pytest.mark.parametrize("case", TINY)
def test_export_then_import_gives_the_same_parameters(case):
    rng = np.random.default_rng(0)
    shapes = shapes_of(case.split()[0], TINY[case])
    flat = {p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}
    tensors = rules.export(rules.nest(flat), tables.BASE)
    assert len(tensors) == len(flat)
    assert all(key.startswith(NETS[case.split()[0]][0]) for key in tensors)
    back = rules.flatten(rules.import_(tensors, tables.BASE))
    assert back.keys() == flat.keys()
    for path in flat:
        assert back[path].shape == flat[path].shape
        np.testing.assert_array_equal(back[path], flat[path])


@pytest.mark.parametrize(
    ("key", "path"),
    [
        (
            "vae.encoder.down_blocks.2.res_blocks.5.conv1.conv.weight",
            "video_vae/encoder/blocks_2/res_5/conv1/kernel",
        ),
        (
            "vae.decoder.up_blocks.1.conv.conv.bias",
            "video_vae/decoder/blocks_1/conv/bias",
        ),
        (
            "vae.decoder.up_blocks.6.conv_shortcut.weight",
            "video_vae/decoder/blocks_6/shortcut/kernel",
        ),
        (
            "vae.decoder.up_blocks.0.res_blocks.1.per_channel_scale2",
            "video_vae/decoder/blocks_0/res_1/noise_scale2",
        ),
        (
            "vae.decoder.up_blocks.0.time_embedder.timestep_embedder.linear_1.weight",
            "video_vae/decoder/blocks_0/time/up/kernel",
        ),
        ("vae.decoder.last_scale_shift_table", "video_vae/decoder/table"),
        ("vae.decoder.timestep_scale_multiplier", "video_vae/decoder/timestep_scale"),
        (
            "vae.encoder.down_blocks.3.conv.bias",
            "video_vae/encoder/blocks_3/strided/bias",
        ),
        (
            "vae.encoder.down_blocks.0.res_blocks.1.norm2.weight",
            "video_vae/encoder/blocks_0/res_1/norm2/scale",
        ),
        ("vae.encoder.conv_norm_out.bias", "video_vae/encoder/norm_out/bias"),
        ("vae.per_channel_statistics.std-of-means", "video_vae/stats/std"),
        (
            "vae.per_channel_statistics.mean-of-stds_over_std-of-means",
            "video_vae/stats/mean_of_stds_over_std_of_means",
        ),
        (
            "audio_vae.decoder.up.1.block.0.nin_shortcut.conv.weight",
            "audio_vae/decoder/up_1/res_0/shortcut/kernel",
        ),
        (
            "audio_vae.encoder.mid.attn_1.proj_out.bias",
            "audio_vae/encoder/mid/attn_1/out/bias",
        ),
        ("vocoder.ups.3.weight", "vocoder/up_3/kernel"),
        (
            "vocoder.resblocks.14.convs2.1.weight",
            "vocoder/res_14/plain_1/kernel",
        ),
        ("vocoder.vocoder.conv_pre.bias", "vocoder/base/conv_in/bias"),
        (
            "vocoder.bwe_generator.resblocks.3.acts1.2.act.beta",
            "vocoder/bwe/res_3/dilated_2_act/beta",
        ),
        (
            "vocoder.vocoder.act_post.downsample.lowpass.filter",
            "vocoder/base/act_out/down_filter",
        ),
        ("vocoder.mel_stft.stft_fn.forward_basis", "vocoder/stft/forward"),
    ],
)
def test_a_key_goes_to_its_path(key, path):
    assert list(rules.plan([key], tables.BASE)) == [path]


@pytest.mark.parametrize(("file", "config", "name", "tensors", "total"), PUBLISHED)
def test_the_published_sizes_have_the_published_parameter_counts(
    file, config, name, tensors, total
):
    shapes = shapes_of(name, config)
    assert len(shapes) == tensors
    assert sum(math.prod(s) for s in shapes.values()) == total

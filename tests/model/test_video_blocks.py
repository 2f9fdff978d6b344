import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.config_video_vae import Resample, Residual, Strided
from idlora_jax.model import conv, video_blocks
from idlora_jax.model.video_blocks import Style

PAST = Style(causal=True, spatial="zeros")
BOTH = Style(causal=False, spatial="zeros")


def test_depth_to_space_undoes_space_to_depth():
    x = jax.random.normal(jax.random.key(0), (1, 4, 6, 2, 3))
    there = video_blocks.space_to_depth(x, (2, 3, 1))
    assert there.shape == (1, 2, 2, 2, 18)
    np.testing.assert_array_equal(video_blocks.depth_to_space(there, (2, 3, 1)), x)


def test_space_to_depth_puts_the_block_fastest_then_its_columns():
    x = jnp.arange(8.0).reshape(1, 1, 2, 2, 2)  # rows x columns x channels
    there = video_blocks.space_to_depth(x, (1, 2, 2))
    np.testing.assert_array_equal(there.ravel(), [0, 2, 4, 6, 1, 3, 5, 7])


def _silent(module, x):
    """The module with its convolution at zero: what the shortcut alone gives."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    return module.apply(zeros, x)


def test_the_shortcut_of_a_downsampling_is_the_mean_of_channel_groups():
    down = video_blocks.Down(Resample((1, 2, 2), 2, 4, shortcut=True), PAST)
    x = jnp.arange(8.0).reshape(1, 1, 2, 2, 2)
    np.testing.assert_allclose(_silent(down, x).ravel(), [1, 5, 2, 6])


def test_a_temporal_downsampling_counts_the_first_frame_twice():
    down = video_blocks.Down(Resample((2, 1, 1), 1, 2, shortcut=True), PAST)
    x = jnp.arange(1.0, 4.0).reshape(1, 3, 1, 1, 1)
    np.testing.assert_allclose(_silent(down, x).ravel(), [1, 1, 2, 3])


def test_the_shortcut_of_an_upsampling_repeats_the_rearranged_input():
    x = jnp.arange(8.0).reshape(1, 1, 1, 1, 8)
    for shortcut, first in ((True, [4, 4, 4, 4]), (False, [0, 0, 0, 0])):
        up = video_blocks.Up(Resample((2, 2, 2), 8, 4, shortcut=shortcut), BOTH)
        y = _silent(up, x)
        assert y.shape == (1, 1, 2, 2, 4)  # the first of two frames is dropped
        np.testing.assert_allclose(y[0, 0, 0, 0], first)


@pytest.mark.parametrize("norm", ["pixel_norm", "group_norm"])
def test_a_residual_block_with_silent_convolutions_is_the_identity(norm):
    block = video_blocks.ResBlock(32, Style(True, "zeros", norm))
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 2, 32))
    np.testing.assert_array_equal(_silent(block, x), x)


def test_a_strided_convolution_keeps_every_second_cell_of_a_plain_one():
    block = Strided((2, 1, 2), 2, 3)
    strided = video_blocks.StridedConv(block, PAST)
    x = jax.random.normal(jax.random.key(0), (1, 5, 3, 4, 2))
    params = conv.init(strided, jax.random.key(1), x.shape)
    got = conv.run(strided, params, x)
    whole = conv.Conv(3, (3, 3, 3), PAST.pads)
    np.testing.assert_allclose(
        got, conv.run(whole, params["strided"], x)[:, ::2, :, ::2], atol=1e-6
    )
    assert got.shape == (1, 3, 3, 2, 3)


def test_modulation_adds_the_embedding_to_the_rows_of_the_table():
    table = jnp.arange(4.0).reshape(2, 2)
    embedded = jnp.array([[10.0, 20, 30, 40]])
    shift, scale = video_blocks.modulation(table, embedded)
    np.testing.assert_array_equal(shift, [[[[[10, 21]]]]])
    np.testing.assert_array_equal(scale, [[[[[32, 43]]]]])


def test_noise_is_the_same_for_every_frame_and_clip():
    block = video_blocks.ResBlock(2, PAST)
    x = jnp.zeros((2, 3, 4, 5, 2))
    noise = jax.random.normal(jax.random.key(0), (4, 5))
    shapes = (None, (noise, noise))
    params = conv.init(block, jax.random.key(1), x.shape, *shapes)
    silent = jax.tree.map(jnp.zeros_like, params)
    silent["noise_scale2"] = jnp.array([[[2.0, 3.0]]])
    y = conv.run(block, silent, x, None, (0 * noise, noise))
    np.testing.assert_allclose(y[1, 2, :, :, 0], 2 * noise, rtol=1e-6)
    np.testing.assert_allclose(y[0, 0, :, :, 1], 3 * noise, rtol=1e-6)


def test_a_stage_hands_each_block_its_two_maps():
    stage = video_blocks.Stage(Residual(1, 2, inject_noise=True), PAST)
    x = jnp.zeros((1, 1, 2, 2, 1))
    maps = tuple(jnp.full((2, 2), 10.0**n) for n in range(4))
    params = conv.init(stage, jax.random.key(0), x.shape, None, maps)
    silent = jax.tree.map(jnp.zeros_like, params)
    for n in range(2):
        silent[f"res_{n}"]["noise_scale2"] = jnp.ones((1, 1, 1))
    y = conv.run(stage, silent, x, None, maps)
    np.testing.assert_allclose(y, jnp.full_like(x, 1010))


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        (video_blocks.Down, Resample((2, 2, 2), 2, 4, shortcut=True)),
        (video_blocks.Down, Resample((1, 2, 2), 3, 8, shortcut=True)),
        (video_blocks.Up, Resample((2, 2, 2), 4, 2, shortcut=True)),
        (video_blocks.Up, Resample((1, 2, 2), 4, 0, shortcut=False)),
    ],
)
def test_channels_that_do_not_fit_a_change_of_resolution_are_refused(kind, block):
    x = (1, 3, 2, 2, block.width_in)
    with pytest.raises(ValueError, match="check its multiplier"):
        conv.init(kind(block, PAST), jax.random.key(0), x)


def test_noise_in_a_block_that_changes_the_width_is_refused():
    noise = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="2 channels of 4 cannot inject noise"):
        conv.init(
            video_blocks.ResBlock(2, PAST),
            jax.random.key(0),
            (1, 1, 2, 2, 4),
            None,
            (noise, noise),
        )


def _random(style, x):
    block = video_blocks.ResBlock(2, style)
    return conv.run(block, conv.init(block, jax.random.key(1), x.shape), x)


@pytest.mark.parametrize("spatial", ["zeros", "reflect", "replicate", "circular"])
def test_all_paddings_but_zeros_keep_a_constant_picture_constant(spatial):
    x = jnp.broadcast_to(jnp.array([0.5, -1.0]), (1, 2, 4, 5, 2))
    y = _random(Style(True, spatial), x)
    flat = np.ptp(np.asarray(y), axis=(2, 3)).max() < 1e-5
    assert flat == (spatial != "zeros")


def test_circular_padding_joins_opposite_edges():
    x = jax.random.normal(jax.random.key(0), (1, 2, 4, 5, 2))
    turned = _random(Style(True, "circular"), jnp.roll(x, (1, 2), (2, 3)))
    whole = jnp.roll(_random(Style(True, "circular"), x), (1, 2), (2, 3))
    np.testing.assert_allclose(turned, whole, atol=1e-5)
    mirrored = _random(Style(True, "reflect"), jnp.roll(x, (1, 2), (2, 3)))
    assert float(jnp.abs(mirrored - whole).max()) > 1e-3

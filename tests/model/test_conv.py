import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.model import conv
from idlora_jax.model.conv import Pad

RAMP = jnp.arange(1.0, 5.0)[None, :, None]
ONES = jnp.ones((3, 1, 1))
ZERO = jnp.zeros(1)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("zeros", [3, 6, 9, 7]), ("edge", [4, 6, 9, 11]), ("reflect", [5, 6, 9, 10])],
)
def test_each_border_is_what_its_mode_says(mode, expected):
    y = conv.conv(RAMP, ONES, ZERO, (Pad(1, 1, mode),))
    np.testing.assert_allclose(y[0, :, 0], expected)


def test_a_pad_in_front_alone_makes_the_convolution_causal():
    y = conv.conv(RAMP, ONES, ZERO, (Pad(2, 0),))
    np.testing.assert_allclose(y[0, :, 0], [1, 3, 6, 9])


def test_dilation_spreads_and_stride_thins():
    y = conv.conv(RAMP, ONES, ZERO, (Pad(2, 2),), dilation=2)
    np.testing.assert_allclose(y[0, :, 0], [4, 6, 4, 6])
    y = conv.conv(RAMP, ONES, ZERO, (Pad(1, 1),), stride=2)
    np.testing.assert_allclose(y[0, :, 0], [3, 9])


def test_the_kernel_is_not_flipped_and_the_bias_is_added():
    kernel = jnp.array([100.0, 10.0, 1.0])[:, None, None]
    y = conv.conv(RAMP, kernel, jnp.array([0.5]), (Pad(1, 1),))
    np.testing.assert_allclose(y[0, :, 0], [12.5, 123.5, 234.5, 340.5])


def test_conv_transpose_adds_the_kernel_at_each_strided_place():
    kernel = jnp.array([1.0, 10.0, 100.0, 1000.0])[:, None, None]
    y = conv.conv_transpose(RAMP[:, :2], kernel, ZERO, 2)
    # 1 and 2 times the kernel, two apart, one sample cut off on either side.
    np.testing.assert_allclose(y[0, :, 0], [10, 102, 1020, 200])


@pytest.mark.parametrize(("size", "stride"), [(16, 6), (15, 5), (4, 2), (3, 1)])
def test_conv_transpose_multiplies_the_length_by_the_stride(size, stride):
    kernel = jnp.ones((size, 2, 3))
    y = conv.conv_transpose(jnp.ones((1, 5, 2)), kernel, jnp.zeros(3), stride)
    assert y.shape == (1, 5 * stride, 3)


def test_the_computation_runs_in_the_dtype_of_the_input():
    x = RAMP.astype(jnp.bfloat16)
    assert conv.conv(x, ONES, ZERO, (Pad(1, 1, "edge"),)).dtype == jnp.bfloat16
    assert conv.conv_transpose(x, ONES, ZERO, 1).dtype == jnp.bfloat16


def test_init_draws_kernels_of_unit_gain_and_no_biases():
    module = conv.Conv(64, (3, 3), (Pad(1, 1), Pad(1, 1)))
    params = conv.init(module, jax.random.key(0), (1, 4, 4, 16))
    assert params["kernel"].shape == (3, 3, 16, 64)
    assert float(params["kernel"].std()) == pytest.approx((9 * 16) ** -0.5, rel=0.03)
    assert not params["bias"].any()

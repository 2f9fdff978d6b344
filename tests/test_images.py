"""Resizing and cropping against what is known about the result."""

import inspect

import numpy as np
import pytest

from idlora_jax import images


def noise(*shape):
    return np.random.default_rng(0).random(shape, np.float32)


def ramp(height, width):
    """Pixel centres as values: x in red, y in green, a constant in blue."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    return np.stack([x / width, y / height, np.full_like(x, 0.25)], axis=-1)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_fitting_to_the_same_size_only_changes_the_range(fit):
    image = noise(7, 5, 3)
    got = images.fit_image(image, 7, 5, fit)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, image * 2 - 1, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (9, 13), (32, 32), (1, 1)])
def test_stretching_keeps_ramps_and_constants(height, width):
    got = images.fit_image(ramp(50, 84), height, width, "stretch")
    assert got.shape == (height, width, 3)
    inside = np.s_[2:-2, 2:-2, :2]
    np.testing.assert_allclose(
        got[inside], ramp(height, width)[inside] * 2 - 1, atol=1e-5
    )
    np.testing.assert_allclose(got[..., 2], -0.5, atol=1e-6)


@pytest.mark.parametrize(("source", "axis"), [((20, 60), 1), ((60, 20), 0)])
def test_cropping_keeps_the_middle_and_the_aspect(source, axis):
    got = images.fit_image(ramp(*source), 20, 20, "crop")
    channel = 0 if axis == 1 else 1
    along = got[10, :, channel] if axis == 1 else got[:, 10, channel]
    # the middle third of the long side, from 1/3 to 2/3, unscaled
    want = ((np.arange(20) + 0.5) / 60 + 1 / 3) * 2 - 1
    np.testing.assert_allclose(along, want, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "size", "want"),
    [
        ((50, 84), (64, 96), (64, 107)),
        ((84, 50), (64, 96), (161, 96)),
        ((480, 640), (512, 512), (512, 682)),
        ((100, 100), (32, 32), (32, 32)),
        ((3, 1000), (64, 64), (64, 21333)),
    ],
)
def test_the_covering_size_meets_one_side_and_covers_the_other(source, size, want):
    assert images.covering_size(source, *size) == want


def test_the_covering_size_is_never_too_small():
    for height in range(1, 40):
        for width in range(1, 40):
            got = images.covering_size((height * 3, width * 3), height, width)
            assert got[0] >= height and got[1] >= width


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_a_clip_is_cropped_as_its_frames_are(method):
    clip = (noise(4, 30, 50, 3) * 255).astype(np.uint8)
    got = images.resize_crop(clip, 16, 16, method=method)
    assert got.shape == (4, 16, 16, 3) and got.dtype == np.uint8
    one = images.resize_crop(clip[2], 16, 16, method=method)
    np.testing.assert_array_equal(got[2], one)


def test_cropping_without_scaling_takes_the_middle():
    image = (noise(20, 30, 3) * 255).astype(np.uint8)
    got = images.resize_crop(image, 20, 20)
    np.testing.assert_array_equal(got, image[:, 5:25])


def test_making_smaller_averages_and_keeps_constants():
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = np.repeat(board[..., None], 3, axis=-1).astype(np.uint8)
    got = images.resize_crop(image, 8, 8)
    assert np.abs(got.astype(int) - 127).max() < 12
    flat = np.full((30, 40, 3), 77, np.uint8)
    assert np.all(images.resize_crop(flat, 16, 16) == 77)


def test_wrong_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="got fit 'cover', expected 'crop' or"):
        inspect.unwrap(images.fit_image)(noise(4, 4, 3), 4, 4, "cover")
    with pytest.raises(ValueError, match="got method 'cubic', expected one of"):
        inspect.unwrap(images.resize_crop)(
            np.zeros((4, 4, 3), np.uint8), 4, 4, method="cubic"
        )
    with pytest.raises(ValueError, match=r"size 0 x 4, expected at least 1 x 1"):
        images.fit_image(noise(4, 4, 3), 0, 4)
    with pytest.raises(ValueError, match=r"picture of 0 x 4 pixels"):
        images.resize_crop(np.zeros((0, 4, 3), np.uint8), 4, 4)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((50, 84), (64, 96)),
        ((7, 5), (64, 32)),
        ((480, 640), (32, 32)),
        ((1, 1), (8, 8)),
    ],
)
def test_stretching_is_torch_bilinear(source, size):
    import torch

    image = noise(*source, 3)
    planes = torch.tensor(image).permute(2, 0, 1)[None]
    want = torch.nn.functional.interpolate(planes, size=size, mode="bilinear")
    want = want[0].permute(1, 2, 0).numpy() * 2 - 1
    got = images.fit_image(image, *size, "stretch")
    np.testing.assert_allclose(got, want, atol=5e-6)

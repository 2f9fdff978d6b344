"""Pictures as arrays: resize and crop.

Two resizers, because training and sampling prepare pictures differently:

- `resize_crop` cuts clips for a data set: cover the wanted size keeping the aspect
  ratio (bicubic with antialiasing, by PIL), then crop the centre; uint8 in and out.
- `fit_image` prepares the first frame a sample starts from: plain bilinear without
  antialiasing, half-pixel centres, values in [-1, 1], bit-close to the reference.
  Along one axis of n input and m output samples, output i reads position
  s = max(0, (i + 1/2) n/m - 1/2) by linear interpolation between floor(s) and the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

Fit = Literal["crop", "stretch"]


def _check_sizes(name: str, source: Sequence[int], height: int, width: int) -> None:
    if min(*source, height, width) < 1:
        raise ValueError(
            f"{name}: got a picture of {source[0]} x {source[1]} pixels and the size "
            f"{height} x {width}, expected at least 1 x 1 each; check both"
        )


def covering_size(source: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """The smallest size that covers height x width at the aspect of `source` [H, W].

    One side is met exactly; the other is rounded down, never below what is wanted.

    Source: scripts/inference_two_stage.py: _center_crop_resize.
    """
    aspect = source[1] / source[0]
    if aspect > width / height:
        return height, max(width, int(height * aspect))
    return max(height, int(width / aspect)), width


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop the last three axes [H W C]; an odd margin leaves more at the end."""
    top = (image.shape[-3] - height) // 2
    left = (image.shape[-2] - width) // 2
    return image[..., top : top + height, left : left + width, :]


def _linear_taps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(index, next index, weight of the next) of m samples read from n, float32."""
    scale = np.float32(n) / np.float32(m)
    half = np.float32(0.5)
    position = np.maximum((np.arange(m, dtype=np.float32) + half) * scale - half, 0)
    index = np.minimum(position.astype(np.int64), n - 1)
    weight = np.clip(position - index.astype(np.float32), 0, 1).astype(np.float32)
    return index, np.minimum(index + 1, n - 1), weight


def _bilinear(
    image: Float32[np.ndarray, "H W 3"], height: int, width: int
) -> Float32[np.ndarray, "H2 W2 3"]:
    i, j, w = _linear_taps(image.shape[1], width)
    w = w[None, :, None]
    image = (1 - w) * image[:, i] + w * image[:, j]
    i, j, w = _linear_taps(image.shape[0], height)
    w = w[:, None, None]
    return (1 - w) * image[i] + w * image[j]


def fit_image(
    image: Float[np.ndarray, "H W 3"], height: int, width: int, fit: Fit = "crop"
) -> Float32[np.ndarray, "{height} {width} 3"]:
    """Bring a picture to the size of a sample, as values in [-1, 1].

    Args:
        image: picture in [0, 1].
        height: wanted height in pixels.
        width: wanted width in pixels.
        fit: "crop" keeps the aspect ratio and crops the centre; "stretch" distorts
            (what the one-stage script of generation 2.0 does).

    Raises:
        ValueError: for an unknown fit, a size below one pixel or an empty picture.

    Source: scripts/inference_one_stage.py: _apply_image_conditioning (stretch),
    scripts/inference_two_stage.py: _center_crop_resize (crop).
    """
    _check_sizes("fit_image", image.shape[:2], height, width)
    if fit not in ("crop", "stretch"):
        raise ValueError(f"fit_image: got fit {fit!r}, expected 'crop' or 'stretch'")
    size = height, width
    if fit == "crop":
        size = covering_size(image.shape[:2], height, width)
    resized = _bilinear(image.astype(np.float32), *size)
    return _centre(resized, height, width) * np.float32(2) - np.float32(1)


def resize_crop(
    image: UInt8[np.ndarray, "*F H W 3"],
    height: int,
    width: int,
    *,
    method: Literal["bicubic", "bilinear"] = "bicubic",
) -> UInt8[np.ndarray, "*F {height} {width} 3"]:
    """Scale a picture or a clip to cover height x width, then crop its centre.

    The aspect ratio is kept; `method` is antialiased when it makes things smaller.

    Raises:
        ValueError: for an unknown method, a size below one pixel or an empty picture.

    Source: ltx_trainer scripts/process_videos.py: _resize_and_crop (center).
    """
    filters = {
        "bicubic": Image.Resampling.BICUBIC,
        "bilinear": Image.Resampling.BILINEAR,
    }
    if method not in filters:
        raise ValueError(
            f"resize_crop: got method {method!r}, expected one of {sorted(filters)}"
        )
    _check_sizes("resize_crop", image.shape[-3:-1], height, width)
    size = covering_size(image.shape[-3:-1], height, width)
    frames = image.reshape(-1, *image.shape[-3:])
    if size != frames.shape[1:3]:
        target = (size[1], size[0])
        pictures = (Image.fromarray(frame) for frame in frames)
        resized = [picture.resize(target, filters[method]) for picture in pictures]
        frames = np.stack([np.asarray(picture) for picture in resized])
    cropped = _centre(frames, height, width)
    return np.ascontiguousarray(cropped.reshape(*image.shape[:-3], height, width, 3))

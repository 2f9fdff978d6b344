"""What a clip looks like while it is sampled, without the video decoder.

    latents [F h w C] @ weight [C 3] + bias [3] = RGB [F h w 3] in [-1, 1]

A latent pixel stands for a block of pixels (the first frame's 32 x 32, later ones
8 x 32 x 32), and the mean colour of the block is nearly linear in it. The map is fitted
to the video encoder itself, once a session: `VIDEOS` short synthetic clips are encoded,
and the mean colours of their blocks regressed on their latent pixels (ridge regression,
float64). Half of the latent frames are first frames, half are later ones; with 5 x 5
latent pixels each that makes 1200 equations for 128 channels.

    fit(cfg, params) -> LinearMap -> Watcher(...)(seen) -> <name>.preview.png
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float, Float32, Float64, UInt8
from PIL import Image

from idlora_jax import programs, sheets
from idlora_jax.config_video_vae import VideoVAEConfig
from idlora_jax.files import PathLike, replacing
from idlora_jax.model import video_vae
from idlora_jax.pipeline import Seen
from idlora_jax.types import Tree

VIDEOS, HELD_OUT = 24, 6
"""Clips that the map is fitted to, and those of them that judge it first."""
CELLS = 5
"""Their latent pixels along a side."""
RIDGE = 0.01
"""Of the latents' mean variance: channels that hardly vary get small weights."""
TINY = 1e-12
"""Stands for that variance where nothing varies at all."""
SPEED = 3
"""Pixels that a clip moves from frame to frame, at most."""
SIDE, COLUMNS = 128, 8
"""Of a preview: the longer side of a frame in pixels, and frames in a row."""

Encode = Callable[[Float[Array, "1 F H W 3"]], Any]
"""Pixels in [-1, 1] -> latents [1 f h w C]."""


class LinearMap(NamedTuple):
    """Latents to colours.

    Attributes:
        weight: [C 3].
        bias: [3]; the colours are in [-1, 1].
        r2: share of the colours' variance that it explains in clips it was not fitted
            to: 1 is all, 0 as much as one constant colour.
    """

    weight: Float64[np.ndarray, "C 3"]
    bias: Float64[np.ndarray, " 3"]
    r2: float


def _colours(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Colours [shape 3] of any brightness, from grey to bright ones."""
    colour = rng.uniform(0, 1, (*shape, 3))
    grey, share = colour.mean(-1, keepdims=True), rng.uniform(0, 1, (*shape, 1))
    level = rng.uniform(0, 1, (*shape, 1))
    return share * colour + (1 - share) * (0.3 * grey + 0.7 * level)


def _gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    """From colour to colour between the four corners; sometimes one flat colour."""
    corners = _colours(rng, 2, 2)
    if rng.random() < 0.3:
        corners[:] = corners[0, 0]
    along = np.linspace(0, 1, side)
    ends = np.stack([1 - along, along])
    return np.einsum("is,jt,ijc->stc", ends, ends, corners)


def _shape(rng: np.random.Generator, side: int) -> np.ndarray:
    """Opacity [side side 1] of an ellipse, with a hard or a soft edge."""
    angle, softness = rng.uniform(0, np.pi), side * 10 ** rng.uniform(-2.5, -1)
    radii = side * rng.uniform(0.08, 0.4, 2)
    y, x = np.meshgrid(*[np.arange(side)] * 2, indexing="ij")
    y, x = (axis - c for axis, c in zip((y, x), rng.uniform(0, side, 2), strict=True))
    turned = (
        np.cos(angle) * x + np.sin(angle) * y,
        np.cos(angle) * y - np.sin(angle) * x,
    )
    distance = np.hypot(*(t / r for t, r in zip(turned, radii, strict=True))) - 1
    steep = np.clip(distance * radii.min() / softness, -50, 50)
    return 1 / (1 + np.exp(steep))[..., None]


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise whose amplitude falls as 1/frequency, as in photographs; mostly grey."""
    noise = rng.standard_normal((side, side, 4))
    steps = np.fft.fftfreq(side) * side
    frequency = np.hypot(steps[:, None], steps[None])
    frequency[0, 0] = np.inf
    waves = np.fft.fft2(noise, axes=(0, 1)) / frequency[..., None]
    smooth = np.fft.ifft2(waves, axes=(0, 1)).real
    planes = smooth / smooth.std()
    share = rng.uniform(0, 0.5)
    return 10 ** rng.uniform(-2.5, -0.7) * (planes[..., :1] + share * planes[..., 1:])


def video(
    rng: np.random.Generator, frames: int, side: int
) -> Float32[np.ndarray, "F S S 3"]:
    """A clip to fit a map to: colours, shapes and texture, moving as a whole.

    Args:
        rng: decides everything about it.
        frames: F.
        side: S pixels.

    Returns:
        Pixels in [-1, 1].
    """
    margin = SPEED * (frames - 1)
    large = side + 2 * margin
    canvas = _gradient(rng, large)
    for _ in range(rng.integers(0, 9)):
        opacity = _shape(rng, large)
        canvas = opacity * _colours(rng) + (1 - opacity) * canvas
    canvas = np.clip(canvas + _texture(rng, large), 0, 1).astype(np.float32)
    dy, dx = rng.integers(-SPEED, SPEED + 1, 2)
    starts = [(margin + n * dy, margin + n * dx) for n in range(frames)]
    cut = np.stack([canvas[y : y + side, x : x + side] for y, x in starts])
    return 2 * cut - 1


def block_means(
    pixels: Float[np.ndarray, "F H W 3"], time: int, space: int
) -> Float[np.ndarray, "f h w 3"]:
    """The mean colour of what each latent pixel stands for.

    Args:
        pixels: F = time k + 1 frames, of which the first stands for itself.
        time: frames per later latent frame.
        space: pixels per latent pixel along a side.
    """
    pattern = "(f t) (h y) (w x) c -> f h w c"
    sizes = {"y": space, "x": space}
    first = reduce(pixels[:1], pattern, "mean", t=1, **sizes)
    later = reduce(pixels[1:], pattern, "mean", t=time, **sizes)
    return np.concatenate([first, later])


def regress(
    latents: Float[np.ndarray, "N C"],
    colours: Float[np.ndarray, "N 3"],
    ridge: float = RIDGE,
) -> tuple[Float64[np.ndarray, "C 3"], Float64[np.ndarray, " 3"]]:
    """The weight and bias of least square error, weights kept small by `ridge`.

    Args:
        latents: one row per latent pixel.
        colours: the mean colour of its block.
        ridge: relative to the latents' mean variance.
    """
    x, y = latents.astype(np.float64), colours.astype(np.float64)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x / len(x)
    penalty = ridge * max(np.trace(gram) / len(gram), TINY)
    weight = np.linalg.solve(gram + penalty * np.eye(len(gram)), x.T @ y / len(x))
    return weight, y_mean - x_mean @ weight


def fit_to(
    encode: Encode, time: int, space: int, *, seed: int = 0, ridge: float = RIDGE
) -> LinearMap:
    """The map of any encoder of clips [1 F H W 3] to latents [1 f h w C].

    Args:
        encode: takes pixels in [-1, 1].
        time: frames per latent frame.
        space: pixels per latent pixel along a side.
        seed: of the synthetic clips.
        ridge: see `regress`.
    """
    x, y = [], []
    for n in range(VIDEOS):
        rng = np.random.default_rng([seed, n])
        pixels = video(rng, time + 1, CELLS * space)
        latents = np.asarray(encode(jnp.asarray(pixels[None])), np.float64)
        x.append(latents.reshape(-1, latents.shape[-1]))
        y.append(block_means(pixels, time, space).reshape(-1, 3))
    seen = slice(HELD_OUT, None)
    judged = regress(np.concatenate(x[seen]), np.concatenate(y[seen]), ridge)
    held = np.concatenate(x[:HELD_OUT]), np.concatenate(y[:HELD_OUT])
    both = regress(np.concatenate(x), np.concatenate(y), ridge)
    return LinearMap(*both, _explained(*held, *judged))


def _explained(
    latents: np.ndarray, colours: np.ndarray, weight: np.ndarray, bias: np.ndarray
) -> float:
    missed = colours - latents @ weight - bias
    spread = colours - colours.mean(0)
    return float(1 - (missed**2).sum() / (spread**2).sum())


_encode = programs.jit(video_vae.encode, "fit previews", static_argnums=0)


def fit(cfg: VideoVAEConfig, params: Tree, *, seed: int = 0) -> LinearMap:
    """The map of a video VAE; less than half the work of decoding 5 s of 512 x 512.

    Args:
        cfg: static.
        params: needs `encoder` and `stats`.
        seed: of the synthetic clips.
    """

    def encode(pixels: Float[Array, "1 F H W 3"]) -> Float[Array, "1 f h w C"]:
        return _encode(cfg, params, pixels)

    return fit_to(encode, cfg.time_factor, cfg.space_factor, seed=seed)


def frames(
    colours: LinearMap, latents: Float[np.ndarray, "F h w C"]
) -> UInt8[np.ndarray, "F h w 3"]:
    """One small picture per latent frame, one pixel per latent pixel."""
    rgb = latents.astype(np.float64) @ colours.weight + colours.bias
    return np.rint(np.clip((rgb + 1) / 2, 0, 1) * 255).astype(np.uint8)


def picture(
    colours: LinearMap,
    latents: Float[np.ndarray, "F h w C"],
    *,
    label: str = "",
    side: int = SIDE,
    columns: int = COLUMNS,
) -> UInt8[np.ndarray, "H W 3"]:
    """All latent frames of a clip, enlarged, in rows.

    Args:
        colours: from `fit`.
        latents: normalised.
        label: stands above the first row.
        side: about the longer side of an enlarged frame, in pixels.
        columns: frames in a row.
    """
    small = frames(colours, np.asarray(latents))
    count, height, width = small.shape[:3]
    scale = max(1, side // max(height, width))
    size = scale * width, scale * height
    smooth = Image.Resampling.BILINEAR
    resized = [Image.fromarray(frame).resize(size, smooth) for frame in small]
    large = np.stack([np.asarray(frame) for frame in resized])
    starts = range(0, count, columns)
    labels = [f"latent frames {n + 1} to {min(n + columns, count)}" for n in starts]
    labels[0] = ", ".join(filter(None, (label, labels[0])))
    return sheets.contact_sheet([large[n : n + columns] for n in starts], labels)


def write(path: PathLike, image: UInt8[np.ndarray, "H W 3"]) -> None:
    """Write a PNG fast rather than small; a viewer never sees half of it.

    Raises:
        OSError: if the file cannot be written; an older one stays.
    """
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", compress_level=1)


@dataclass(frozen=True)
class Watcher:
    """Writes a preview every few steps: pass it as `watch` to `pipeline.sample`.

    Attributes:
        paths: PNG files, one per sample of the batch; replaced with each preview.
        every: steps between previews; the last step of a stage always makes one.
        colours: gives the map; called with the first preview.
    """

    paths: Sequence[Path]
    every: int
    colours: Callable[[], LinearMap]

    def __call__(self, seen: Seen) -> None:
        """Write the previews of a step, if it is one of those; R2 is the map's.

        Raises:
            OSError: if a file cannot be written.
        """
        due = seen.step % self.every == 0 or seen.step == seen.steps
        if not due or seen.x0.video is None:
            return
        colours = self.colours()
        done = f"step {seen.step} of {seen.steps}"
        label = f"{seen.stage}: {done}, sigma {seen.sigma:.3f}, R2 {colours.r2:.2f}"
        for path, latents in zip(self.paths, np.asarray(seen.x0.video), strict=True):
            write(path, picture(colours, latents, label=label))

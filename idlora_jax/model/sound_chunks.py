"""Long sounds through the vocoder piece by piece, exactly.

A vocoder is convolutions alone: a sample depends on the mel frames within `reach` of
it. A window of them around a piece of the sound gives that piece as the whole sound
would, where the window ends with the sound itself or `reach` frames beyond the piece:

    |------ piece 0 ------|~~~|                        ~~~ read, and not used
                   |~~~|------ piece 1 ------|~~~|
                                         |~~~|------ piece 2 ------|

All windows have one length, so that one compiled body serves all pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idlora_jax import mel
from idlora_jax.config_vocoder import ExtensionConfig, GeneratorConfig, VocoderConfig
from idlora_jax.model import antialias

ENDS = 7
"""Taps of a generator's first and last convolution."""
_SNAKE = 2 * (antialias.TAPS // 4)
"""Samples that a snake looks at on each side: up and down again."""


def _half(size: int, dilation: int = 1) -> int:
    return math.ceil(dilation * (size - 1) / 2)


def _reach_of_blocks(cfg: GeneratorConfig) -> int:
    """Samples on each side that a stage's residual blocks depend on."""
    snake = 0 if cfg.activation == "leaky" else _SNAKE

    def one(size: int, dilations: tuple[int, ...]) -> int:
        return sum(_half(size, d) + _half(size) + 2 * snake for d in dilations)

    return max(map(one, cfg.kernels, cfg.dilations))


def reach_of_generator(cfg: GeneratorConfig) -> int:
    """Mel frames on each side that a generator's samples depend on, at most."""
    away = _half(ENDS) + (0 if cfg.activation == "leaky" else _SNAKE)
    for rate, size in zip(cfg.rates[::-1], cfg.up_kernels[::-1], strict=True):
        away += _reach_of_blocks(cfg)
        away = math.ceil((away + size) / rate)
    return away + _half(ENDS)


def _reach_of_extension(cfg: ExtensionConfig) -> int:
    """Samples at the low rate on each side that the extended sound depends on."""
    frames = reach_of_generator(cfg.generator) + 1
    taps = mel.resample_kernel(cfg.input_rate, cfg.input_rate * cfg.ratio).shape[1]
    return max(frames * cfg.hop + cfg.n_fft, taps)


def reach(cfg: VocoderConfig) -> int:
    """Mel frames on each side that a vocoder's samples depend on, at most."""
    own = reach_of_generator(cfg.generator)
    if cfg.extension is None:
        return own
    return own + math.ceil(_reach_of_extension(cfg.extension) / cfg.generator.factor)


def unit(cfg: VocoderConfig) -> int:
    """The least number of mel frames that are whole frames of the extension."""
    if cfg.extension is None:
        return 1
    hop = cfg.extension.hop
    return hop // math.gcd(hop, cfg.generator.factor)


def divides(cfg: VocoderConfig) -> bool:
    """Whether each mel frame stands for `cfg.factor` samples exactly."""
    generator = cfg.generator
    pairs = zip(generator.up_kernels, generator.rates, strict=True)
    return all((size - rate) % 2 == 0 for size, rate in pairs)


def pieces(
    cfg: VocoderConfig,
    f: Callable[[Float[Array, "B W M 2"]], Float[Array, "B S 2"]],
    spectrum: Float[Array, "B T M 2"],
    size: int,
) -> Float[Array, "B N 2"]:
    """`f(spectrum)`, computed for `size` frames at a time.

    Args:
        cfg: the vocoder; what it does not divide is computed at once.
        f: the vocoder as a function of a spectrum, `cfg.factor` samples a frame.
        spectrum: log-mel.
        size: frames of a piece, at least; a whole number of `unit` is taken.
    """
    step, frames, factor = unit(cfg), spectrum.shape[1], cfg.factor
    size, beside = (-(-n // step) * step for n in (size, reach(cfg)))
    window = size + 2 * beside + frames % step
    if frames <= window or not divides(cfg):
        return f(spectrum)

    def piece(sound: Array, n: Array) -> tuple[Array, None]:
        # The last piece ends with the sound: its beginning is made again.
        first = jnp.minimum(n * size, frames - size)
        start = jnp.clip(first - beside, 0, frames - window)
        made = f(jax.lax.dynamic_slice_in_dim(spectrum, start, window, axis=1))
        at = (first - start) * factor
        own = jax.lax.dynamic_slice_in_dim(made, at, size * factor, axis=1)
        put = jax.lax.dynamic_update_slice_in_dim
        return put(sound, own, first * factor, axis=1), None

    silence = jnp.zeros((len(spectrum), frames * factor, 2), spectrum.dtype)
    return jax.lax.scan(piece, silence, jnp.arange(-(-frames // size)))[0]

"""A sound made piece by piece is the sound; how far a vocoder looks."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_sections import TINY_VOCODER, TINY_VOCODER_23

from idlora_jax import liveness
from idlora_jax.config_vocoder import vocoder_config
from idlora_jax.model import sound_chunks, vocoder

_NARROW = {"upsample_initial_channel": 64, "resblock_kernel_sizes": [11]}
_NARROW |= {"resblock_dilation_sizes": [[1, 3, 5]]}
_SNAKES = {"resblock": "AMP1", "activation": "snakebeta", "use_tanh_at_final": False}
_SNAKES |= {"use_bias_at_final": False}
PUBLISHED = {
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
}
"""Rates and kernels of generation 2.0, of residual blocks the largest, less width."""
PUBLISHED_23 = {
    "vocoder": {
        **_NARROW,
        **_SNAKES,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    },
    "bwe": {
        **_NARROW,
        **_SNAKES,
        "apply_final_activation": False,
        "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 512,
        "num_mels": 64,
    },
}
CONFIGS = {
    "tiny 2.0": TINY_VOCODER,
    "tiny 2.3": TINY_VOCODER_23,
    "narrow 2.0": {**_NARROW, **PUBLISHED},
    "narrow 2.3": PUBLISHED_23,
}
TINY = [name for name in CONFIGS if name.startswith("tiny")]


def config_of(name: str) -> Any:
    return vocoder_config({"vocoder": CONFIGS[name]})


@pytest.fixture(scope="module")
def made() -> Any:
    """(configuration, parameters, whole) by name, made once."""
    found: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in found:
            cfg = config_of(name)
            params = jax.jit(partial(vocoder.init, cfg))(jax.random.key(0))
            whole = jax.jit(partial(vocoder.synthesize, cfg, chunk=None))
            found[name] = cfg, params, whole
        return found[name]

    return get


def spectrum(frames: int, batch: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(frames), (batch, frames, 64, 2))


def in_pieces(made: Any, name: str, frames: int, chunk: int) -> None:
    """In float64, where rounding is out of sight."""
    cfg, params, _ = made(name)
    with jax.enable_x64(True):
        exact = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
        given = exact(params), exact(spectrum(frames, 2))
        want, got = (
            jax.jit(partial(vocoder.synthesize, cfg, chunk=size))(*given)
            for size in (None, chunk)
        )
    assert got.shape == want.shape == (2, 2, frames * cfg.factor)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("frames", [120, 121])
@pytest.mark.parametrize("chunk", [7, 32])
@pytest.mark.parametrize("name", TINY)
def test_pieces_make_the_whole(made, name, chunk, frames):
    in_pieces(made, name, frames, chunk)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["narrow 2.0", "narrow 2.3"])
def test_pieces_make_the_whole_at_published_rates(made, name):
    in_pieces(made, name, 200, 50)


@pytest.mark.parametrize("name", TINY)
def test_pieces_differ_from_the_whole_by_rounding_alone(made, name):
    cfg, params, whole = made(name)
    run = jax.jit(partial(vocoder.synthesize, cfg, chunk=32))
    got = run(params, spectrum(120))
    np.testing.assert_allclose(got, whole(params, spectrum(120)), rtol=0, atol=1e-5)
    assert "scan[" in str(run.trace(params, spectrum(120)).jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_frame_is_heard_as_far_as_the_reach_and_hardly_less(made, name):
    """What is beyond stays bitwise equal; what depends on it is not far below."""
    cfg, params, whole = made(name)
    reach, at = sound_chunks.reach(cfg), sound_chunks.reach(cfg) + 10
    mel = spectrum(2 * at + 1)
    before, after = whole(params, mel), whole(params, mel.at[:, at].add(100))
    changed = np.flatnonzero(np.any(before != after, axis=(0, 1))) / cfg.factor
    assert at - reach <= changed.min() and changed.max() < at + 1 + reach
    assert max(at - changed.min(), changed.max() - at - 1) > 0.4 * reach


def test_what_is_beside_a_piece_matters(made, monkeypatch):
    cfg, params, whole = made("tiny 2.3")
    monkeypatch.setattr(sound_chunks, "reach", lambda cfg: 2)
    mel = spectrum(120)
    got = vocoder.synthesize(cfg, params, mel, chunk=32)
    assert float(jnp.abs(got - whole(params, mel)).max()) > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_short_sounds_are_made_at_once(made, name):
    cfg, params, whole = made(name)
    mel = spectrum(20)
    np.testing.assert_array_equal(
        jax.jit(partial(vocoder.synthesize, cfg))(params, mel), whole(params, mel)
    )


def test_a_rate_that_does_not_divide_is_made_at_once(made):
    cfg, _, _ = made("tiny 2.0")
    odd = dataclasses.replace(cfg.generator, up_kernels=(8, 4))
    odd = dataclasses.replace(cfg, generator=odd)
    assert not sound_chunks.divides(odd) and sound_chunks.divides(cfg)
    params = vocoder.init(odd, jax.random.key(0))
    sizes = [
        vocoder.synthesize(odd, params, spectrum(120), chunk=chunk).shape
        for chunk in (None, 8)
    ]
    assert sizes[0] == sizes[1]


def test_a_chunk_below_1_is_refused(made):
    cfg, params, _ = made("tiny 2.0")
    with pytest.raises(ValueError, match="got chunk 0, expected 1 or more"):
        vocoder.synthesize(cfg, params, spectrum(20), chunk=0)


def test_memory_does_not_grow_with_the_length():
    cfg = config_of("narrow 2.0")
    sizes = {"kernels": (3, 7, 11), "dilations": ((1, 3, 5),) * 3}
    as_published = dataclasses.replace(cfg.generator, width=1024, **sizes)
    cfg = dataclasses.replace(cfg, generator=as_published)
    params = jax.eval_shape(partial(vocoder.init, cfg), jax.random.key(0))

    def needs(frames: int, chunk: int | None) -> int:
        """Beside the sound, which is there at its end, too."""
        mel = jax.ShapeDtypeStruct((1, frames, 64, 2), jnp.float32)
        run = jax.jit(partial(vocoder.synthesize, cfg, chunk=chunk))
        sound = 2 * frames * cfg.factor * 4
        return liveness.temporary(run.trace(params, mel).jaxpr) - sound

    short, long = (needs(frames, vocoder.CHUNK) for frames in (2048, 20480))
    assert long < 1.2 * short < 0.3e9
    assert needs(20480, None) > 8 * long

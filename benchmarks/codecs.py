"""Networks around the transformer: their configurations by size, and random weights.

`full` is as published; every other size takes the tiny ones of `idlora_jax.tiny`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_weights import hash_of
from idlora_jax import config, tiny
from idlora_jax.config import Generation
from idlora_jax.config_text import TextEncoderConfig, text_encoder_config
from idlora_jax.model import vocoder
from idlora_jax.types import Tree
from idlora_jax.weights import catalog, rules


def _res(layers: int) -> list[Any]:
    return ["res_x", {"num_layers": layers}]


def _resampled(name: str, **more: Any) -> list[Any]:
    return [name, {"multiplier": 2, **more}]


_UP = [_res(5), _resampled("compress_all", residual=True)]
PUBLISHED: dict[str, Any] = {
    "vae": {
        "timestep_conditioning": False,
        "decoder_base_channels": 128,
        "encoder_blocks": [
            _res(4),
            _resampled("compress_space_res"),
            _res(6),
            _resampled("compress_time_res"),
            _res(6),
            _resampled("compress_all_res"),
            _res(2),
            _resampled("compress_all_res"),
            _res(2),
        ],
        "decoder_blocks": [*_UP * 3, _res(5)],
    },
    "audio_vae": {
        "model": {
            "params": {
                "ddconfig": {
                    "ch": 128,
                    "z_channels": 8,
                    "mel_bins": 64,
                    "num_res_blocks": 2,
                    "attn_resolutions": [],
                    "mid_block_add_attention": False,
                }
            }
        }
    },
    "vocoder": {
        "upsample_initial_channel": 1024,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [16, 15, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    },
}
"""The latent networks of the published 2.0 checkpoint; 2.3 is measured with these."""


def configuration(name: str, size: str, generation: Generation) -> Any:
    """The configuration of a network of a checkpoint.

    Args:
        name: as `weights.catalog` knows it.
        size: name of the size.
        generation: of the checkpoint.
    """
    if size == "full":
        section, of = PUBLISHED | config.published(generation), generation
        of = "2.0" if name in ("video_vae", "audio_vae", "vocoder") else generation
        return catalog.read_config(name, section, of)
    states = text_encoder().layers + 1
    section = tiny.tiny_config(generation)
    return catalog.read_config(name, section, generation, states)


def text_encoder() -> TextEncoderConfig:
    """The tiny text encoder."""
    return text_encoder_config(tiny.gemma_config())


def random_params(name: str, cfg: Any, dtype: Any = jnp.float32) -> Tree:
    """Random weights of variance 1 / fan-in, on the device."""
    return drawn(catalog.shapes_of(name, cfg), dtype, name, cfg)


def drawn(shapes: Tree, dtype: Any, name: str = "", cfg: Any = None) -> Tree:
    """Numbers for shapes: kernels random, biases 0, everything else 1."""

    def one(path: str, leaf: Any) -> Any:
        kind = path.rpartition("/")[2]
        if kind not in ("kernel", "embedding", "registers"):
            value = 0.0 if kind in ("bias", "mean") else 1.0
            return np.full(leaf.shape, value, np.float32)
        rng = np.random.default_rng(hash_of(path))
        size = np.float32(np.prod(leaf.shape[:-1]) ** -0.5)
        return size * rng.standard_normal(leaf.shape, np.float32)

    flat = rules.flatten(shapes)
    made = rules.nest({path: one(path, leaf) for path, leaf in flat.items()})
    made = vocoder.with_buffers(cfg, made) if name == "vocoder" else made
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), made)

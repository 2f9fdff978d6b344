"""Complete original files of both generations, random and small, for other programs.

Activations stay near 1 through every network, and statistics are positive, so that a
comparison of outputs says something.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import codec_sections
import jax
import numpy as np

from idlora_jax import tiny
from idlora_jax.config import Generation
from idlora_jax.model import vocoder
from idlora_jax.weights import io, rules

STATES, LENGTH = 3, 64
_GENERATOR = {
    "upsample_initial_channel": 8,
    "upsample_rates": [3, 2],
    "upsample_kernel_sizes": [7, 4],
    "resblock": "AMP1",
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
    "stereo": True,
    "activation": "snakebeta",
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}
_EXTENSION = {
    "upsample_rates": [4, 3],
    "upsample_kernel_sizes": [8, 5],
    "apply_final_activation": False,
    "input_sampling_rate": 16000,
    "output_sampling_rate": 48000,
    "hop_length": 4,
    "n_fft": 16,
    "win_size": 16,
    "num_mels": 64,
}
_TRANSFORMER = {
    "num_layers": 2,
    "in_channels": 12,
    "out_channels": 12,
    "audio_in_channels": 10,
    "audio_out_channels": 10,
    "connector_num_learnable_registers": 16,
    "connector_num_layers": 1,
}


def embedded(generation: Generation) -> dict[str, Any]:
    """The config of the file, all sections."""
    newer = generation == "2.3"
    whole = tiny.tiny_config(generation)
    two = {"vocoder": _GENERATOR, "bwe": _GENERATOR | _EXTENSION}
    return {
        "transformer": whole["transformer"] | _TRANSFORMER,
        "vae": codec_sections.TINY_VIDEO_23 if newer else codec_sections.TINY_VIDEO,
        "audio_vae": codec_sections.TINY_AUDIO,
        "vocoder": two if newer else codec_sections.TINY_VOCODER,
    }


def _values(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32)
    leaf = path.rpartition("/")[2]
    if leaf == "kernel":
        codec = "blocks" not in path or path.startswith("video_vae")
        return noise / math.sqrt(math.prod(shape[:-1]) if codec else shape[-2])
    if path.endswith("stats/std"):
        return 1 + np.abs(noise)
    return 0.2 * noise + (leaf == "scale")


def random_params(name: str, cfg: Any) -> Any:
    """Float32 parameters of a network."""
    flat = rules.flatten(io.shapes_of(name, cfg))
    rng = np.random.default_rng([*name.encode()])
    drawn = {k: _values(f"{name}/{k}", v.shape, rng) for k, v in sorted(flat.items())}
    params = rules.nest(drawn)
    if name != "vocoder":
        return params
    return jax.tree.map(np.asarray, vocoder.with_buffers(cfg, params))


@functools.cache
def params(generation: Generation) -> dict[str, Any]:
    """Parameters of all networks."""
    config = embedded(generation)
    nets = {n: io.read_config(n, config, generation, STATES) for n in io.NETWORKS}
    return {name: random_params(name, cfg) for name, cfg in nets.items()}


def write(path: Path, generation: Generation) -> Path:
    """Write the file, as published ones are."""
    io.save_original(path, params(generation), embedded(generation))
    return path

"""A checkpoint in the original format, small enough to be written in a moment."""

import codec_sections
import pytest

from idlora_jax import tiny
from idlora_jax.weights import io

CODECS = {
    "vae": codec_sections.TINY_VIDEO,
    "audio_vae": codec_sections.TINY_AUDIO,
    "vocoder": codec_sections.TINY_VOCODER,
}
STATES = 7


@pytest.fixture(scope="session")
def embedded():
    return tiny.tiny_config() | CODECS


@pytest.fixture(scope="session")
def params(embedded):
    nets = {n: io.read_config(n, embedded, "2.0", STATES) for n in io.NETWORKS}
    return {n: tiny.random_params(n, io.shapes_of(n, nets[n]), 0) for n in nets}


@pytest.fixture(scope="session")
def checkpoint(embedded, params, tmp_path_factory):
    """Path of a complete original file."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    io.save_original(path, params, embedded, {"license": "none", "model_version": "2"})
    return path

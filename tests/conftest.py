"""A strict session: CPU, warnings are errors (pyproject), rank promotion raises.

Hypothesis tries the same examples in every run; HYPOTHESIS_PROFILE=new tries new ones.
"""

import os

import quick_compile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", quick_compile.FLAGS)
# Nor are the compiled programs of tests kept in the user's cache folder.
os.environ["IDLORA_PROGRAM_CACHE"] = "off"

import gc
import pathlib

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("new", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session", autouse=True)
def own_cache_folder(tmp_path_factory):
    """Prompts that tests encode are not kept in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 20_000
"""Well below Linux's usual limit of 65530 mapped regions a process."""


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Let go of compiled programs now and then.

    Each maps some memory regions, and at the system's limit XLA crashes.
    """
    yield
    if MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """(checkpoint file, text encoder folder) of the tiny model, written once."""
    from idlora_jax import tiny

    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def files(tiny_model, tmp_path_factory):
    """What a sample needs besides weights: see `sample_files.written`."""
    import sample_files

    return sample_files.written(tiny_model, tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is an error."""
    from idlora_jax.weights import io

    def refuse(*args, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(io, "read_all", refuse)


@pytest.fixture(scope="session")
def larger(tmp_path_factory):
    """A latent upsampler of random weights, as an original file."""
    import codec_sections

    from idlora_jax.config_upsampler import upsampler_config
    from idlora_jax.model import upsampler
    from idlora_jax.weights.upsampler_files import save_upsampler

    cfg = upsampler_config(codec_sections.UPSAMPLER)
    path = tmp_path_factory.mktemp("upsampler") / "x2.safetensors"
    save_upsampler(path, cfg, upsampler.init(cfg, jax.random.key(0)))
    return path

"""A strict session: CPU, warnings are errors (pyproject), rank promotion raises."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what these tests cost, and their arrays are tiny: LLVM's
# optimiser would take longer than it saves.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """(checkpoint file, text encoder folder) of the tiny model, written once."""
    from idlora_jax import tiny

    return tiny.write(tmp_path_factory.mktemp("tiny"))

"""A strict session: CPU, warnings are errors (pyproject), rank promotion raises."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what these tests cost, and their arrays are tiny: LLVM's
# optimiser would take longer than it saves.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(tryfirst=True)  # before the plugin reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2 --dist loadgroup`, tests that share compiled functions share a worker.

    A group is a recorded file, or a test file.
    """
    for item in items:
        name = item.path.name
        if name == "test_golden.py" and hasattr(item, "callspec"):
            name = str(item.callspec.params["path"])
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """(checkpoint file, text encoder folder) of the tiny model, written once."""
    from idlora_jax import tiny

    return tiny.write(tmp_path_factory.mktemp("tiny"))

"""A strict session: CPU, warnings are errors (pyproject), rank promotion raises."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

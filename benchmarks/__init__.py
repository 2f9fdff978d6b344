"""Measurements of idlora_jax, beside the PyTorch programs where these are installed.

    python -m benchmarks step --config eighth --backends jax,reference --rounds 8

`docs/performance.md` says what each suite measures. Nothing here is installed with the
library; it is run from a checkout.
"""

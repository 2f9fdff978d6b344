"""Whose programs are measured: ours, the PyTorch reference, diffusers.

Each has `forward` and, where it can, `step` and `train`: a case in, a `Work` out.
"""

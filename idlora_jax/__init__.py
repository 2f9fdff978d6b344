"""ID-LoRA on LTX-2 in JAX/Flax: a person's face and voice in one diffusion pass."""

__version__ = "0.1.0"

"""The latent upsamplers; files hold latents as [B C F H W] and keys without prefix."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from idlora_jax.config_upsampler import upsampler_config
from idlora_jax.model import upsampler
from idlora_jax.weights import rules, tables


@case(
    "upsampler_dims2",
    "upsampler_rational_x1_5",
    "upsampler_rational_x2",
    "upsampler_spatial",
    "upsampler_temporal",
)
def upsample(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg = upsampler_config(golden.config)
    params = rules.import_(golden.weights, tables.UPSAMPLER)["upsampler"]
    latent = jnp.moveaxis(jnp.asarray(golden.inputs["latent"]), 1, -1)
    mean, std = (jnp.asarray(golden.inputs[f"vae_{n}"]) for n in ("mean", "std"))
    raw = jax.jit(partial(upsampler.apply, cfg))(params, latent)
    both = jax.jit(partial(upsampler.upsample, cfg))(params, latent, mean, std)
    found = {"raw": raw, "upsampled": both}
    return {name: np.asarray(jnp.moveaxis(x, -1, 1)) for name, x in found.items()}

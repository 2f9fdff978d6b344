"""The latent networks: video VAE, audio VAE.

Files hold pictures as [B C F H W], spectrograms and audio latents as [B C T M].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from idlora_jax import config_codecs
from idlora_jax.model import audio_vae
from idlora_jax.weights import rules, tables


def _params(golden: Golden, name: str) -> Any:
    return rules.import_(golden.weights, tables.BASE)[name]


def _ours(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def _theirs(x: jax.Array) -> np.ndarray:
    return np.asarray(jnp.moveaxis(x, -1, 1))


@case("audio_vae", "audio_vae_attn")
def audio(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg = config_codecs.audio_vae_config(golden.config)
    params = _params(golden, "audio_vae")
    encode = jax.jit(partial(audio_vae.encode, cfg))
    mels = golden.sub("mel").items()
    out = {f"latent.{n}": _theirs(encode(params, _ours(mel))) for n, mel in mels}
    mel = jax.jit(partial(audio_vae.decode, cfg))(
        params, _ours(golden.inputs["latent"])
    )
    return out | {"mel": _theirs(mel)}

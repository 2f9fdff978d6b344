"""The latent networks: video VAE, audio VAE, vocoder.

Files hold pictures as [B C F H W], spectrograms and audio latents as [B C T M].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import PENDING, case
from idlora_jax import config_codecs
from idlora_jax.model import audio_vae, video_vae, vocoder
from idlora_jax.weights import rules, tables

PENDING["video_vae_decoder"] = ("tiled*",)
for _name in (
    "video_vae_decoder_timestep",
    "video_vae_tiled_encode",
    "vocoder_bwe",
    "upsampler_dims2",
    "upsampler_rational_x1_5",
    "upsampler_rational_x2",
    "upsampler_spatial",
    "upsampler_temporal",
    "identity_two_stage",
    "identity_two_stage_hq",
):
    PENDING[_name] = ("*",)


def _params(golden: Golden, name: str) -> Any:
    return rules.import_(golden.weights, tables.BASE)[name]


def _ours(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def _theirs(x: jax.Array) -> np.ndarray:
    return np.asarray(jnp.moveaxis(x, -1, 1))


@case("video_vae_encoder")
def video_vae_encoder(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg = config_codecs.video_vae_config(golden.config, golden.generation)
    encode = jax.jit(partial(video_vae.encode, cfg))
    params = _params(golden, "video_vae")
    video = _ours(golden.inputs["video"])
    out = {}
    for name in golden.outputs:
        if name == "latent.crop":
            clip = video_vae.crop_frames(cfg, video[:, : golden.params["crop"]])
            out[name] = _theirs(encode(params, clip))
        elif name.startswith("latent."):
            frames = int(name.rpartition(".")[2])
            out[name] = _theirs(encode(params, video[:, :frames]))
    return out


@case("video_vae_decoder", "video_vae_decoder_v23blocks")
def video_vae_decoder(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg = config_codecs.video_vae_config(golden.config, golden.generation)
    decode = jax.jit(partial(video_vae.decode, cfg))
    params = _params(golden, "video_vae")
    latent = _ours(golden.inputs["latent"])
    video = decode(params, latent)
    out = {"video": _theirs(video)}
    if "uint8" in golden.outputs:
        out["uint8"] = np.asarray(video_vae.to_uint8(video)[0])
    if "one_frame" in golden.outputs:
        out["one_frame"] = _theirs(decode(params, latent[:, :1]))
    return out


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


@case("vocoder_hifigan")
def hifigan(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    cfg = config_codecs.vocoder_config(golden.config)
    synthesize = jax.jit(partial(vocoder.synthesize, cfg))
    params = _params(golden, "vocoder")
    return {"wave": np.asarray(synthesize(params, _ours(golden.inputs["mel"])))}

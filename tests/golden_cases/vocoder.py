"""The vocoder; files hold spectrograms as [B 2 T M], bands before frames inside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from goldens import Golden

from golden_cases import case
from idlora_jax import mel
from idlora_jax.config_vocoder import ExtensionConfig, VocoderConfig, vocoder_config
from idlora_jax.model import bandwidth, vocoder
from idlora_jax.types import Tree
from idlora_jax.weights import rules, tables

Outputs = dict[str, np.ndarray]


def _given(golden: Golden) -> tuple[VocoderConfig, Tree, jax.Array]:
    params = rules.import_(golden.weights, tables.BASE)["vocoder"]
    log_mel = jnp.moveaxis(jnp.asarray(golden.inputs["mel"]), 1, -1)
    return vocoder_config(golden.config), params, log_mel


_synthesize = jax.jit(vocoder.synthesize, static_argnums=0)


@case("vocoder_hifigan")
def hifigan(golden: Golden, numerics: str) -> Outputs:
    return {"wave": np.asarray(_synthesize(*_given(golden)))}


def _resampler_filter(cfg: ExtensionConfig) -> np.ndarray:
    """Our phases as one filter of ratio x taps - (ratio - 1), scaled as the file's."""
    phases = mel.resample_kernel(cfg.input_rate, cfg.input_rate * cfg.ratio)
    taps = phases[:, ::-1].T.reshape(-1) / np.float32(cfg.ratio)
    return taps[None, None, : taps.size - cfg.ratio + 1]


def _parts(cfg: VocoderConfig, params: Tree, log_mel: jax.Array) -> Tree:
    """What `vocoder.extend` adds up, [B samples 2], and the spectrogram between."""
    extension = cfg.extension
    assert extension
    low = vocoder.generate(cfg.generator, params["base"], log_mel)
    whole = jnp.pad(low, ((0, 0), (0, -low.shape[1] % extension.hop), (0, 0)))
    heard = bandwidth.log_mel(extension, params["stft"], whole)
    return {
        "low_rate": low,
        "bwe_mel": heard,
        "residual": vocoder.generate(extension.generator, params["bwe"], heard),
        "skip": bandwidth.resample(extension, whole),
        "wave": vocoder.extend(extension, params, low),
    }


_parts_jit = jax.jit(_parts, static_argnums=0)


@case("vocoder_bwe")
def extended(golden: Golden, numerics: str) -> Outputs:
    cfg, params, log_mel = _given(golden)
    assert cfg.extension
    out = {k: np.asarray(v) for k, v in _parts_jit(cfg, params, log_mel).items()}
    out["bwe_mel"] = out["bwe_mel"].transpose(0, 3, 2, 1)
    waves = {k: v.transpose(0, 2, 1) for k, v in out.items() if k != "bwe_mel"}
    return {**out, **waves, "resampler_filter": _resampler_filter(cfg.extension)}

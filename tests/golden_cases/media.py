"""The audio front end: resampling, filter bank, window, log-mel."""

from __future__ import annotations

import numpy as np
from goldens import Golden

from golden_cases import case
from idlora_jax import mel


@case("audio_mel")
def audio_mel(golden: Golden, numerics: str) -> dict[str, np.ndarray]:
    p = golden.params
    rate, n_fft, bins = p["sample_rate"], p["n_fft"], p["mel_bins"]
    out = {"mel_fb": mel.mel_filters(rate, n_fft, bins)}
    out["window"] = mel.hann_window(n_fft)
    for name in golden.outputs:
        if name.startswith("resample_kernel."):
            source = int(name.rpartition(".")[2])
            out[name] = mel.resample_kernel(source, rate)[:, None]
    for source, batch in golden.sub("wave").items():
        waves = [mel.resample(x, int(source), rate, numerics) for x in batch]
        mels = [
            mel.log_mel(x, rate=rate, n_fft=n_fft, hop=p["mel_hop_length"], bins=bins)
            for x in waves
        ]
        out[f"resampled.{source}"] = np.stack(waves)
        out[f"logmel.{source}"] = np.stack(mels).transpose(0, 3, 1, 2)
    return out

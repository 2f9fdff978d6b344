"""Sound as arrays: resampling and the log-mel picture the audio VAE reads.

    wave f32 [2 N] --resample--> 16 kHz --log_mel--> f32 [T M 2]

with N samples, T = 1 + N // hop frames and M mel bands; stereo is the last axis, as
the audio VAE reads it (there with a batch axis in front).

**Resampling** to b samples for each a (the reduced rates). Output sample m·b + j lies
at input time m·a + j·a/b, so it is a dot product of the input around m·a with row j of
a fixed table: one filter a phase. The `reference` numerics use a sinc cut off at
c = 0.99·min(a, b)/a of the input's Nyquist frequency, under a Hann window that holds
6 zero crossings on each side:

    h(u) = c · sinc(c·u) · cos²(π·c·u / 12)   where |c·u| < 6, else 0

and `exact` numerics take librosa's resampler (soxr, high quality), which has a sharper
and deeper stop band.

**Log-mel**: magnitudes of centred, reflect-padded Hann frames through triangular
filters on the Slaney scale with equal area, log of at least 1e-5.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import librosa
import numpy as np
from jaxtyping import Float, Float32

ZERO_CROSSINGS = 6
ROLLOFF = 0.99
FLOOR = 1e-5


@functools.lru_cache(maxsize=16)
def resample_kernel(from_rate: int, to_rate: int) -> Float32[np.ndarray, "phase K"]:
    """The windowed-sinc filters of `numerics="reference"`, one row an output phase.

    With a, b the rates divided by their common divisor, there are b phases; row j
    spans input samples -w .. w + a - 1 around the start of its group of a samples,
    w = ceil(6 a / (0.99 min(a, b))), so K = 2 w + a.

    Source: Hann-windowed sinc interpolation (J. O. Smith, Digital Audio Resampling);
    constants of ltx_core/model/audio_vae/ops.py: AudioProcessor.resample_waveform.
    """
    common = math.gcd(from_rate, to_rate)
    a, b = from_rate // common, to_rate // common
    cutoff = ROLLOFF * min(a, b) / a
    width = math.ceil(ZERO_CROSSINGS * a / (ROLLOFF * min(a, b)))
    taps = np.arange(-width, width + a)
    u = cutoff * (taps[None] - np.arange(b)[:, None] * a / b)
    u = np.clip(u, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    hann = np.cos(np.pi * u / (2 * ZERO_CROSSINGS)) ** 2
    return (cutoff * np.sinc(u) * hann).astype(np.float32)


def _windowed_sinc(
    wave: Float32[np.ndarray, "channels N"], from_rate: int, to_rate: int
) -> Float32[np.ndarray, "channels N2"]:
    kernel = resample_kernel(from_rate, to_rate)
    step = from_rate // math.gcd(from_rate, to_rate)
    width = (kernel.shape[1] - step) // 2
    padded = np.pad(wave, ((0, 0), (width, width + step)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[1], axis=1)
    phases = windows[:, ::step] @ kernel.T
    length = -(-wave.shape[1] * to_rate // from_rate)
    return phases.reshape(len(wave), -1)[:, :length]


def resample(
    wave: Float[np.ndarray, "channels N"],
    from_rate: int,
    to_rate: int,
    numerics: Literal["exact", "reference"] = "exact",
) -> Float32[np.ndarray, "channels N2"]:
    """Change the sampling rate; N2 = ceil(N to_rate / from_rate).

    Args:
        wave: samples in [-1, 1], one row a channel.
        from_rate: its rate in Hz.
        to_rate: the wanted rate in Hz.
        numerics: "exact" = soxr through librosa, "reference" = the reference's
            windowed sinc.

    Raises:
        ValueError: for a rate that is not positive.

    Source: ltx_core/model/audio_vae/ops.py: AudioProcessor.resample_waveform.
    """
    if min(from_rate, to_rate) <= 0:
        raise ValueError(
            f"resample: rates must be positive, got {from_rate} -> {to_rate} Hz"
        )
    wave = np.asarray(wave, np.float32)
    if from_rate == to_rate or wave.shape[1] == 0:
        return wave
    if numerics == "reference":
        return _windowed_sinc(wave, from_rate, to_rate)
    return librosa.resample(
        wave, orig_sr=from_rate, target_sr=to_rate, res_type="soxr_hq"
    )


def hann_window(size: int) -> Float32[np.ndarray, " size"]:
    """The periodic Hann window: one period of sin², its last zero left out."""
    return librosa.filters.get_window("hann", size, fftbins=True).astype(np.float32)


@functools.lru_cache(maxsize=4)
def mel_filters(rate: int, n_fft: int, bins: int) -> Float32[np.ndarray, "bins M"]:
    """Triangular filters on the Slaney scale with equal area, 0 Hz to rate / 2.

    Shape: [n_fft // 2 + 1 frequencies, mel bands]; band = magnitudes @ filters.
    """
    return librosa.filters.mel(
        sr=rate, n_fft=n_fft, n_mels=bins, htk=False, norm="slaney"
    ).T


def log_mel(
    wave: Float[np.ndarray, "2 N"],
    *,
    rate: int = 16000,
    n_fft: int = 1024,
    hop: int = 160,
    bins: int = 64,
) -> Float32[np.ndarray, "T M 2"]:
    """Log-mel spectrogram, T = 1 + N // hop frames of `bins` bands, channels last.

    Args:
        wave: stereo samples at `rate` Hz, in [-1, 1].
        rate: samples per second; the bands run from 0 to rate / 2.
        n_fft: window and transform length in samples.
        hop: samples from one frame to the next.
        bins: number of mel bands.

    Raises:
        ValueError: if the sound is too short to be reflected by half a window.

    Source: ltx_core/model/audio_vae/ops.py: AudioProcessor.waveform_to_mel.
    """
    half = n_fft // 2
    if wave.shape[1] <= half:
        raise ValueError(
            f"log_mel: got {wave.shape[1]} samples ({wave.shape[1] / rate:.3f} s), "
            f"expected more than {half} ({half / rate:.3f} s); give a longer recording"
        )
    # float64 on the host: bands near the floor are differences of large terms.
    padded = np.pad(wave.astype(np.float64), ((0, 0), (half, half)), mode="reflect")
    spectrum = librosa.stft(
        padded, n_fft=n_fft, hop_length=hop, window="hann", center=False
    )
    filters = mel_filters(rate, n_fft, bins).astype(np.float64)
    mel = np.einsum("cft,fm->tmc", np.abs(spectrum), filters)
    return np.log(np.maximum(mel, FLOOR)).astype(np.float32)

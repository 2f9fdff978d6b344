"""A voice made of pitch, formants and noise, that speaks nonsense syllables.

Source and filter (Fant 1960): a train of glottal pulses plus breath noise is shaped by
the resonances of the vocal tract, here five second-order resonators in cascade

    H(z) = prod_k (1 - B_k - C_k) / (1 - B_k z^-1 - C_k z^-2),
    C_k = -exp(-2 pi b_k / rate),  B_k = 2 exp(-pi b_k / rate) cos(2 pi f_k / rate)

(Klatt 1980) with frequencies f_k and bandwidths b_k of the vowel being spoken. They
glide from vowel to vowel, so the filter is applied to overlapping short blocks. Each
syllable has one envelope; consonants are gaps, hums or hisses at its start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

VOWELS = {
    "a": (730.0, 1090.0, 2440.0),
    "e": (530.0, 1840.0, 2480.0),
    "i": (270.0, 2290.0, 3010.0),
    "o": (570.0, 840.0, 2410.0),
    "u": (300.0, 870.0, 2240.0),
}
"""First three resonances in Hz of a large vocal tract (Peterson and Barney 1952)."""

HIGHER = (3400.0, 4300.0)
BANDWIDTHS = (70.0, 90.0, 140.0, 220.0, 300.0)
GAPS, HUMS, HISSES = ("b", "d", "g"), ("m", "n", "l"), ("s", "sh")
HISS_HZ = {"s": 5600.0, "sh": 3200.0}
ROOM = 3e-4
PEAK = 0.6


@dataclass(frozen=True)
class Voice:
    """How someone sounds.

    Attributes:
        pitch_hz: mean pitch.
        tract: factor on all resonances (a short vocal tract has high ones).
        breath: share of noise in the source, 0 to 1.
        syllables_per_s: speed.
        pan: -1 left to 1 right.
    """

    pitch_hz: float
    tract: float
    breath: float
    syllables_per_s: float
    pan: float


@dataclass(frozen=True)
class Syllable:
    """One consonant and one vowel between two times in seconds."""

    consonant: str
    vowel: str
    start_s: float
    end_s: float
    stress: float

    @property
    def text(self) -> str:
        """As it is written."""
        return self.consonant + self.vowel


def plan(
    rng: np.random.Generator, voice: Voice, seconds: float
) -> tuple[list[Syllable], str]:
    """Choose the syllables of a clip and the words they form."""
    consonants = GAPS + HUMS + HISSES
    syllables: list[Syllable] = []
    words: list[str] = []
    time, left = min(0.03, seconds / 4), 0
    while True:
        length = rng.uniform(0.85, 1.2) / voice.syllables_per_s
        if left == 0:
            left = int(rng.integers(1, 4))
            time += rng.uniform(0.0, 0.1) if words else 0.0
            words.append("")
        if syllables and time + length > seconds:
            break
        consonant = consonants[rng.integers(len(consonants))]
        vowel = "aeiou"[rng.integers(5)]
        stress = rng.uniform(0.55, 1.0)
        end = min(time + length, seconds)
        syllables.append(Syllable(consonant, vowel, time, end, stress))
        words[-1] += syllables[-1].text
        time, left = time + length, left - 1
    return syllables, " ".join(word for word in words if word).capitalize() + "."


def _smooth(x: np.ndarray) -> np.ndarray:
    """0 to 1 with level ends."""
    return 0.5 - 0.5 * np.cos(np.pi * np.clip(x, 0, 1))


def _envelopes(
    syllables: list[Syllable], t: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(loudness of the voiced sound, loudness of each kind of hiss) at times t."""
    voiced = np.zeros_like(t)
    hisses = {name: np.zeros_like(t) for name in HISSES}
    for s in syllables:
        x = (t - s.start_s) / (s.end_s - s.start_s)
        onset = 0.3 if s.consonant in HISSES else 0.12
        bump = _smooth((x - onset) / 0.22) * _smooth((1 - x) / 0.4)
        if s.consonant in HUMS:
            hum = _smooth(x / 0.1) * _smooth((1 - x) / 0.4)
            bump = np.maximum(bump, 0.25 * hum)
        voiced = np.maximum(voiced, s.stress * bump)
        if s.consonant in HISSES:
            hiss = _smooth(x / 0.12) * _smooth((0.42 - x) / 0.15)
            hisses[s.consonant] = np.maximum(hisses[s.consonant], 0.2 * hiss)
    return voiced, hisses


def _pitch(
    rng: np.random.Generator, voice: Voice, syllables: list[Syllable], t: np.ndarray
) -> np.ndarray:
    """Pitch in Hz at times t: falling line, stressed syllables higher, slow jitter."""
    line = np.interp(t, [0.0, max(float(t[-1]), 1e-3)], [1.06, 0.94])
    centres = [(s.start_s + s.end_s) / 2 for s in syllables]
    accents = np.interp(t, centres, [0.91 + 0.12 * s.stress for s in syllables])
    knots = np.arange(0.0, t[-1] + 0.1, 0.05)
    jitter = np.interp(t, knots, rng.normal(1.0, 0.008, knots.size))
    return voice.pitch_hz * line * accents * jitter


def _source(
    rng: np.random.Generator, pitch_hz: np.ndarray, breath: float, rate: int
) -> np.ndarray:
    """Differentiated glottal flow (Rosenberg 1971) plus noise that follows the flow."""
    phase = (rng.uniform() + np.cumsum(pitch_hz) / rate) % 1.0
    opening, closing = 0.40, 0.16
    rising = 0.5 - 0.5 * np.cos(np.pi * phase / opening)
    falling = np.cos(np.pi / 2 * np.clip((phase - opening) / closing, 0, 1))
    flow = np.where(phase < opening, rising, falling)
    pulses = np.diff(flow, prepend=flow[:1])
    noise = rng.normal(0.0, 1.0, flow.size) * (0.3 + 0.7 * flow)
    pulses /= np.sqrt(np.mean(pulses**2)) + 1e-12
    return (1 - breath) * pulses + 0.5 * breath * noise


def _tract_response(
    formants_hz: Float[np.ndarray, "T 5"], rate: int, size: int
) -> np.ndarray:
    """Complex gains [T, size // 2 + 1] of the resonators, of equal loudness."""
    frequencies = np.fft.rfftfreq(size, 1 / rate)
    delay = np.exp(-2j * np.pi * frequencies / rate)
    bandwidth = np.array(BANDWIDTHS)
    c = -np.exp(-2 * np.pi * bandwidth / rate)
    b = 2 * np.sqrt(-c) * np.cos(2 * np.pi * formants_hz / rate)
    gains = np.ones((len(formants_hz), frequencies.size), complex)
    for k in range(formants_hz.shape[1]):
        below = formants_hz[:, k : k + 1] < 0.48 * rate
        bk = b[:, k : k + 1]
        resonator = (1 - bk - c[k]) / (1 - bk * delay - c[k] * delay**2)
        gains *= np.where(below, resonator, 1.0)
    tilt = 1 / (1 + (frequencies / 300) ** 2)
    power = np.sum(np.abs(gains) ** 2 * tilt, axis=1, keepdims=True) / tilt.sum()
    return gains / np.sqrt(power)


def _filtered(
    source: np.ndarray, formants_hz: Float[np.ndarray, "T 5"], hop: int, rate: int
) -> np.ndarray:
    """Overlap-add: block t, centred at t * hop, through the resonators of row t."""
    blocks = len(formants_hz)
    window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * hop) / hop)
    padded = np.pad(source, (hop, (blocks + 1) * hop - source.size))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, 2 * hop)[::hop][:blocks]
    spectrum = np.fft.rfft(pieces * window, 4 * hop)
    response = _tract_response(formants_hz, rate, 4 * hop)
    shaped = np.fft.irfft(spectrum * response, 4 * hop)
    out = np.zeros((blocks + 3, hop))
    for part in range(4):
        out[part : part + blocks] += shaped[:, part * hop : (part + 1) * hop]
    return out.reshape(-1)[hop : hop + source.size]


def _hiss(
    rng: np.random.Generator, samples: int, centre: float, rate: int
) -> np.ndarray:
    """Noise around a centre frequency, with an RMS of 1."""
    spectrum = np.fft.rfft(rng.normal(0.0, 1.0, samples))
    frequencies = np.fft.rfftfreq(samples, 1 / rate)
    centre = min(centre, 0.4 * rate)
    noise = np.fft.irfft(
        spectrum * np.exp(-(((frequencies - centre) / 1300) ** 2)), samples
    )
    return noise / (np.sqrt(np.mean(noise**2)) + 1e-12)


def speak(
    rng: np.random.Generator, voice: Voice, seconds: float, rate: int
) -> tuple[Float32[np.ndarray, "2 N"], str]:
    """Say a few syllables: stereo sound of `seconds` at `rate` Hz, and its text."""
    samples = round(seconds * rate)
    t = np.arange(samples) / rate
    syllables, text = plan(rng, voice, seconds)
    voiced, hisses = _envelopes(syllables, t)
    hop = max(1, round(0.01 * rate))
    centres = [(s.start_s + s.end_s) / 2 for s in syllables]
    targets = np.array([VOWELS[s.vowel] + HIGHER for s in syllables])
    block_times = np.arange(samples // hop + 2) * hop / rate
    tracks = [np.interp(block_times, centres, column) for column in targets.T]
    formants = voice.tract * np.stack(tracks, axis=1)
    source = _source(rng, _pitch(rng, voice, syllables, t), voice.breath, rate)
    mono = voiced * _filtered(source, formants, hop, rate)
    mono /= np.abs(mono).max() + 1e-12
    for name, envelope in hisses.items():
        mono += envelope * 0.5 * _hiss(rng, samples, HISS_HZ[name], rate)
    sides = np.array([[1 - 0.3 * voice.pan], [1 + 0.3 * voice.pan]])
    stereo = sides * mono[None] + rng.normal(0.0, ROOM, (2, samples))
    return (PEAK * stereo / np.abs(stereo).max()).astype(np.float32), text

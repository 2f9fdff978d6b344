"""Sounds as samples and as references.

    wave --audio VAE--> a sample's own latents
    wave --voice hook, audio VAE--> latents as another sample's reference

Without a hook both are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from idlora_jax.data import encode, hook, identity
from idlora_jax.data.encode import Encoders, Wave
from idlora_jax.data.rejection import Rejection
from idlora_jax.data.samples import Place, Reference
from idlora_jax.types import VideoGrid


class Voice(NamedTuple):
    """A sample's sound [T M C], and the same as a reference; None: of no use as one."""

    own: np.ndarray
    clean: np.ndarray | None


class Listener(NamedTuple):
    """The audio VAE and the settings of references."""

    place: Place
    encoders: Encoders

    @property
    def rate(self) -> int:
        """Samples per second of what it takes."""
        return self.encoders.nets.audio_vae.sample_rate

    def latents(self, wave: Wave) -> Float32[np.ndarray, "T M C"]:
        """Latents of sound."""
        nets, params, _ = self.encoders
        return encode.encode_wave(nets.audio_vae, params["audio_vae"], wave)

    def voice(self, wave: Wave, name: str) -> Voice:
        """What is to be known of a sound.

        Raises:
            ValueError: if the voice hook fails.
        """
        own, clean = self.latents(wave), self.place.clean
        if clean is None:
            return Voice(own, own)
        try:
            made = hook.cleaned(clean, wave.samples, self.rate, name)
        except Rejection:
            return Voice(own, None)
        return Voice(own, self.latents(wave._replace(samples=made)))

    def of_file(self, path: Path, start_s: float, grid: VideoGrid) -> Reference:
        """A stretch of a file as reference: as long as a video, or less at its end.

        Raises:
            Rejection: if there is nothing to be heard in it.
            ValueError: if the voice hook fails.
        """
        recorded = encode.recording(path, self.rate)
        wave = encode.wave(
            path, recorded, self.rate, grid, start_s=start_s, whole=False
        )
        found = self.voice(wave, path.name).clean
        if found is None:
            raise Rejection("silent", f"{path}: the voice hook left no sound")
        mark = self.place.marks.voice(identity.of_file(path), start_s, grid)
        return Reference(f"{path.name} from {start_s:.2f} s", mark, found)

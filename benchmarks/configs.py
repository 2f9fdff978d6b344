"""Sizes of transformer and clip that are measured, by name.

`eighth` has every full-size dimension over 8, so that widths, tokens and text stand to
each other as in the published model. Nothing here loads jax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from idlora_jax import config
from idlora_jax.config import Generation, TransformerConfig

SIGMA = 0.7
"""The noise level of every measured step."""
FPS = 25.0


@dataclass(frozen=True)
class Size:
    """A transformer and a clip.

    Attributes:
        name: what the command line calls it.
        layers: L.
        heads: N of both modalities.
        head_dims: K of video and audio.
        caption: width of text features before the projection of generation 2.0.
        stg: the layer whose self-attention a guidance pass skips.
        grid: latent frames, height, width; the first frame is given.
        reference: audio tokens of the reference voice.
        audio: audio tokens that are made.
        text: tokens of a prompt.
        rank: R of the trained adapter.
    """

    name: str
    layers: int
    heads: int
    head_dims: tuple[int, int]
    caption: int
    stg: int
    grid: tuple[int, int, int]
    reference: int
    audio: int
    text: int
    rank: int = 16

    @property
    def video(self) -> int:
        """Number of video tokens."""
        frames, height, width = self.grid
        return frames * height * width

    def section(self, generation: Generation) -> dict[str, Any]:
        """The `transformer` section of a checkpoint of this size."""
        video, audio = (self.heads * dim for dim in self.head_dims)
        return config.tiny_section(generation) | {
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dims[0],
            "cross_attention_dim": video,
            "audio_num_attention_heads": self.heads,
            "audio_attention_head_dim": self.head_dims[1],
            "audio_cross_attention_dim": audio,
            "caption_channels": self.caption,
        }

    def transformer(self, generation: Generation) -> TransformerConfig:
        """The transformer of this size."""
        return config.transformer_config({"transformer": self.section(generation)})


_EIGHTH: dict[str, Any] = {
    "heads": 8,
    "head_dims": (64, 32),
    "caption": 480,
    "grid": (8, 8, 8),
    "reference": 16,
    "audio": 15,
    "text": 128,
}

SIZES = {
    size.name: size
    for size in (
        Size("tiny", 4, 4, (16, 8), 48, 2, (2, 2, 2), 3, 4, 6, rank=4),
        Size("eighth", layers=16, stg=10, **_EIGHTH),
        Size("eighth48", layers=48, stg=29, **_EIGHTH),
        Size("quarter", 8, 16, (64, 32), 960, 5, (16, 8, 8), 32, 30, 256, rank=32),
        Size(
            "full", 48, 32, (128, 64), 3840, 29, (16, 16, 16), 126, 121, 1024, rank=128
        ),
    )
}
"""`tiny` for tests, `eighth` and `quarter` for CPUs, `full` for a GPU: 512 x 512 pixels
and 121 frames of the published models."""

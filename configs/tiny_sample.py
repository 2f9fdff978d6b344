"""A clip from the tiny model: the whole path of `sample.py` in a minute on two cores.

Origin: the one-stage script of ID-LoRA (text guidance 3 and 7, identity 3, STG 1,
bimodal 3, 30 Euler steps) at a tiny size; STG skips the tiny model's last layer, and
the passes of a step run as one batch, which compiles fastest.
Hardware: any CPU. Result: noise, since the tiny model's weights are random. The
negative prompt is our own short one; give the published one by --negative-prompt.

    python sample.py --config configs/tiny_sample.py --reference-audio ref.wav \
        --first-frame face.png --output-dir out/

The values stand in idlora_jax/presets.py, which the demo reads too.
"""

from idlora_jax import presets
from idlora_jax.sample_config import SampleConfig


def get_config() -> SampleConfig:
    return presets.tiny_sample()

"""ID-LoRA on the tiny model and the demo's clips: the whole path of `train.py`.

Origin: `audio_ref_only_ic` of ID-LoRA's training_celebvhq.yaml (18 modules a layer,
alpha = rank, learning rate falling linearly to a tenth, clip 1.0, first frame given
with probability 0.9, both masks on, negative reference positions) at a tiny size: rank
8 and a learning rate for 60 steps instead of thousands.
Hardware: any CPU, about a minute on two cores. Result: the held-out audio loss falls;
the clips it samples stay noise, since the tiny model's weights are random.

    python train.py --config configs/tiny.py

The values stand in idlora_jax/presets.py, which the demo reads too.
"""

from idlora_jax import presets
from idlora_jax.experiment import TrainConfig


def get_config() -> TrainConfig:
    return presets.tiny_train()

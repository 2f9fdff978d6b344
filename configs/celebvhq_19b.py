"""ID-LoRA for LTX-2 19B on CelebV-HQ, with the published settings.

Origin: ID-LoRA/configs/training_celebvhq.yaml (arXiv 2603.10256): rank = alpha = 128,
18 modules a layer, 6000 steps of 4 clips of 121 frames at 512 x 512, AdamW (there in 8
bits) at 2e-4 falling to a tenth. The data set has 2963 pairs.
Hardware: 63 GB of a device's memory by the plan of --dry-run, so one of 80 GB. Not run
by us: no expected loss.

    python train.py --config configs/celebvhq_19b.py --base ltx-2-19b-dev.safetensors \
        --data datasets/celebvhq_preprocessed --output outputs/celebvhq
"""

from pathlib import Path

from idlora_jax.assumed import Assume
from idlora_jax.experiment import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        base=Path("ltx-2-19b-dev.safetensors"),
        data=Path("datasets/celebvhq_preprocessed"),
        output=Path("outputs/celebvhq"),
        generation="2.0",
        steps=6000,
        batch_size=4,
        seed=42,
        save_every=200,
        keep=2,
        assume=Assume(clips=2963),
    )

"""ID-LoRA for LTX-2 19B on TalkVid, with the published settings.

Origin: ID-LoRA/configs/training_talkvid.yaml (arXiv 2603.10256): as for CelebV-HQ, but
4 clips a step one after the other (batch 1, accumulated) and AdamW with moments in 8
bits. There the base is in int8, too. The data set has 11470 pairs.
Hardware: 55 GB of a device's memory by the plan of --dry-run, so one of 80 GB. Not run
by us: no expected loss.

    python train.py --config configs/talkvid_19b.py --base ltx-2-19b-dev.safetensors \
        --data datasets/talkvid_preprocessed --output outputs/talkvid
"""

from pathlib import Path

from idlora_jax.assumed import Assume
from idlora_jax.experiment import Optimizer, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        base=Path("ltx-2-19b-dev.safetensors"),
        data=Path("datasets/talkvid_preprocessed"),
        output=Path("outputs/talkvid"),
        generation="2.0",
        optimizer=Optimizer(name="adamw8bit", accumulation=4),
        steps=6000,
        batch_size=1,
        seed=42,
        save_every=200,
        keep=3,
        assume=Assume(clips=11470),
    )

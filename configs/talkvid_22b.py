"""ID-LoRA for LTX-2.3 22B on TalkVid, with the published settings.

Origin: ID-LoRA-2.3/configs/training_talkvid.yaml (arXiv 2603.10256), which differs from
that of LTX-2 in the base alone; noise levels are drawn by the sampler of 2.3, as its
trainer does. 3000 steps, since the published adapters were trained for so many (their
README; the YAML says 6000). 4 clips a step one after the other, moments in 8 bits.
Text features are those of 2.3: preprocess the clips with this base.
Hardware: 59 GB of a device's memory by the plan of --dry-run, so one of 80 GB. Not run
by us: no expected loss.

    python train.py --config configs/talkvid_22b.py --base ltx-2.3-22b-dev.safetensors \
        --data datasets/talkvid_preprocessed_22b --output outputs/talkvid_22b
"""

from pathlib import Path

from idlora_jax.assumed import Assume
from idlora_jax.experiment import Optimizer, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        base=Path("ltx-2.3-22b-dev.safetensors"),
        data=Path("datasets/talkvid_preprocessed_22b"),
        output=Path("outputs/talkvid_22b"),
        generation="2.3",
        optimizer=Optimizer(name="adamw8bit", accumulation=4),
        steps=3000,
        batch_size=1,
        seed=42,
        save_every=200,
        keep=3,
        assume=Assume(clips=11470),
    )

"""ID-LoRA for LTX-2 19B over 16 devices on several hosts, one process each.

Origin: the settings of `celebvhq_19b`, with a batch of 16 clips instead of 4 and, since
a step sees four times as many, a quarter of the steps: not a published recipe.
Hardware: 18 GB of each device's memory by the plan of --dry-run, 9.5 of them its share
of the base, on 2 hosts of 8 devices (or any hosts with 16 together). Not run by us at
this size: no expected loss.

    srun --nodes 2 --ntasks-per-node 1 python train.py --config configs/multi_host.py \
        --base ltx-2-19b-dev.safetensors --data latents/ --output outputs/many

More in docs/scaling.md.
"""

from pathlib import Path

from idlora_jax.experiment import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        base=Path("ltx-2-19b-dev.safetensors"),
        data=Path("datasets/celebvhq_preprocessed"),
        output=Path("outputs/celebvhq_many"),
        generation="2.0",
        steps=1500,
        batch_size=16,
        seed=42,
        save_every=100,
        keep=2,
        mesh="data=4,fsdp=4",
    )

"""ID-LoRA for LTX-2 19B on one card of 32 GB.

Origin: ours, after the published recipe (configs/celebvhq_19b.py): the same targets,
steps and effective batch. The base is the published fp8 file, kept in 8 bits; one clip
at a time, four a step; moments of AdamW in 8 bits; rank 32 instead of 128, since
adapter, gradients and their sum are all in float32.
Hardware: 31 GB of a device's memory by the plan of --dry-run, of which a card of 32 GiB
has 32.6 to give with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. Not run by us: no expected
loss.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python train.py --config configs/low_memory.py \
        --base ltx-2-19b-dev-fp8.safetensors --data latents/ --output outputs/mine
"""

from pathlib import Path

from idlora_jax.assumed import Assume
from idlora_jax.experiment import HeldOut, Lora, Optimizer, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        base=Path("ltx-2-19b-dev-fp8.safetensors"),
        data=Path("latents"),
        output=Path("outputs/low_memory"),
        generation="2.0",
        lora=Lora(rank=32, alpha=32.0),
        optimizer=Optimizer(name="adamw8bit", accumulation=4),
        steps=6000,
        batch_size=1,
        seed=42,
        save_every=200,
        weights="keep",
        heldout=HeldOut(clips=1),
        assume=Assume(memory_gb=32.6),
    )

"""The two tiny experiments, shared by configs/ and the demo.

Both expect what the demo writes: `checkpoint/` and `latents/` in one folder.
"""

from __future__ import annotations

from pathlib import Path

from idlora_jax.experiment import Lora, Optimizer, TrainConfig
from idlora_jax.sample_config import Guidance, SampleConfig

CHECKPOINT, LATENTS = "checkpoint", "latents"
BASE, TEXT_ENCODER = f"{CHECKPOINT}/ltx-2-tiny.safetensors", f"{CHECKPOINT}/gemma"
TRAIN, SAMPLE = "train", "sample"


def tiny_train(folder: Path = Path("outputs/demo")) -> TrainConfig:
    """Rank 8 and a learning rate for 60 steps instead of thousands."""
    return TrainConfig(
        base=folder / BASE,
        data=folder / LATENTS,
        output=folder / TRAIN,
        lora=Lora(rank=8, alpha=8.0),
        optimizer=Optimizer(learning_rate=5e-3),
        steps=60,
        batch_size=2,
        save_every=30,
        dtype="float32",
    )


def tiny_sample(folder: Path = Path("outputs/demo")) -> SampleConfig:
    """One second of 64 x 64; STG skips the tiny model's last layer."""
    return SampleConfig(
        base=folder / BASE,
        text_encoder=folder / TEXT_ENCODER,
        prompt="[VISUAL]: A person faces the camera and talks. "
        "[SPEECH]: Good morning, how are you? [SOUNDS]: A quiet room.",
        output_dir=folder / SAMPLE,
        frames=25,
        height=64,
        width=64,
        guidance=Guidance(stg_layer=3),
        dtype="float32",
    )

"""A clip of 121 frames at 1024 x 1024 from LTX-2.3 22B: two stages.

Origin: ID-LoRA-2.3/scripts/inference_two_stage.py: at 512 x 512 as in one stage, then
the latents are doubled and refined in three steps with the distilled LoRA at 0.8,
without guidance, the sound as it is.
Hardware: The transformer alone is 38 GB in bfloat16. Not run by us: no expected result.

    python sample.py --config configs/sample_two_stage_22b.py \
        --lora adapter.safetensors --reference-audio voice.wav --first-frame face.png \
        --prompt "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..." --output-dir out/
"""

from pathlib import Path

from idlora_jax.sample_config import SampleConfig


def get_config() -> SampleConfig:
    return SampleConfig(
        base=Path("ltx-2.3-22b-dev.safetensors"),
        text_encoder=Path("gemma-3-12b-it"),
        plan="two_stage",
        upsampler=Path("ltx-2.3-spatial-upscaler-x2-1.1.safetensors"),
        distilled_lora=Path("ltx-2.3-22b-distilled-lora-384.safetensors"),
    )

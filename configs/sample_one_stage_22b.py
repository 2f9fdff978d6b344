"""A clip of 121 frames at 512 x 512 from LTX-2.3 22B, with the published settings.

Origin: ID-LoRA-2.3/scripts/inference_one_stage.py: text guidance 3 and 7, identity 3,
STG 1 at layer 29, bimodal 3, 30 Euler steps. The negative prompt is our own short one;
give the published one by --negative-prompt.
Hardware: The transformer alone is 38 GB in bfloat16. Not run by us: no expected result.

    python sample.py --config configs/sample_one_stage_22b.py \
        --lora adapter.safetensors --reference-audio voice.wav --first-frame face.png \
        --prompt "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..." --output-dir out/
"""

from pathlib import Path

from idlora_jax.sample_config import SampleConfig


def get_config() -> SampleConfig:
    return SampleConfig(
        base=Path("ltx-2.3-22b-dev.safetensors"),
        text_encoder=Path("gemma-3-12b-it"),
    )

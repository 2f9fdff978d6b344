"""A clip of 121 frames at 512 x 512 from LTX-2 19B in eight steps.

Origin: ltx_pipelines/utils/constants.py: DISTILLED_SIGMA_VALUES. The distilled LoRA at
1 on the development checkpoint, no text guidance; identity guidance is an option
(--guidance.identity 3), which doubles the passes.
Hardware: The transformer alone is 38 GB in bfloat16. Not run by us: no expected result.

    python sample.py --config configs/sample_distilled_19b.py \
        --lora adapter.safetensors --reference-audio voice.wav --first-frame face.png \
        --prompt "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..." --output-dir out/
"""

from pathlib import Path

from idlora_jax.sample_config import Guidance, SampleConfig


def get_config() -> SampleConfig:
    return SampleConfig(
        base=Path("ltx-2-19b-dev.safetensors"),
        text_encoder=Path("gemma-3-12b-it"),
        plan="distilled",
        distilled_lora=Path("ltx-2-19b-distilled-lora-384.safetensors"),
        guidance=Guidance(
            video_cfg=1.0, audio_cfg=1.0, identity=0.0, stg=0.0, bimodal=1.0
        ),
    )

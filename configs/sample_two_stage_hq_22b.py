"""A clip of 121 frames at 1024 x 1024 from LTX-2.3 22B: two stages of res_2s.

Origin: ID-LoRA-2.3/scripts/inference_two_stage_hq.py: 15 steps of two model calls, a
schedule that counts tokens, text guidance in its star form, no STG; the distilled LoRA
at 0.25, then at 0.5 for the refinement.
Hardware: The transformer alone is 38 GB in bfloat16. Not run by us: no expected result.

    python sample.py --config configs/sample_two_stage_hq_22b.py \
        --lora adapter.safetensors --reference-audio voice.wav --first-frame face.png \
        --prompt "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..." --output-dir out/
"""

from pathlib import Path

from idlora_jax.sample_config import Guidance, SampleConfig


def get_config() -> SampleConfig:
    return SampleConfig(
        base=Path("ltx-2.3-22b-dev.safetensors"),
        text_encoder=Path("gemma-3-12b-it"),
        plan="two_stage_hq",
        upsampler=Path("ltx-2.3-spatial-upscaler-x2-1.1.safetensors"),
        distilled_lora=Path("ltx-2.3-22b-distilled-lora-384.safetensors"),
        steps=15,
        guidance=Guidance(stg=0.0, stg_layer=28, video_star=True, audio_star=True),
    )

"""Sample a clip: a face and a voice from a picture, a recording and a prompt.

    python sample.py --config configs/tiny_sample.py --lora adapter.safetensors \
        --reference-audio ref.wav --first-frame face.png \
        --prompt "[VISUAL]: ... [SPEECH]: ... [SOUNDS]: ..." --output-dir out/

Writes <name>.mp4, <name>.wav and <name>.json (every setting, hashes, "synthetic": true)
into the output folder. Wrong usage ends with status 2, a failure with status 1.
"""

from __future__ import annotations

import sys

from tqdm import tqdm

from idlora_jax import commandline
from idlora_jax.sample_config import SampleConfig


def main() -> None:
    """Check the inputs, sample, write."""
    config = commandline.parse(sys.argv[1:], SampleConfig)
    # Imports jax: later than the command line, so that its mistakes answer at once.
    from idlora_jax import sampling

    job, inputs = sampling.check(config)
    for line in job.warnings:
        print(f"warning: {line}", file=sys.stderr)
    total = sum(stage.sigmas.steps for stage in job.plan.stages)
    with tqdm(total=total, unit="step", disable=not config.progress) as bar:
        step = (lambda *_: bar.update()) if config.progress else None
        result, seconds = sampling.generate(job, inputs, step)
    for path in sampling.write(job, result, seconds):
        print(path)


if __name__ == "__main__":
    commandline.guarded(main)

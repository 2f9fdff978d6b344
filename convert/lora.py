"""Check a LoRA file against a checkpoint, and rewrite it with metadata.

    python convert/lora.py id-lora.safetensors ltx-2-19b-dev.safetensors
    python convert/lora.py id-lora.safetensors ltx-2-19b-dev.safetensors \
        --output id-lora-half.safetensors --strength 0.5

Keys are those that ComfyUI reads (diffusion_model.<module>.lora_A.weight) in both
files. A file of which any key does not fit is refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax.numpy as jnp

from idlora_jax.weights import adapter_files

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(
        "convert/lora.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="the LoRA file (.safetensors)")
    parser.add_argument("base", help="the checkpoint: original file or folder")
    parser.add_argument("--output", help="where to write it (default: only check)")
    parser.add_argument("--strength", type=float, default=1.0, help="scales the change")
    parser.add_argument("--alpha", type=float, help="scales it by alpha / rank")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    args = parser.parse_args(argv)
    changes = args.strength != 1.0 or args.alpha is not None or args.dtype
    if changes and args.output is None:
        parser.error("--strength, --alpha and --dtype need --output")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check and rewrite; 0 on success, 1 with one message on failure."""
    args = arguments(argv)
    try:
        adapter_files.rewrite(
            args.source,
            args.base,
            args.output,
            strength=args.strength,
            alpha=args.alpha,
            dtype=DTYPES.get(args.dtype),
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Check a LoRA file against a checkpoint, and write it in the format of another tool.

    python convert/lora.py id-lora.safetensors ltx-2-19b-dev.safetensors --check
    python convert/lora.py peft-folder ltx-2-19b-dev.safetensors --output x.safetensors
    python convert/lora.py lora.safetensors ltx-2-19b-dev.safetensors \
        --output for-diffusers.safetensors --format diffusers --strength 0.5

Files of ComfyUI and Lightricks, PEFT, diffusers and kohya are recognised by their keys;
alpha is folded in. A file of which any key does not fit the checkpoint is refused.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from idlora_jax.commandline import DTYPES, status_of
from idlora_jax.weights import adapter_files
from idlora_jax.weights.lora_names import FORMATS


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(
        "convert/lora.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="the LoRA: file, or folder of PEFT or diffusers")
    parser.add_argument("base", help="the checkpoint: original file or folder")
    parser.add_argument("--output", help="where to write it (default: only check)")
    parser.add_argument(
        "--format", choices=FORMATS, help="of the output (default: comfyui)"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="scales the change")
    parser.add_argument(
        "--alpha", type=float, help="scales it by alpha / rank, if the file says none"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument(
        "--allow-partial", action="store_true", help="leave out keys that fit nothing"
    )
    parser.add_argument("--check", action="store_true", help="read headers alone")
    args = parser.parse_args(argv)
    if args.check and args.output is not None:
        parser.error("--check writes nothing; leave out --output")
    if not all(math.isfinite(x) for x in (args.strength, args.alpha or 0.0)):
        parser.error("--strength and --alpha must be finite numbers")
    changes = args.strength != 1.0 or args.alpha is not None or args.dtype
    if (changes or args.format) and args.output is None:
        parser.error("--format, --strength, --alpha and --dtype need --output")
    return args


def work(args: argparse.Namespace) -> None:
    """Check or rewrite, as the command line says."""
    if args.check:
        partial = args.allow_partial
        adapter_files.check(args.source, args.base, allow_partial=partial)
        return
    wanted = adapter_files.Wanted(
        format=args.format or "comfyui",
        strength=args.strength,
        alpha=args.alpha,
        dtype=DTYPES.get(args.dtype),
        allow_partial=args.allow_partial,
    )
    adapter_files.rewrite(args.source, args.base, args.output, wanted)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script: 0 on success, 1 with one message on failure, 2 on wrong usage."""
    args = arguments(argv)
    return status_of(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())

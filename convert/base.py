"""Convert an LTX-2 checkpoint to this library's folder, or back.

    python convert/base.py ltx-2-19b-dev.safetensors checkpoints/ltx-2-19b
    python convert/base.py --export checkpoints/ltx-2-19b ltx-2-19b.safetensors

The folder loads faster than the original file, and holds the parameters stacked by
layer. Nothing is downloaded; torch is not needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax.numpy as jnp

from idlora_jax.weights import convert
from idlora_jax.weights.io import NETWORKS

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(
        "convert/base.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="the original file; with --export the folder")
    parser.add_argument("destination", help="the folder; with --export the file")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        metavar="NAME",
        help=f"only these of {', '.join(NETWORKS)}",
    )
    parser.add_argument("--export", action="store_true", help="folder to original file")
    args = parser.parse_args(argv)
    if args.export and (args.dtype or args.networks):
        parser.error("--export writes what the folder holds; it takes no other option")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Convert or export; 0 on success, 1 with one message on failure."""
    args = arguments(argv)
    try:
        if args.export:
            convert.export_base(args.source, args.destination)
        else:
            dtype = DTYPES.get(args.dtype)
            names = args.networks
            convert.convert_base(args.source, args.destination, dtype, networks=names)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

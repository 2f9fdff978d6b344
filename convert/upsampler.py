"""Convert a latent upsampler to this library's file, check it, or convert it back.

    python convert/upsampler.py ltx-2-spatial-upscaler-x2-1.0.safetensors x2.safetensors
    python convert/upsampler.py --check ltx-2-spatial-upscaler-x2-1.0.safetensors
    python convert/upsampler.py --verify x2.safetensors
    python convert/upsampler.py --export x2.safetensors original.safetensors

The source is an original file, or diffusers' latent_upsampler folder. Nothing is
downloaded; torch is not needed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from idlora_jax.commandline import (
    DTYPES,
    FAILURE,
    converter,
    converting,
    status_of,
)
from idlora_jax.weights import upsampler_check, upsampler_files


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = converter(
        "convert/upsampler.py",
        __doc__,
        source="the upsampler; with --export a converted one",
        destination="the file to be made",
        export="back to original names",
    )
    args = converting(parser, argv)
    if args.export and args.dtype:
        parser.error("a file is exported as it was: no --dtype")
    return args


def look(args: argparse.Namespace) -> int:
    """Report what a file holds; status 1 if it is not whole."""
    found = upsampler_check.report(args.source)
    print(found)
    if args.verify and found.complete:
        upsampler_check.verify(args.source)
        print("every byte is as it was written")
    return 0 if found.complete else FAILURE


def work(args: argparse.Namespace) -> int:
    """Check, convert or export, as the command line says."""
    if args.check or args.verify:
        return look(args)
    if args.export:
        upsampler_files.export_upsampler(args.source, args.destination)
    else:
        dtype = DTYPES.get(args.dtype)
        upsampler_files.convert_upsampler(args.source, args.destination, dtype)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script: 0 on success, 1 with one message on failure, 2 on wrong usage."""
    args = arguments(argv)
    return status_of(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())

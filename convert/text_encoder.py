"""Convert the text encoder (Gemma-3) to this library's folder, or check it.

    python convert/text_encoder.py gemma-3-12b-it checkpoints/gemma-3-12b
    python convert/text_encoder.py --check gemma-3-12b-it
    python convert/text_encoder.py --verify checkpoints/gemma-3-12b

The source is a folder as transformers writes it, or a pipeline of diffusers that holds
one. The folder that is made loads faster; it has the text tower alone, stacked by
layer, and the tokenizer. Nothing is downloaded; torch is not needed. A conversion that
was stopped goes on when it is run again, and says so when it is finished already.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from idlora_jax.commandline import DTYPES, status_of
from idlora_jax.weights import text_encoder_files


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(
        "convert/text_encoder.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="the folder with config.json and the weights")
    parser.add_argument("destination", nargs="?", help="the folder to be made")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--check", action="store_true", help="read the headers, report")
    way.add_argument("--verify", action="store_true", help="read all, compare hashes")
    args = parser.parse_args(argv)
    looks = args.check or args.verify
    if looks == (args.destination is not None):
        one, two = "--check and --verify take one path", "expected two paths"
        parser.error(f"{one if looks else two}: see --help")
    if looks and args.dtype:
        parser.error("--dtype is for converting")
    return args


def work(args: argparse.Namespace) -> int:
    """Check, verify or convert, as the command line says."""
    if args.check or args.verify:
        print(text_encoder_files.open_text_encoder(args.source))
    if args.verify:
        text_encoder_files.verify(args.source)
        print("every byte is as it was written")
    if args.destination is not None:
        dtype = DTYPES.get(args.dtype)
        text_encoder_files.convert_text_encoder(args.source, args.destination, dtype)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script: 0 on success, 1 with one message on failure, 2 on wrong usage."""
    args = arguments(argv)
    return status_of(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())

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

from idlora_jax.commandline import DTYPES, converter, converting, status_of
from idlora_jax.weights import text_encoder_files


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = converter(
        "convert/text_encoder.py",
        __doc__,
        source="the folder with config.json and the weights",
        destination="the folder to be made",
    )
    return converting(parser, argv)


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

"""Convert an LTX-2 checkpoint to this library's folder, check it, or convert it back.

    python convert/base.py ltx-2-19b-dev.safetensors checkpoints/ltx-2-19b
    python convert/base.py --check ltx-2-19b-dev.safetensors
    python convert/base.py --verify checkpoints/ltx-2-19b
    python convert/base.py --export checkpoints/ltx-2-19b ltx-2-19b.safetensors
    python convert/base.py --export --format diffusers checkpoints/ltx-2-19b LTX-2

The folder loads faster than the original file, and holds the parameters stacked by
layer. Nothing is downloaded; torch is not needed. A conversion that was stopped goes on
when it is run again, and says so when it is finished already.
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
from idlora_jax.weights import check, convert, diffusers_folder, io


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = converter(
        "convert/base.py",
        __doc__,
        source="the original file or diffusers' folder; to export, the folder",
        destination="the folder; with --export the file",
        export="folder to --format",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=io.NETWORKS,
        metavar="NAME",
        help=f"only these of {', '.join(io.NETWORKS)}",
    )
    parser.add_argument(
        "--weights",
        choices=("keep", "upcast", "int8"),
        help="kernels stored in 8 bits: as they are (default), or times their scales; "
        "or all kernels of the transformer's blocks in int8",
    )
    parser.add_argument(
        "--format",
        choices=("original", "diffusers"),
        help="of an export: a single file (default), or a folder of diffusers",
    )
    parser.add_argument(
        "--distilled",
        action="store_true",
        help="for --format diffusers: the noise levels are those of a distilled model",
    )
    args = converting(parser, argv)
    refuse(parser, args)
    return args


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where options do not go together."""
    looks = args.check or args.verify
    foreign = args.export and args.format == "diffusers"
    if (args.format and not args.export) or (args.distilled and not foreign):
        parser.error("--format goes with --export, --distilled with --format diffusers")
    changes = args.dtype or args.networks
    if (args.weights and args.export) or (looks and (changes or args.weights)):
        parser.error("--dtype, --weights and --networks are for writing")
    if changes and args.export and not foreign:
        parser.error("a single file is exported as it was: no --dtype, no --networks")


def look(args: argparse.Namespace) -> int:
    """Report what a checkpoint holds; status 1 if it is not whole."""
    found = check.report(args.source)
    print(found)
    if args.verify and found.complete:
        check.verify_watched(io.open_base(args.source))
        print("every byte is as it was written")
    return 0 if found.complete else FAILURE


def work(args: argparse.Namespace) -> int:
    """Check, convert or export, as the command line says."""
    if args.check or args.verify:
        return look(args)
    paths, dtype = (args.source, args.destination), DTYPES.get(args.dtype)
    options = {"networks": args.networks}
    if args.export and args.format == "diffusers":
        options |= {"distilled": args.distilled}
        diffusers_folder.export_diffusers(*paths, dtype, **options)
    elif args.export:
        convert.export_base(*paths)
    else:
        convert.convert_base(*paths, dtype, weights=args.weights or "keep", **options)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script: 0 on success, 1 with one message on failure, 2 on wrong usage."""
    args = arguments(argv)
    return status_of(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())

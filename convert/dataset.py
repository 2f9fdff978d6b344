"""Convert a published latent data set to ArrayRecord files of TFDS, or check it.

    python convert/dataset.py --check data/celebvhq
    python convert/dataset.py data/celebvhq data/tfds --name idlora_celebvhq
    python convert/dataset.py clips/latents data/tfds --name my_clips --dtype bf16

The source is a folder with latents/, conditions/, audio_latents/ and reference_audio_
latents/ (or audio_latents_clean/), of .pt or .safetensors files; or .tar or .tar.zst
archives of these, which are not unpacked. Nothing in the files is run; torch and
TensorFlow are not needed. A conversion that was stopped goes on when it is run again,
and says so when it is finished already.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from idlora_jax.commandline import DTYPES, FAILURE, status_of

NAME = "[a-z][a-z0-9_]*"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(
        "convert/dataset.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="folder, archive, or their folder")
    parser.add_argument(
        "destination", nargs="?", type=Path, help="where TFDS data sets lie (data_dir)"
    )
    parser.add_argument(
        "--name",
        help="idlora_celebvhq, idlora_talkvid, or another (default: idlora_folder)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--check", action="store_true", help="read all files, report")
    parser.add_argument("--speakers", help="a .jsonl file that says who speaks where")
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out clips that are broken"
    )
    args = parser.parse_args(argv)
    if args.check == bool(args.destination):
        one, two = "--check takes one path", "expected source and destination"
        parser.error(f"{one if args.check else two}: see --help")
    if args.check and (args.dtype or args.skip_broken or args.name):
        parser.error("--name, --dtype and --skip-broken are for converting")
    if not re.fullmatch(NAME, args.name or "idlora_folder"):
        parser.error("--name takes small letters, digits and underscores")
    return args


def work(args: argparse.Namespace) -> int:
    """Check or convert, as the command line says."""
    from idlora_jax.data import sources, speakers, tfds_plan, tfds_writer

    known = speakers.read(args.speakers) if args.speakers else None
    if args.check:
        found = tfds_writer.check(sources.open_source(args.source), known)
        print(found)
        return FAILURE if found.broken else 0
    options = tfds_plan.Options(
        args.destination,
        args.name or "idlora_folder",
        DTYPES.get(args.dtype),
        skip_broken=args.skip_broken,
    )
    done = tfds_writer.finished(options)
    if done is not None:
        print(f"{done.folder}: finished already, {done.clips:,} clips; nothing to do")
        return 0
    done = tfds_writer.convert(sources.open_source(args.source), options, known)
    print(f"{done.folder}: {done.clips:,} clips, {done.written} shards written now")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script: 0 on success, 1 with one message on failure, 2 on wrong usage."""
    args = arguments(argv)
    return status_of(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())

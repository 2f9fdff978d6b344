"""Checking a LoRA file against a base, and writing it again in another format.

    check(source, base)    headers alone: what fits, what does not, in a moment
    rewrite(...)           every tensor: factors folded, in the format asked for

Nothing is stacked and memory holds one tensor, so that what goes in and out unscaled is
the same bit by bit: ranks, layers that are left out, dtypes.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idlora_jax import __version__
from idlora_jax.files import PathLike, problem
from idlora_jax.types import Tree
from idlora_jax.weights import (
    io,
    lora,
    lora_files,
    lora_formats,
    lora_match,
    lora_names,
)
from idlora_jax.weights.bases import BaseFile
from idlora_jax.weights.lora import Item
from idlora_jax.weights.lora_files import LoraFile
from idlora_jax.weights.lora_match import Pair, Report
from idlora_jax.weights.lora_names import Format
from idlora_jax.weights.progress import Progress, bar, silent

Say = Callable[[str], Any]


@dataclass(frozen=True)
class Wanted:
    """What is to be made of a file.

    Attributes:
        format: key names and settings, see `lora_formats`.
        strength: folded into lora_B.
        alpha: alpha / rank is folded into lora_B, for files that say no alpha.
        dtype: of the tensors (None: as stored).
        allow_partial: leave out what fits nothing, or has no name in the format.
    """

    format: Format = "comfyui"
    strength: float = 1.0
    alpha: float | None = None
    dtype: Any | None = None
    allow_partial: bool = False


class Checked(NamedTuple):
    """A LoRA file beside its base, and what they are to each other."""

    file: LoraFile
    base: BaseFile
    report: Report


def _bases(base: BaseFile) -> dict[str, Tree]:
    held = io.names_in(base)
    if "transformer" not in held:
        got, do = f"a base of {[*held]}", "give one with its transformer"
        raise problem("lora", base.path, got, "one with a transformer", do)
    return {n: io.shapes(base, n) for n in lora_files.NETWORKS if n in held}


def _count(names: list[Any]) -> str:
    counts = collections.Counter(names)
    if len(counts) == 1:
        return str(names[0])
    shown = [f"{name} ({n})" for name, n in counts.most_common(4)]
    return ", ".join(shown + ["..."] * (len(counts) > 4))


def _told(found: Checked, say: Say) -> None:
    """What a person wants to know first, in a few lines."""
    file, base, report = found
    say(f"{file.path}: {report}")
    if report.pairs:
        specs = [file.tensors.specs[p.a] for p in report.pairs]
        size = sum(spec.nbytes for spec in file.tensors.specs.values())
        parts = _count([p.slot.module.network for p in report.pairs])
        say(
            f"  {' and '.join(report.formats)} keys, {len(report.pairs)} modules of "
            f"{parts}, rank {_count([p.rank for p in report.pairs])}, "
            f"{_count([spec.dtype.name for spec in specs])}, {size / 1e9:.3g} GB"
        )
    for why, bad in (("unmatched", report.unmatched), ("shape", report.wrong_shape)):
        if bad:
            say(f"  {why}:{lora_match.examples(bad)}")
    for note in file.notes:
        say(f"  note: {note}")
    if report.pairs and not (file.recorded.get("generation") or report.generation):
        said = f"this base is of {base.generation}"
        say(f"  note: the file does not say its generation, {said}")


def _require_generation(found: Checked) -> None:
    file, base, report = found
    said = file.recorded.get("generation")
    spoken = report.generation if report.bad else ""
    for generation, how in ((said, ""), (spoken, " by its modules")):
        if generation not in (None, "", base.generation):
            got = f"an adapter of {generation}{how}"
            expected = f"one of {base.generation}, as {base.path.name}"
            do = "use a base of its generation"
            raise problem("lora", file.path, got, expected, do)


def check(
    source: PathLike,
    base_path: PathLike,
    *,
    allow_partial: bool = False,
    say: Say = print,
) -> Checked:
    """Compare a LoRA file with a base; headers are read, and no tensor.

    Args:
        source: a file, or the folder that PEFT or diffusers makes.
        base_path: the base it is for: original file or converted folder.
        allow_partial: accept keys that fit nothing, if others do.
        say: takes lines about what was found.

    Raises:
        ValueError: if something fits nothing, is of the other generation, or is broken.
    """
    base = io.open_base(base_path)
    file = lora_files.open_lora(source)
    try:
        report = lora_match.match(file.tensors.specs, _bases(base))
        found = Checked(file, base, report)
        _told(found, say)
        _require_generation(found)
        lora.require(report, allow_partial)
        for pair in report.pairs:
            if pair.alpha is None:  # of the others, the alphas are tensors
                lora_files.factor(file, pair)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(source) in text else f"{source}: {text}") from None
    return found


def _items(
    file: LoraFile,
    pairs: Sequence[Pair],
    wanted: Wanted,
    *,
    progress: Progress = silent,
    changed: list[str] | None = None,
) -> list[Item]:
    """Pairs to be written, read one tensor at a time when they are.

    Keys of lora_B that are not all zero are appended to `changed`.
    """

    def read(key: str, scale: float, dtype: Any) -> np.ndarray:
        found = lora_files.tensor(file, key)
        out = lora_files.folded(found, scale, dtype, f"{file.path}: {key}")
        progress(out.nbytes)
        return out

    def read_b(pair: Pair, dtype: Any) -> np.ndarray:
        own = 1.0 if wanted.alpha is None else wanted.alpha / pair.rank
        scale = wanted.strength * own * lora_files.factor(file, pair)
        found = read(pair.b, scale, dtype)
        if changed is not None and found.any():
            changed.append(pair.b)
        return found

    def item(pair: Pair) -> Item:
        a, b = (file.tensors.specs[key] for key in (pair.a, pair.b))
        if wanted.dtype is not None:
            a, b = (x._replace(dtype=np.dtype(wanted.dtype)) for x in (a, b))
        get_a, get_b = lambda: read(pair.a, 1.0, a.dtype), lambda: read_b(pair, b.dtype)
        return Item(pair.slot.module, pair.slot.layer, (a, b), get_a, get_b)

    return [item(pair) for pair in pairs]


def _alphas(file: LoraFile, pairs: tuple[Pair, ...], wanted: Wanted) -> float | None:
    """The one alpha of all pairs, before folding; None where there is no such."""
    said = [lora_files.alpha_of(file, pair) for pair in pairs]
    earlier = file.recorded.get("alpha")
    if wanted.alpha is not None and (earlier or said.count(None) < len(said)):
        alpha = earlier or next(a for a in said if a is not None)
        got = f"a file that says its alpha, {alpha:g}"
        raise problem("lora", file.path, got, "one that does not", "leave out --alpha")
    if wanted.alpha is not None or earlier:
        return wanted.alpha or earlier
    return said[0] if len({*said}) == 1 else None


def _strength(file: LoraFile) -> float:
    """What an earlier conversion multiplied the change with."""
    said = (file.recorded.get("extra") or {}).get("strength", 1.0)
    try:
        return float(said)
    except (TypeError, ValueError):
        got, do = f"a recorded strength of {said!r}", "copy the file again"
        raise problem("lora", file.path, got, "a number", do) from None


def _fields(
    found: Checked, wanted: Wanted, pairs: tuple[Pair, ...], left_out: list[str]
) -> dict[str, Any]:
    """What the new file records: what the old one did, and what is known here."""
    file, base, _ = found
    extra = {**(file.recorded.get("extra") or {})}
    extra |= {"checked_against": base.base_hash, "checked_name": base.path.name}
    if wanted.strength != 1.0:
        extra["strength"] = str(_strength(file) * wanted.strength)
    if left_out:
        extra["left_out"] = json.dumps(left_out)
    alpha = _alphas(file, pairs, wanted)
    paths = dict.fromkeys(p.slot.module.path.removesuffix("/kernel") for p in pairs)
    return {
        "targets": [*paths],
        "generation": base.generation,
        **file.recorded,
        "rank": max(pair.rank for pair in pairs),
        **({} if alpha is None else {"alpha": alpha}),
        "version": __version__,
        "extra": extra,
    }


def _is_done(destination: Path, conversion: Mapping[str, Any]) -> bool:
    """Whether the destination is this conversion; anything else there is an error."""
    if not destination.exists():
        return False
    try:
        held = lora_files.open_lora(destination).recorded.get("conversion")
    except ValueError:
        held = None
    if held == conversion:
        return True
    got, do = "something else", "remove it, or choose another name"
    raise problem("lora", destination, got, "nothing, or this conversion", do)


def _nameable(found: Checked, wanted: Wanted) -> tuple[tuple[Pair, ...], list[str]]:
    """The pairs that the format has names for, and the keys that are left out."""
    pairs, left_out = found.report.pairs, [*found.report.bad]
    if not wanted.allow_partial:
        return pairs, left_out
    named = [lora_names.spelled(p.slot.module, wanted.format) for p in pairs]
    lost = [p for p, name in zip(pairs, named, strict=True) if name is None]
    kept = tuple(p for p, name in zip(pairs, named, strict=True) if name is not None)
    if not kept:
        got, do = "modules without a name in it", "write another format"
        raise problem(f"lora: {wanted.format}", found.file.path, got, "some with", do)
    return kept, left_out + [key for pair in lost for key in pair.keys]


def _unread_by_diffusers(pair: Pair) -> bool:
    """Whether diffusers' loader, given a ComfyUI file, leaves the pair out."""
    return "_embeddings_connector." in pair.slot.module.original


def rewrite(
    source: PathLike,
    base_path: PathLike,
    destination: PathLike | None = None,
    wanted: Wanted | None = None,
    *,
    say: Say = print,
) -> Report:
    """Check a LoRA file against a base, values included, and write it again if asked.

    Args:
        source: a file, or the folder that PEFT or diffusers makes.
        base_path: the base it is for: original file or converted folder.
        destination: the file (for "peft" the folder) to write; None: only check.
        wanted: what to make of it.
        say: takes lines about what was found and done.

    Raises:
        ValueError: if the file does not fit or is broken, or the destination holds
            something else.
        OSError: if the destination cannot be written; nothing is left behind.
    """
    wanted = wanted or Wanted()
    found = check(source, base_path, allow_partial=wanted.allow_partial, say=say)
    pairs, left_out = _nameable(found, wanted)
    fields = _fields(found, wanted, pairs, left_out)
    dtype = None if wanted.dtype is None else np.dtype(wanted.dtype).name
    conversion = {
        "source": found.file.identity,
        "base": found.base.base_hash,
        **(dataclasses.asdict(wanted) | {"dtype": dtype}),
    }
    if destination is not None and _is_done(Path(destination), conversion):
        say(f"{destination} holds this conversion already; nothing to do")
        return found.report
    total = sum(
        spec.nbytes for item in _items(found.file, pairs, wanted) for spec in item.specs
    )
    changed: list[str] = []
    # Twice: the hash of all tensors stands before them in the file.
    with bar(total if destination is None else 2 * total, "reading") as progress:
        items = _items(found.file, pairs, wanted, progress=progress, changed=changed)
        if destination is None:
            for get in (get for item in items for get in (item.a, item.b)):
                get()
        else:
            fields |= {"conversion": conversion}
            fields = lora_formats.write(destination, items, fields, wanted.format)
    if not changed:
        say("warning: every lora_B is zero: this adapter changes nothing")
    if left_out:
        say(f"left out {len(left_out)} keys, listed in the metadata")
    if wanted.format == "comfyui" and any(map(_unread_by_diffusers, pairs)):
        say("note: diffusers reads the connectors' blocks in format diffusers alone")
    if destination is not None:
        digest = fields["content_hash"][:12]
        say(f"wrote {destination}: {wanted.format}, rank {fields['rank']}, {digest}")
    return found.report

"""Checking a folder that preprocessing made, whatever wrote it.

Every file is read (`data.report`), sounds are compared with their videos' lengths, and
the folder is listed as training lists it, each bucket's by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from idlora_jax import geometry
from idlora_jax.data import latents, published, report, sources
from idlora_jax.data.report import Report
from idlora_jax.data.stored import AUDIO, VIDEO

_SLACK = 1
"""Audio latents by which a sound may differ from its video."""
_LISTED = 5


def folders(root: Path) -> list[Path]:
    """The folders of the layout: `root`, or those of the buckets in it.

    Raises:
        ValueError: if there is no such folder.
    """
    return published.sized(root) or [published.root_of(root)]


def _lengths(found: Report) -> Iterator[str]:
    """Sounds that are not as long as their videos."""
    videos = {f.name: f for f in found.facts if f.folder == VIDEO and not f.problem}
    for fact in found.facts:
        video = videos.get(fact.name)
        if fact.folder != AUDIO or fact.problem or video is None:
            continue
        frames = (video.shape[0] - 1) * geometry.FRAMES_PER_LATENT + 1
        wanted = geometry.audio_grid(frames, video.fps).frames
        if abs(fact.shape[0] - wanted) > _SLACK:
            yield f"{fact.name}: {fact.shape[0]} audio latents, its video has {wanted}"


def check(folder: Path) -> tuple[str, list[str]]:
    """Read all files of one bucket.

    Returns:
        The report in words, and what is wrong; nothing if all is well.
    """
    source = sources.open_source(folder)
    with tqdm(total=source.nbytes, unit="B", unit_scale=True, disable=None) as bar:
        found = report.report(report.look(item) for item in source.scan(bar.update))
    wrong = ["something is broken, see above"] if found.broken else []
    lengths = list(_lengths(found))
    wrong += lengths[:_LISTED]
    if len(lengths) > _LISTED:
        wrong.append(
            f"... and {len(lengths) - _LISTED:,} more sounds of another length"
        )
    if AUDIO not in found.names:
        wrong.append("no clip has sound: audio_latents/ is missing or empty")
    try:
        wanted = tuple(name for name in latents.FOLDERS if name in found.names)
        latents.listed(folder, wanted or latents.FOLDERS)
    except ValueError as error:
        wrong.append(str(error))
    return str(found), wrong


def run(root: Path) -> bool:
    """Print what a folder holds and what is wrong with it.

    Returns:
        Whether all is well.

    Raises:
        ValueError: if there is no such folder, or no latents in it.
    """
    bad = 0
    for folder in folders(root):
        text, wrong = check(folder)
        print(f"{folder}\n{text}")
        for line in wrong:
            print(f"  wrong: {line}")
        bad += bool(wrong)
    print(f"{root}: {'broken' if bad else 'sound'}")
    return not bad

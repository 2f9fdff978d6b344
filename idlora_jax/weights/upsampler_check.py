"""Is a latent upsampler whole? From its headers at once, or byte by byte."""

from __future__ import annotations

import math
from typing import NamedTuple

from idlora_jax.config_upsampler import UpsamplerConfig
from idlora_jax.files import PathLike, problem
from idlora_jax.weights import tensorfile, upsampler_files
from idlora_jax.weights.progress import bar
from idlora_jax.weights.upsampler_files import UpsamplerFile


def _kind(file: UpsamplerFile) -> str:
    if file.converted:
        return "converted file"
    return "diffusers folder" if file.path.is_dir() else "original file"


def describe(cfg: UpsamplerConfig) -> str:
    """A configuration in one line for people."""
    up, down = cfg.space
    form = " (rational form)" if cfg.rational else ""
    space = f"height and width x{up / down:g}{form}"
    time = "F frames become 2F - 1" if cfg.time == 2 else "frames as they are"
    return (
        f"{cfg.channels} channels, width {cfg.width}, {cfg.blocks} + {cfg.blocks} "
        f"blocks of {cfg.dims} dimensions; {space}, {time}"
    )


class UpsamplerReport(NamedTuple):
    """What a file holds and what is wrong; `str()` of it is for people."""

    file: UpsamplerFile
    tensors: int
    parameters: int
    nbytes: int
    problem: str

    @property
    def complete(self) -> bool:
        """Whether every tensor is there, none else, and each of its shape."""
        return not self.problem

    def __str__(self) -> str:
        kind, size = _kind(self.file), f"{self.nbytes / 1e9:.3f} GB"
        verdict = "complete" if self.complete else f"INCOMPLETE\n{self.problem}"
        return (
            f"{self.file.path}: latent upsampler, {kind}, {size}\n"
            f"  {describe(self.file.cfg)}\n"
            f"  {self.tensors:,} tensors {self.parameters:,} parameters  {verdict}"
        )


def report(path: PathLike) -> UpsamplerReport:
    """Compare a file's headers with its config; no tensor is read.

    Args:
        path: see `upsampler_files.open_upsampler`.

    Raises:
        ValueError: if it is missing, truncated, or no latent upsampler.
    """
    file = upsampler_files.open_upsampler(path)
    specs = upsampler_files.tensors_in(file).specs.values()
    try:
        upsampler_files.locate(file)
        wrong = ""
    except ValueError as error:
        wrong = str(error)
    parameters = sum(math.prod(spec.shape) for spec in specs)
    nbytes = sum(path.stat().st_size for path in file.files)
    return UpsamplerReport(file, len(specs), parameters, nbytes, wrong)


def verify(path: PathLike) -> None:
    """Read every byte, and compare with the recorded hashes, with a bar.

    Args:
        path: see `upsampler_files.open_upsampler`.

    Raises:
        ValueError: if a file changed, or records no hash since another library wrote
            it.
    """
    files = upsampler_files.open_upsampler(path).files
    total = sum(file.stat().st_size for file in files)
    with bar(total, "verifying") as progress:
        for file in files:
            if not tensorfile.verify(file, progress=progress):
                got, do = "other bytes", "copy, download or convert it again"
                raise problem("verify", file, got, "those of its recorded hash", do)

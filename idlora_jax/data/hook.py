"""A function of one's own that cleans the voice of references: `module:function`.

    wave f32 [2 N], rate --hook--> wave f32 [2 N]

It is found on Python's path, or in the folder that the command is run in, and called
once for each recording, never by two threads at a time.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from idlora_jax import sound
from idlora_jax.data.rejection import Rejection

Hook = Callable[[np.ndarray, int], Any]


@contextlib.contextmanager
def _here() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def load(name: str) -> Hook:
    """The function of a name.

    Raises:
        ValueError: if there is none.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"voice hook: got {name!r}, expected module:function")
    try:
        with _here():
            found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"voice hook: got {name!r}, which cannot be imported ({error}); give "
            "module:function, and run the command where the module lies"
        ) from error
    if not callable(found):
        raise ValueError(
            f"voice hook: {name} is a {type(found).__name__}, expected a function of "
            "(wave, rate)"
        )
    return found


def cleaned(
    hook: Hook, wave: Float[np.ndarray, "2 N"], rate: int, name: str
) -> Float32[np.ndarray, "2 N"]:
    """What the hook makes of a recording.

    Args:
        hook: from `load`.
        wave: full scale [-1, 1].
        rate: samples per second.
        name: of the recording, for messages.

    Raises:
        ValueError: if it fails or returns something else than a wave of the same shape.
        Rejection: if it leaves silence, or NaN.
    """
    try:
        made = hook(wave.copy(), rate)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"voice hook: it failed on {name} ({said}); mend it"
        ) from error
    if not isinstance(made, np.ndarray) or made.shape != wave.shape:
        shape = getattr(made, "shape", None)
        got = type(made).__name__ if shape is None else f"shape {list(shape)}"
        raise ValueError(
            f"voice hook: it returned {got} for {name}, expected an array of shape "
            f"{list(wave.shape)}"
        )
    if made.dtype.kind != "f":
        raise ValueError(
            f"voice hook: it returned {made.dtype} for {name}, expected floats "
            "in [-1, 1]"
        )
    if not np.isfinite(made).all():
        raise Rejection("not finite", f"{name}: got NaN from the voice hook")
    if np.abs(made).max() < sound.SILENCE:
        raise Rejection("silent", f"{name}: got silence from the voice hook")
    return made.astype(np.float32)

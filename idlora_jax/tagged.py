"""Prompts in three parts, as ID-LoRA was trained: what is seen, said and heard.

    [VISUAL]: a woman at a window [SPEECH]: Good morning. [SOUNDS]: a quiet room

`parse` and `text` go from one form to the other; `lint` lists what is likely to make a
bad clip, and changes nothing.
"""

from __future__ import annotations

import re
from typing import NamedTuple

WORDS_PER_SECOND = 3.5
"""Of fast speech; normal speech has 2 to 3."""
LETTERS_PER_WORD = 8
"""Of what is written without spaces, or in very long words."""


class TaggedPrompt(NamedTuple):
    """The parts of a prompt; None where its tag is absent."""

    visual: str | None = None
    speech: str | None = None
    sounds: str | None = None

    def text(self) -> str:
        """The prompt with its tags, in their order."""
        parts = zip(TAGS, self, strict=True)
        return " ".join(f"[{tag}]: {part}" for tag, part in parts if part is not None)


TAGS = tuple(name.upper() for name in TaggedPrompt._fields)
_TAG = re.compile(rf"\[({'|'.join(TAGS)})\]\s*:?\s*", re.IGNORECASE)


def parse(prompt: str) -> TaggedPrompt:
    """The parts of a prompt with tags; without any, it is all visual.

    Raises:
        ValueError: if a tag stands twice.
    """
    pieces = _TAG.split(prompt)
    found: dict[str, str] = {}
    for tag, part in zip(pieces[1::2], pieces[2::2], strict=True):
        name = tag.lower()
        if name in found:
            raise ValueError(
                f"prompt: [{tag.upper()}] stands twice, expected each tag once; "
                "join the two parts"
            )
        found[name] = part.strip()
    if not found:
        return TaggedPrompt(visual=prompt.strip())
    return TaggedPrompt(**found)


def _words(speech: str) -> float:
    letters = sum(character.isalnum() for character in speech)
    return float(max(len(speech.split()), letters / LETTERS_PER_WORD))


def lint(prompt: str, seconds: float | int) -> tuple[str, ...]:
    """What is likely to make a bad clip, a line each.

    Args:
        prompt: with or without tags.
        seconds: duration of the clip.

    Raises:
        ValueError: if a tag stands twice.
    """
    parts = parse(prompt)
    out = []
    missing = [tag for tag, part in zip(TAGS, parts, strict=True) if part is None]
    if missing:
        names = ", ".join(f"[{tag}]" for tag in missing)
        out.append(f"the prompt has no {names}; adapters were trained with all three")
    empty = [tag for tag, part in zip(TAGS, parts, strict=True) if part == ""]
    if empty:
        names = ", ".join(f"[{tag}]" for tag in empty)
        out.append(f"{names} of the prompt is empty; say what is there, or 'none'")
    first = prompt.strip()[:1]
    if not missing and first != "[":
        out.append("there is text before the first tag, which belongs to no part")
    words = _words(parts.speech or "")
    if words > WORDS_PER_SECOND * seconds:
        out.append(
            f"[SPEECH] has about {words:.0f} words for {seconds:.1f} s; people say "
            f"{WORDS_PER_SECOND * seconds:.0f} at most in this time; shorten it or "
            "make the clip longer"
        )
    return tuple(out)

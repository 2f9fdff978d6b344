"""Prompts in three parts, as ID-LoRA was trained: what is seen, said and heard.

    [VISUAL]: a woman at a window [SPEECH]: Good morning. [SOUNDS]: a quiet room

`parse` and `text` go from one form to the other; `lint` lists what is likely to make a
bad clip, and changes nothing.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

WORDS_PER_SECOND = 3.0
"""The upper end of a normal pace, 180 words a minute. Conversation and audio books
have 150 to 160; 210 (3.5 a second) is fast, and a warning there would come too late."""
LETTERS_PER_WORD = 8
"""Longer words count as several: in German or Finnish one says what English says in
three."""


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
_TAG = re.compile(rf"\[({'|'.join(TAGS)})\]\s*[:：]?\s*", re.IGNORECASE)
_OTHER = re.compile(r"\[([A-Z][A-Z_ ]*)\]\s*[:：]")
_ALSO_TRAINED = ("TEXT",)
"""A fourth part of the captions that LTX-2's own tool writes; it is nothing to hear."""
_ASIDE = re.compile(r"\[[^\[\]]*\]|\([^()]*\)|（[^（）]*）|<[^<>]*>")
"""Directions such as [laughs], which are not said."""

_HAN = "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_PER_SECOND = (
    (re.compile(f"[{_HAN}]"), 5.0),
    (re.compile("[\u3041-\u30ff\u31f0-\u31ff]"), 7.5),
    (re.compile("[\uac00-\ud7af]"), 7.0),
    (re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"), 12.0),
    (re.compile(r"\d"), 3.0),
)
"""Characters a second where spaces do not make the words: Han, kana, Hangul; Thai, Lao,
Burmese and Khmer (two or three letters a syllable); digits, each a word.

Source: Mandarin 5.2 and Japanese 7.8 syllables a second, Pellegrino, Coupe and Marsico
2011, doi 10.1353/lan.2011.0057, table 1; the others are estimates of ours."""


def _split(prompt: str) -> tuple[str, list[tuple[str, str]]]:
    """What stands before the first tag, and (name, part) for each tag."""
    lead, *pieces = _TAG.split(prompt)
    names = [tag.lower() for tag in pieces[::2]]
    parts = [part.strip() for part in pieces[1::2]]
    return lead.strip(), list(zip(names, parts, strict=True))


def parse(prompt: str) -> TaggedPrompt:
    """The parts of a prompt with tags; without any, it is all visual.

    Raises:
        ValueError: if a tag stands twice.
    """
    lead, found = _split(prompt)
    for tag in TAGS:
        if [name for name, _ in found].count(tag.lower()) > 1:
            raise ValueError(
                f"prompt: [{tag}] stands twice, expected each tag once; "
                "join the two parts"
            )
    return TaggedPrompt(**dict(found)) if found else TaggedPrompt(visual=lead)


def seconds_to_say(speech: str) -> float:
    """How long it takes to say a text at a normal pace, in any script, in seconds.

    An estimate: no dictionary is asked, so syllables between spaces (Vietnamese) count
    as words, and take too long. Directions in brackets take no time.
    """
    # Without accents, vowel signs and joiners, which would cut words apart.
    letters = unicodedata.normalize("NFKD", _ASIDE.sub(" ", speech))
    marks = ("Mn", "Mc", "Me", "Cf")
    letters = "".join(c for c in letters if unicodedata.category(c) not in marks)
    letters = unicodedata.normalize("NFC", letters)
    seconds = 0.0
    for pattern, rate in _PER_SECOND:
        letters, count = pattern.subn(" ", letters)
        seconds += count / rate
    words = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", letters)
    count = sum(max(1.0, len(word) / LETTERS_PER_WORD) for word in words)
    return seconds + count / WORDS_PER_SECOND


def _listed(names: list[str]) -> str:
    return ", ".join(f"[{name}]" for name in names)


def _parts(lead: str, found: list[tuple[str, str]]) -> list[str]:
    """What is wrong with the tags, a line each."""
    # Without any tag, all is visual.
    found, lead = (found, lead) if found else ([("visual", lead)], "")
    out, names = [], [name.upper() for name, _ in found]
    missing = [tag for tag in TAGS if tag not in names]
    if missing:
        what = _listed(missing)
        out.append(f"the prompt has no {what}; adapters were trained with all three")
    twice = [tag for tag in TAGS if names.count(tag) > 1]
    if twice:
        what = _listed(twice)
        out.append(f"{what} stands twice; adapters were trained with one of each")
    # A part of dots or quotes says as little as none.
    bare = [n.upper() for n, part in found if not any(c.isalnum() for c in part)]
    if bare:
        out.append(
            f"{_listed(bare)} of the prompt is empty; say what is there, or 'none'"
        )
    if lead:
        out.append("there is text before the first tag, which belongs to no part")
    return out


def lint(prompt: str, seconds: float | int) -> tuple[str, ...]:
    """What is likely to make a bad clip, a line each.

    Args:
        prompt: with or without tags.
        seconds: duration of the clip.
    """
    lead, found = _split(prompt)
    out = _parts(lead, found)
    others = dict.fromkeys(_OTHER.findall(prompt))
    unknown = [name for name in others if name not in (*TAGS, *_ALSO_TRAINED)]
    if unknown:
        what, known = _listed(unknown), _listed([*TAGS])
        out.append(f"{what} is none of the tags that adapters know: {known}")
    spoken = [_OTHER.split(part)[0] for name, part in found if name == "speech"]
    needed = sum(map(seconds_to_say, spoken))
    if needed > seconds:
        out.append(
            f"[SPEECH] takes about {needed:.1f} s to say at a normal pace "
            f"({WORDS_PER_SECOND:.0f} words a second), but the clip has "
            f"{seconds:.1f} s; shorten it or make the clip longer"
        )
    return tuple(out)

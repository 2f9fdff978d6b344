"""Prompts in three parts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlora_jax import tagged
from idlora_jax.tagged import TaggedPrompt

GOOD = "[VISUAL]: a face [SPEECH]: Good morning to you. [SOUNDS]: a quiet room"
part = st.text(st.characters(exclude_characters="[]", codec="utf-8")).map(str.strip)
some = st.one_of(st.none(), part)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(parts=st.tuples(some, some, some))
def test_text_and_parts_are_inverse(parts):
    prompt = TaggedPrompt(*parts)
    if any(p is not None for p in parts):
        # A part that begins like the end of a tag loses it.
        if not any((p or "").startswith(":") for p in parts):
            assert tagged.parse(prompt.text()) == prompt


def test_a_prompt_without_tags_is_what_is_seen():
    assert tagged.parse(" a face ") == TaggedPrompt(visual="a face")


def test_tags_may_be_small_and_without_colon():
    assert tagged.parse("[visual] a face [Speech]: hi") == ("a face", "hi", None)


def test_a_good_prompt_is_passed():
    assert tagged.lint(GOOD, 4.84) == ()


@pytest.mark.parametrize(
    ("prompt", "seconds", "said"),
    [
        ("a face", 5, "no [SPEECH], [SOUNDS]"),
        ("[VISUAL]: a [SPEECH]: [SOUNDS]: b", 5, "[SPEECH] of the prompt is empty"),
        (f"Then: {GOOD}", 5, "before the first tag"),
        (GOOD, 1.0, "about 4 words for 1.0 s"),
        ("[VISUAL]: a [SPEECH]: " + "早" * 80 + " [SOUNDS]: b", 2, "about 10 words"),
    ],
)
def test_what_makes_a_bad_clip_is_said(prompt, seconds, said):
    (line,) = tagged.lint(prompt, seconds)
    assert said in line


def test_a_tag_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match=r"SPEECH.*twice"):
        tagged.lint("[SPEECH]: a [SPEECH]: b", 5)

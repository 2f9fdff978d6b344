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
        if not any((p or "").startswith((":", "：")) for p in parts):
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
        ("[intro] b [VISUAL]: a [SPEECH]: c [SOUNDS]: d", 5, "before the first tag"),
        (
            "[VISUAL]: a [SPEECH]: “...” [SOUNDS]: b",
            5,
            "[SPEECH] of the prompt is empty",
        ),
        ("[VISUAL]: a [SPEECH]： [SOUNDS]: b", 5, "[SPEECH] of the prompt is empty"),
        ("[VISUAL]: a [SPEECH]: b", 5, "no [SOUNDS]"),
        ("【VISUAL】a 【SPEECH】b", 5, "no [SPEECH], [SOUNDS]"),
        (f"{GOOD} [SPEECH]: Yes.", 5, "[SPEECH] stands twice"),
        (f"{GOOD} [SPEAKING_STYLE]: calm", 5, "[SPEAKING_STYLE] is none of the tags"),
        (GOOD, 1.0, "about 1.3 s to say at a normal pace (3 words a second)"),
        (GOOD, 1.0, "the clip has 1.0 s"),
    ],
)
def test_what_makes_a_bad_clip_is_said(prompt, seconds, said):
    (line,) = tagged.lint(prompt, seconds)
    assert said in line


def test_a_tag_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match=r"SPEECH.*twice"):
        tagged.parse("[SPEECH]: a [SPEECH]: b")


def test_captions_of_ltx_have_a_fourth_tag_that_is_not_said():
    text = "word " * 60
    assert tagged.lint(f"{GOOD} [TEXT]: {text}", 5) == ()
    moved = f"[VISUAL]: a [SOUNDS]: b [SPEECH]: c [TEXT]: {text}"
    assert tagged.lint(moved, 5) == ()


def test_an_empty_prompt_has_an_empty_visual_part():
    for prompt in ("", " \n", "\u200b"):
        first, second = tagged.lint(prompt, 5)
        assert "no [SPEECH], [SOUNDS]" in first
        assert "[VISUAL] of the prompt is empty" in second


@pytest.mark.parametrize(
    ("speech", "low", "high"),
    [
        # The same sentence takes about as long in every language.
        ("We are proud to introduce this model to all of you today.", 3, 5),
        ("今天我们很高兴地向大家介绍这个新的模型。", 3, 5),
        ("本日は新しいモデルを皆様にご紹介できることを嬉しく思います。", 3, 6),
        ("오늘 여러분께 새로운 모델을 소개하게 되어 기쁩니다.", 2, 5),
        ("วันนี้เรายินดีที่จะแนะนำโมเดลใหม่ให้ทุกท่านรู้จัก", 2, 6),
        ("يسعدنا أن نقدم لكم اليوم هذا النموذج الجديد.", 2, 4),
        ("يُسْعِدُنَا أَنْ نُقَدِّمَ لَكُمُ الْيَوْمَ هٰذَا النَّمُوذَجَ الْجَدِيدَ.", 2, 4),
        ("आज हमें आपके सामने यह नया मॉडल पेश करते हुए खुशी हो रही है।", 3, 6),
        ("Wir freuen uns, Ihnen heute dieses neue Modell vorzustellen.", 2, 5),
        ("Rufen Sie an: 030 1234567", 4, 6),
    ],
)
def test_the_time_to_say_something_is_sensible_in_any_script(speech, low, high):
    assert low < tagged.seconds_to_say(speech) < high


def test_what_is_not_said_takes_no_time():
    plain = tagged.seconds_to_say("Hello there, my friend")
    assert plain == pytest.approx(4 / 3)
    for speech in (
        "[laughs] Hello there (pause), my friend",
        "Hello there — my friend ... !",
        "Hello\n\nthere, ♪ my  friend 🙂",
        "He\u00adllo there, my friend",
    ):
        assert tagged.seconds_to_say(speech) == plain
    assert tagged.seconds_to_say("") == tagged.seconds_to_say("…") == 0
    assert tagged.seconds_to_say("don't") == tagged.seconds_to_say("do")


def test_words_without_spaces_take_longer():
    assert tagged.seconds_to_say("a" * 80) == pytest.approx(10 / 3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(), st.text())
def test_any_text_is_linted_and_more_speech_never_takes_less(a, b):
    assert isinstance(tagged.lint(a, 1), tuple)
    said = [_plain(text) for text in (a, b)]
    both = tagged.seconds_to_say(f"{said[0]}\n{said[1]}")
    assert both == pytest.approx(sum(map(tagged.seconds_to_say, said)))


def _plain(text):
    """Without brackets, which could enclose the joint of two texts."""
    return "".join(" " if c in "[]()<>（）" else c for c in text)

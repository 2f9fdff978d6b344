import json

import pytest

from idlora_jax.data import outcomes
from idlora_jax.data.buckets import Bucket
from idlora_jax.data.outcomes import Outcome
from idlora_jax.data.rejection import KINDS, Rejection, rejection

SMALL, LONG = Bucket(32, 32, 9), Bucket(32, 32, 121)


def good(name, bucket=SMALL, state="written"):
    about = {"bucket": bucket, "seconds": bucket.frames / 25, "speaker": "anna"}
    return Outcome(name, state, **about, reference="other")


def bad(name, kind="silent"):
    return outcomes.rejected(name, "bob", Rejection(kind, f"{name} is {kind}"))


FOUND = [good("a"), good("b", LONG, "existing"), good("c", LONG), bad("d"), bad("e")]


def test_a_report_counts_by_bucket_and_by_reason(tmp_path):
    made = outcomes.as_json(
        FOUND, {"output": tmp_path}, seconds=1.23, stopped=False, strangers=["x"]
    )
    assert made["clips"] == {"written": 2, "existing": 1, "rejected": 2}
    assert made["buckets"] == {
        "32x32x9": {"written": 1, "existing": 0, "seconds": 0.36},
        "32x32x121": {"written": 1, "existing": 1, "seconds": 9.68},
    }
    assert made["rejected"] == {"silent": 2} and made["speakers"] == 1
    path = outcomes.write(tmp_path, made)
    assert json.loads(path.read_text()) == made
    assert made["settings"] == {"output": str(tmp_path)}


def test_the_summary_lists_the_first_reasons(tmp_path):
    many = [bad(f"clip{n}", KINDS[n % len(KINDS)]) for n in range(30)]
    lines = outcomes.summary([*FOUND, *many], tmp_path, ["x", "y", "z", "w"]).split(
        "\n"
    )
    assert lines[0].endswith("wrote 2 of 35 clips, 1 were there already, left out 32")
    assert lines[1].split() == ["bucket", "32x32x9", "1", "clips", "0.0", "min"]
    assert sum(line.startswith("  left out: ") for line in lines) == len(KINDS)
    assert "  d: d is silent" in lines
    assert lines[-2].startswith("  ... and 12 more, all in ")
    assert "4 samples in the folder" in lines[-1] and "x, y, z, ..." in lines[-1]


def test_without_rejections_the_summary_says_nothing_of_them(tmp_path):
    assert "left out" not in outcomes.summary(FOUND[:3], tmp_path)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("got no audio stream, expected", "no audio"),
        ("got NaN or infinite samples", "not finite"),
        ("got 4 frames at 25 fps from 0 s on", "too short"),
        ("got no such file", "unreadable"),
    ],
)
def test_the_words_of_a_path_do_not_count_as_a_reason(said, kind):
    path = "no video stream/silent audio.mp4"
    assert rejection(path, ValueError(f"read: {path}: {said}")).kind == kind


def test_a_rejection_keeps_its_kind():
    first = Rejection("silent", "nothing to hear")
    assert rejection("a.mp4", first) is first

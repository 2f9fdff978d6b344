import pytest
from hypothesis import given
from hypothesis import strategies as st

from idlora_jax.data import buckets
from idlora_jax.data.buckets import Bucket

TWO = (Bucket(512, 512, 121), Bucket(576, 320, 89))


def test_buckets_are_written_as_height_width_frames():
    assert buckets.parse("512x512x121, 576X320x89", 25) == TWO
    assert str(TWO[1]) == "576x320x89"
    assert buckets.parse(str(TWO[0]), 25) == TWO[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("512x512", "got '512x512', expected HEIGHTxWIDTHxFRAMES"),
        ("512x512x-9", "got '512x512x-9'"),
        ("", "got ''"),
        ("500x512x121", "32"),
        ("512x512x120", "8k"),
        ("512x512x9,512x512x9", "a size twice"),
    ],
)
def test_impossible_buckets_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        buckets.parse(text, 25)


@pytest.mark.parametrize(
    ("size", "frames", "wanted"),
    [
        ((1080, 1080), 200, TWO[0]),
        ((1920, 1080), 200, TWO[1]),
        ((1080, 1080), 100, TWO[1]),
        ((1080, 1920), 200, TWO[0]),
        ((1920, 1080), 88, None),
    ],
)
def test_a_clip_goes_to_the_nearest_aspect_that_it_can_fill(size, frames, wanted):
    assert buckets.choose(TWO, size, frames) == wanted


def test_of_one_aspect_the_longest_then_the_largest_that_does_not_enlarge():
    sizes = [Bucket(s, s, n) for s in (256, 512, 1024) for n in (9, 25)]
    assert buckets.choose(sizes, (600, 600), 24) == Bucket(512, 512, 9)
    assert buckets.choose(sizes, (600, 600), 30) == Bucket(512, 512, 25)
    assert buckets.choose(sizes, (2000, 2000), 30) == Bucket(1024, 1024, 25)
    assert buckets.choose(sizes, (100, 100), 30) == Bucket(256, 256, 25)


@given(st.permutations([*TWO, Bucket(320, 576, 89), Bucket(256, 256, 121)]), st.data())
def test_the_order_of_buckets_does_not_matter(order, data):
    size = data.draw(st.tuples(st.integers(64, 2000), st.integers(64, 2000)))
    frames = data.draw(st.integers(0, 300))
    chosen = buckets.choose(order, size, frames)
    assert chosen == buckets.choose(sorted(order, key=str), size, frames)
    assert chosen is None or chosen.frames <= frames

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlora_jax.model import tiling
from idlora_jax.model.tiling import Tile, Tiles

PLANS = {"decode": tiling.decode_plan, "encode": tiling.encode_plan}
FACTORS = (8, 32)


@st.composite
def tiles(draw, layout=None):
    """Settings that both directions accept."""
    size, frames = draw(st.integers(3, 8)), draw(st.integers(3, 8))
    overlap, shared = draw(st.integers(0, size - 1)), draw(st.integers(0, frames - 1))
    return Tiles(
        size * 32,
        overlap * 32,
        frames * 8,
        shared * 8,
        layout=layout or draw(st.sampled_from(["even", "reference"])),
    )


sizes = st.tuples(*[st.integers(1, 30)] * 3)
directions = st.sampled_from(sorted(PLANS))


def axes(plan):
    return plan.time, plan.rows, plan.columns


def spans(axis):
    return [(tile.start, tile.start + tile.size) for tile in axis]


def frames_of(size):
    return 8 * (size[0] - 1) + 1, 32 * size[1], 32 * size[2]


@settings(deadline=None)
@given(tiles(), sizes, directions)
def test_weights_are_between_zero_and_one_and_add_up_to_one(tiles, size, direction):
    plan = PLANS[direction](tiles, size, FACTORS)
    whole = frames_of(size) if direction == "decode" else size
    for axis, length in zip(axes(plan), whole, strict=True):
        total = np.zeros(length)
        for tile, weight in zip(axis, tiling.weights(axis), strict=True):
            assert weight.min() >= 0
            total[tile.at : tile.end] += weight
        np.testing.assert_allclose(total, 1, atol=1e-6)


@settings(deadline=None)
@given(tiles(), sizes, directions)
def test_tiles_read_the_whole_clip_in_order(tiles, size, direction):
    plan = PLANS[direction](tiles, size, FACTORS)
    whole = size if direction == "decode" else frames_of(size)
    for axis, length in zip(axes(plan), whole, strict=True):
        assert axis[0].start == 0
        assert spans(axis)[-1][1] == length
        for before, after in itertools.pairwise(spans(axis)):
            assert before[0] <= after[0] <= before[1] <= after[1]


@settings(deadline=None)
@given(tiles(), sizes, directions)
def test_chunks_cover_all_frames(tiles, size, direction):
    plan = PLANS[direction](tiles, size, FACTORS)
    assert min(plan.chunks) >= (tiles.layout == "even")
    assert sum(plan.chunks) == plan.time[-1].end


@settings(deadline=None)
@given(tiles("even"), sizes)
def test_even_tiles_are_the_fewest_of_one_size_with_the_overlap_asked_for(tiles, size):
    plan = tiling.decode_plan(tiles, size, FACTORS)
    side, side_overlap = tiles.size // 32, tiles.overlap // 32
    time, time_overlap = tiles.frames // 8 + 1, tiles.frames_overlap // 8 + 1
    most = ((time, time_overlap), (side, side_overlap), (side, side_overlap))
    for axis, length, (size_, overlap) in zip(axes(plan), size, most, strict=True):
        assert len({tile.size for tile in axis}) == 1
        assert axis[0].size <= min(size_, length)
        for before, after in itertools.pairwise(spans(axis)):
            assert before[1] - after[0] >= overlap
        step = size_ - overlap
        assert len(axis) == max(1, -(-(length - overlap) // step))


@settings(deadline=None)
@given(tiles("even"), sizes)
def test_even_encoding_takes_every_cell_from_one_tile(tiles, size):
    for axis in axes(tiling.encode_plan(tiles, size, FACTORS)):
        for weight in tiling.weights(axis):
            assert set(np.unique(weight)) <= {0, 1}


@settings(deadline=None)
@given(tiles(), sizes)
def test_the_first_frame_that_a_later_tile_decodes_is_dropped(tiles, size):
    axis = tiling.decode_plan(tiles, size, FACTORS).time
    for weight in tiling.weights(axis)[1:]:
        assert weight[0] == 0


def test_a_fade_rises_in_equal_steps_and_its_partner_falls():
    left = Tile(0, 4, 0, 4, fade=(0, 2))
    right = Tile(2, 4, 2, 4, fade=(2, 0))
    first, second = tiling.weights((left, right))
    np.testing.assert_allclose(first, [1, 1, 2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(second, [1 / 3, 2 / 3, 1, 1], rtol=1e-6)


def test_the_defaults_cut_five_seconds_of_full_picture_into_equal_tiles():
    plan = tiling.decode_plan(Tiles(), (16, 32, 24), FACTORS)
    assert spans(plan.time) == [(0, 9), (3, 12), (7, 16)]
    assert spans(plan.rows) == [(0, 12), (10, 22), (20, 32)]
    assert spans(plan.columns) == [(0, 13), (11, 24)]
    assert plan.chunks == (24, 32, 65)


def test_the_layout_of_the_reference_cuts_the_shorter_side_finer():
    plan = tiling.decode_plan(Tiles(layout="reference"), (16, 32, 24), FACTORS)
    assert spans(plan.time) == [(0, 8), (4, 13), (9, 16)]
    assert spans(plan.rows) == [(0, 16), (14, 30), (28, 32)]
    assert spans(plan.columns) == [(0, 12), (10, 22), (20, 24)]
    assert plan.chunks == (32, 40, 49)


def test_an_encoding_tile_is_good_up_to_its_last_frame():
    time = tiling.encode_plan(Tiles(None, 0, 64, 24), (16, 2, 2), FACTORS).time
    assert spans(time) == [(0, 65), (24, 89), (56, 121)]
    kept = [int(w.sum()) for w in tiling.weights(time)]
    assert kept == [9, 3, 4]


def test_the_reference_averages_the_cell_before_an_encoding_tile():
    tiles = Tiles(None, 0, 64, 24, layout="reference")
    time = tiling.encode_plan(tiles, (16, 2, 2), FACTORS).time
    assert spans(time) == [(0, 65), (40, 105), (80, 121)]
    first, second, _ = tiling.weights(time)
    assert (first[8], second[3], second[4]) == (0.5, 0.5, 1)


def test_encoding_tiles_share_at_least_two_cells():
    rows = tiling.encode_plan(Tiles(96, 0, None), (1, 9, 1), FACTORS).rows
    assert min(a[1] - b[0] for a, b in itertools.pairwise(spans(rows))) == 64


def test_without_sizes_nothing_is_cut():
    for plan in (
        f(Tiles(None, 0, None, 0), (9, 40, 50), FACTORS) for f in PLANS.values()
    ):
        assert [len(axis) for axis in axes(plan)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (
            Tiles(size=500),
            r"size must be a multiple of 32, at least 64, got 500 \(use 512",
        ),
        (
            Tiles(size=32),
            r"size must be a multiple of 32, at least 64, got 32 \(use 64\)",
        ),
        (Tiles(overlap=40), r"overlap must be a multiple of 32.*got 40 \(use 32\)"),
        (Tiles(overlap=512), r"at most 480, got 512 \(use 480\)"),
        (Tiles(overlap=-32), r"overlap must be .*at least 0.*got -32 \(use 0\)"),
        (
            Tiles(frames=60),
            r"frames must be a multiple of 8, at least 16, got 60 \(use 6",
        ),
        (Tiles(frames=8), r"frames must be .*at least 16, got 8 \(use 16\)"),
        (Tiles(frames_overlap=64), r"frames_overlap .*at most 56, got 64 \(use 56\)"),
    ],
)
def test_impossible_tiles_name_the_nearest_possible_value(tiles, message):
    with pytest.raises(ValueError, match=message):
        tiling.decode_plan(tiles, (9, 20, 20), FACTORS)


def test_encoding_needs_tiles_larger_than_the_overlap_it_needs():
    with pytest.raises(ValueError, match=r"size .*at least 96, got 64 \(use 96\)"):
        tiling.encode_plan(Tiles(64, 0), (1, 9, 9), FACTORS)
    with pytest.raises(ValueError, match=r"frames .*at least 24, got 16 \(use 24\)"):
        tiling.encode_plan(Tiles(None, 0, 16, 0), (9, 2, 2), FACTORS)

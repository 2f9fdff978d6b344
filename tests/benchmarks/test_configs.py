"""Sizes: which shares of the published model they are."""

import pytest

from benchmarks import cases
from benchmarks.configs import SIZES
from idlora_jax.config import LTX2_3_22B, LTX2_19B


def test_full_is_the_published_transformer():
    full = SIZES["full"]
    assert full.transformer("2.0") == LTX2_19B
    assert full.transformer("2.3") == LTX2_3_22B
    assert (full.video, full.audio + full.reference) == (4096, 247)


def test_every_dimension_of_eighth_is_an_eighth_of_full():
    full, eighth = SIZES["full"], SIZES["eighth"]
    of = lambda s: (*(s.heads * d for d in s.head_dims), s.video, s.text, s.caption)
    assert of(full) == tuple(8 * n for n in of(eighth))
    assert (eighth.layers, eighth.stg, SIZES["eighth48"].layers) == (16, 10, 48)


def test_quarter():
    quarter = SIZES["quarter"]
    widths = tuple(quarter.heads * d for d in quarter.head_dims)
    assert (widths, quarter.video, quarter.layers) == ((1024, 512), 1024, 8)
    assert quarter.audio + quarter.reference == 62 and quarter.text == 256


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
@pytest.mark.parametrize("name", ["tiny", "eighth"])
def test_a_case_fits_its_size(name, generation):
    size = SIZES[name]
    case = cases.make(size, generation)
    video, audio = case.streams
    assert video.x.shape == (1, size.video, 128)
    assert audio.x.shape == (1, size.audio + size.reference, 128)
    given = size.video // size.grid[0]
    assert int((~video.denoise).sum()) == given and not video.denoise[0, :given].any()
    assert (audio.pos[0, 0, size.audio :, 0] < 0).all(), "the reference is before zero"
    assert int(audio.denoise.sum()) == size.audio
    width = size.caption if generation == "2.0" else case.cfg.video.text_width
    assert case.prompts[0].video.shape == (1, size.text, width)
    assert 0 <= size.stg < size.layers

"""The tiles of decoding: as large as memory allows, or as the settings say."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import pytest

from idlora_jax import memory, outlines, pipeline, plans, tile_choice
from idlora_jax.model import tiling
from idlora_jax.model.tiling import Tiles
from idlora_jax.sample_config import SampleConfig
from idlora_jax.weights import networks

GPU = memory.Device("gpu")


def settings(**changes: Any) -> SampleConfig:
    path = pathlib.Path("x")
    return SampleConfig(base=path, text_encoder=path, **changes)


def test_every_choice_cuts_any_size_and_needs_less_than_the_one_before(tiny_model):
    nets, _ = networks.load(tiny_model[0], (), text_encoder_path=tiny_model[1])
    params = outlines.parameters(tiny_model[0])
    layout, asked = pipeline.clip(121, 1024, 1024), outlines.Asked()

    @functools.cache
    def work(tiles: Tiles | None) -> int:
        traced = outlines.decoding(nets, params, layout, asked, tiles)
        return GPU.work(traced, packed=False)

    needs = [work(tiles) for tiles in tile_choice.CHOICES]
    assert needs == sorted(needs, reverse=True) and needs[0] > 4 * needs[-1]
    for tiles in tile_choice.CHOICES[1:]:
        assert tiles is not None and tiling.decode_plan(tiles, (2, 1, 1), (8, 32))
    for tiles, need in zip(tile_choice.CHOICES, needs, strict=True):
        assert tile_choice.largest(work, need) == (tiles, need)
    assert tile_choice.largest(work, 0) == (tile_choice.CHOICES[-1], needs[-1])


def test_a_plan_cuts_a_clip_only_where_it_must(tiny_model):
    nets, _ = networks.load(tiny_model[0], (), text_encoder_path=tiny_model[1])
    params = outlines.parameters(tiny_model[0])
    plan = plans.one_stage(steps=2, video_cfg=1, audio_cfg=1, identity=0, stg=0)
    args = (plan, nets, params, pipeline.clip(65, 512, 512))

    def found(**options: Any) -> Any:
        return memory.of(*args, device=GPU, **options)

    roomy = found(most=10**12)
    assert roomy.tiles is None and "decoded at once" in roomy.table()
    tight = found(most=roomy.phases[-1].total)
    assert tight.tiles in tile_choice.CHOICES[1:]
    assert tight.phases[-1].total < roomy.phases[-1].total
    assert "decoded in tiles of" in tight.table()
    own = Tiles(size=256, frames=None)
    assert found(most=10**12, tiles=own).tiles == own


@pytest.mark.parametrize(
    ("size", "frames", "want"),
    [
        (None, None, "usual"),
        (0, 0, None),
        (256, None, Tiles(size=256)),
        (64, 16, Tiles(64, 32, 16, 8)),
        (0, 32, Tiles(size=None, frames=32)),
        (None, 0, Tiles(frames=None)),
    ],
)
def test_settings_say_the_tiles(size, frames, want):
    said = settings(tile_size=size, tile_frames=frames)
    assert tile_choice.explicit(said) == want


@pytest.mark.parametrize("wrong", [{"tile_size": 100}, {"tile_frames": 9}])
def test_tiles_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"a multiple of \d+ \(use (96|16)\)"):
        settings(**wrong)

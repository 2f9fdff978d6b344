from functools import partial

import jax
import jax.numpy as jnp
import new_arrays
import numpy as np
import pytest
from codec_sections import NOISY_VIDEO

from idlora_jax.config_video_vae import video_vae_config
from idlora_jax.model import video_tiles, video_vae
from idlora_jax.model.tiling import Tiles

PLAIN = {
    "latent_channels": 2,
    "timestep_conditioning": False,
    "encoder_blocks": [
        ["compress_space", {}],
        ["compress_time", {}],
        ["compress_all", {}],
        ["compress_all", {}],
    ],
    "decoder_blocks": [["compress_all", {}]] * 3,
}
CFG = video_vae_config({"vae": PLAIN})
NOISY = video_vae_config({"vae": NOISY_VIDEO})
PARAMS = {c: video_vae.init(c, jax.random.key(0)) for c in (CFG, NOISY)}
SMALL = Tiles(size=64, overlap=32, frames=16, frames_overlap=8)
ENCODING = Tiles(size=96, overlap=64, frames=24, frames_overlap=16)
WHOLE = Tiles(size=256, overlap=0, frames=64, frames_overlap=0)


def latent(frames, height=3, width=4, channels=2):
    return jax.random.normal(jax.random.key(1), (1, frames, height, width, channels))


def chunks(frames, tiles=SMALL, **more):
    return video_tiles.decode_chunks(CFG, PARAMS[CFG], latent(frames), tiles, **more)


@pytest.fixture(scope="module")
def tiled():
    """Seven latent frames decoded in small tiles, and the chunks they came in."""
    return jnp.concatenate(list(chunks(7)), axis=1), list(chunks(7))


def local(params, moment):
    """Convolutions that see one cell: `moment` is the present one in time."""

    def one(kernel):
        if kernel.ndim < 5:
            return kernel
        at = (moment, 1, 1)
        return jnp.zeros_like(kernel).at[at].set(kernel[at])

    return jax.tree.map(one, params)


LOCAL = {
    "encoder": local(PARAMS[CFG]["encoder"], 2),
    "decoder": local(PARAMS[CFG]["decoder"], 1),
    "stats": PARAMS[CFG]["stats"],
}


@pytest.mark.parametrize("layout", ["even", "reference"])
def test_tiles_change_nothing_for_a_decoder_that_sees_one_cell(layout):
    z = latent(5)
    tiles = Tiles(96, 32, 24, 8, layout=layout)
    plain = jax.jit(partial(video_vae.decode, CFG))(LOCAL, z)
    got = video_tiles.decode(CFG, LOCAL, z, tiles)
    np.testing.assert_allclose(got, plain, atol=1e-5)


@pytest.mark.parametrize("layout", ["even", "reference"])
def test_tiles_change_nothing_for_an_encoder_that_sees_one_cell(layout):
    video = jax.random.uniform(jax.random.key(2), (1, 41, 64, 128, 3)) * 2 - 1
    tiles = Tiles(96, 64, 24, 16, layout=layout)
    plain = jax.jit(partial(video_vae.encode, CFG))(LOCAL, video)
    got = video_tiles.encode(CFG, LOCAL, video, tiles)
    np.testing.assert_allclose(got, plain, atol=1e-5)


@pytest.mark.parametrize("layout", ["even", "reference"])
def test_one_tile_over_everything_equals_the_plain_decoder(layout):
    tiles = Tiles(256, 0, 64, 0, layout=layout)
    z = latent(3)
    plain = jax.jit(partial(video_vae.decode, CFG))(PARAMS[CFG], z)
    got = video_tiles.decode(CFG, PARAMS[CFG], z, tiles)
    np.testing.assert_allclose(got, plain, atol=1e-5)


def test_one_tile_over_everything_equals_the_plain_encoder():
    video = jax.random.uniform(jax.random.key(2), (1, 17, 64, 96, 3)) * 2 - 1
    plain = jax.jit(partial(video_vae.encode, CFG))(PARAMS[CFG], video)
    got = video_tiles.encode(CFG, PARAMS[CFG], video, WHOLE)
    np.testing.assert_allclose(got, plain, atol=1e-5)


def test_one_tile_over_everything_uses_the_same_noise():
    z = latent(3)
    draws = video_vae.draw(jax.random.key(3), NOISY, z.shape)
    more = {"draws": draws, "timestep": jnp.array([0.3])}
    plain = jax.jit(partial(video_vae.decode, NOISY))(PARAMS[NOISY], z, **more)
    got = video_tiles.decode(NOISY, PARAMS[NOISY], z, WHOLE, **more)
    np.testing.assert_allclose(got, plain, atol=1e-4)


def test_chunks_are_the_tiled_decode_in_pieces(tiled):
    whole, pieces = tiled
    plan = video_tiles.decode_plan(CFG, (1, 7, 3, 4, 2), SMALL)
    assert tuple(piece.shape[1] for piece in pieces) == plan.chunks
    assert len(pieces) > 2
    joined = video_tiles.decode(CFG, PARAMS[CFG], latent(7), SMALL)
    assert joined.shape == (1, 49, 96, 128, 3)
    np.testing.assert_array_equal(joined, whole)


def test_chunks_can_be_finished_as_bytes(tiled):
    whole, _ = tiled
    pieces = list(chunks(7, finish=video_vae.to_uint8))
    assert {piece.dtype for piece in pieces} == {np.dtype(np.uint8)}
    joined = np.concatenate(pieces, axis=1).astype(int)
    want = np.asarray(video_vae.to_uint8(whole)).astype(int)
    assert np.abs(joined - want).max() <= 1


def test_tiles_agree_about_the_noise_where_they_overlap():
    # With all convolutions silent a decoder shows its last map of noise.
    silent = jax.tree.map(jnp.zeros_like, PARAMS[NOISY]["decoder"])
    silent["blocks_6"]["res_0"]["noise_scale2"] = jnp.ones((1, 1, 2))
    silent["conv_out"]["kernel"] = silent["conv_out"]["kernel"].at[1, 1, 1, 0].set(1)
    params = PARAMS[NOISY] | {"decoder": silent}
    z = latent(3)
    draws = video_vae.draw(jax.random.key(3), NOISY, z.shape)
    more = {"draws": draws, "timestep": jnp.array([0.3])}
    whole = video_tiles.decode(NOISY, params, z, WHOLE, **more)
    got = video_tiles.decode(NOISY, params, z, SMALL, **more)
    assert float(jnp.std(whole)) > 0.1
    np.testing.assert_allclose(got, whole, atol=1e-5)


def test_longer_clips_compile_nothing_new_for_the_network(tiled):
    before = video_tiles._decode_slab._cache_size()
    for frames in (8, 12, 20):
        list(chunks(frames))
    assert video_tiles._decode_slab._cache_size() == before


def test_memory_does_not_grow_with_the_length_of_the_clip():
    def most(frames):
        z, held = latent(frames), []
        new = new_arrays.since_now()
        for _ in video_tiles.decode_chunks(CFG, PARAMS[CFG], z, SMALL):
            held.append(sum(x.nbytes for x in new()))
        return max(held)

    assert most(21) == most(7)


def test_temporary_memory_is_that_of_one_tile():
    def temporary(shape, tiles):
        plan = video_tiles.decode_plan(CFG, shape, tiles)
        frames = max(tile.size for tile in plan.time)
        z = jax.ShapeDtypeStruct((1, frames, *shape[2:]), jnp.float32)
        place = (CFG, plan.rows, plan.columns)
        draws = video_vae.Draws(None, ())
        lowered = video_tiles._decode_slab.lower(*place, PARAMS[CFG], z, draws, None)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    shape = (1, 6, 3, 4, 2)
    longer = (1, 30, 3, 4, 2)
    in_tiles = temporary(shape, SMALL)
    assert temporary(longer, SMALL) == in_tiles
    assert temporary(shape, Tiles(None, 0, None)) > 2 * in_tiles


def test_the_first_encoding_tile_in_time_is_as_without_tiles():
    video = jax.random.uniform(jax.random.key(2), (2, 49, 32, 32, 3)) * 2 - 1
    tiles = Tiles(None, 0, 24, 16)
    got = video_tiles.encode(CFG, PARAMS[CFG], video, tiles)
    plain = jax.jit(partial(video_vae.encode, CFG))(PARAMS[CFG], video)
    assert got.shape == plain.shape
    np.testing.assert_allclose(got[:, :4], plain[:, :4], atol=1e-5)
    assert float(jnp.abs(got[:, 4:] - plain[:, 4:]).max()) > 1e-6


def test_the_result_has_the_dtype_of_the_input():
    z = latent(3).astype(jnp.bfloat16)
    decode = partial(video_tiles.decode, CFG, PARAMS[CFG], tiles=SMALL)
    assert jax.eval_shape(decode, z).dtype == jnp.bfloat16
    encode = partial(video_tiles.encode, CFG, PARAMS[CFG], tiles=ENCODING)
    video = jax.ShapeDtypeStruct((1, 9, 128, 32, 3), jnp.bfloat16)
    assert jax.eval_shape(encode, video).dtype == jnp.bfloat16


def test_what_cannot_be_is_said_before_the_first_chunk():
    with pytest.raises(ValueError, match=r"size must be .* got 80 \(use 64\)"):
        chunks(3, Tiles(size=80))
    with pytest.raises(ValueError, match=r"latent must be \[B f h w 2\]"):
        video_tiles.decode_chunks(CFG, PARAMS[CFG], latent(3, channels=3), SMALL)
    with pytest.raises(ValueError, match=r"frames must be 8k\+1, got 10"):
        video_tiles.encode(CFG, PARAMS[CFG], jnp.zeros((1, 10, 96, 96, 3)), ENCODING)

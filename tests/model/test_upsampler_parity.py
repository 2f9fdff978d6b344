"""The same upsampler in diffusers, through files written by either side."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.config_upsampler import UpsamplerConfig
from idlora_jax.model import upsampler
from idlora_jax.weights import upsampler_files

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of torch and diffusers, on import
]

FORMS = {
    "plain": UpsamplerConfig(4, 32, 1, 3, (2, 1), 1, False),
    "x0.75": UpsamplerConfig(4, 64, 1, 3, (3, 4), 1, True),
    "x1.5 of pictures": UpsamplerConfig(4, 32, 1, 2, (3, 2), 1, True),
    "x4": UpsamplerConfig(4, 32, 0, 3, (4, 1), 1, True),
    "space and time": UpsamplerConfig(4, 32, 1, 3, (2, 1), 2, False),
    "time": UpsamplerConfig(4, 32, 1, 3, (1, 1), 2, False),
}
LATENT = np.random.default_rng(0).normal(size=(2, 3, 5, 6, 4)).astype(np.float32)


def random_params(cfg):
    rng = np.random.default_rng(1)
    params = upsampler.init(cfg, jax.random.key(0))
    return jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params
    )


def their_model(cfg):
    pytest.importorskip("torch")
    module = pytest.importorskip("diffusers.pipelines.ltx2.latent_upsampler")
    return module.LTX2LatentUpsamplerModel(
        in_channels=cfg.channels,
        mid_channels=cfg.width,
        num_blocks_per_stage=cfg.blocks,
        dims=cfg.dims,
        spatial_upsample=cfg.space != (1, 1),
        temporal_upsample=cfg.time == 2,
        rational_spatial_scale=cfg.space[0] / cfg.space[1],
        use_rational_resampler=cfg.rational,
    ).eval()


def their_output(model):
    import torch

    x = torch.from_numpy(np.moveaxis(LATENT, -1, 1).copy())
    with torch.no_grad():
        return np.moveaxis(model(x).numpy(), 1, -1)


def require_equal(got, want):
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_reads_our_file_and_gives_the_same(form, tmp_path):
    cfg, path = FORMS[form], tmp_path / "x.safetensors"
    params, model = random_params(cfg), their_model(cfg)
    upsampler_files.save_upsampler(path, cfg, params)
    from safetensors.torch import load_file

    model.load_state_dict(load_file(path), strict=True)
    got = jax.jit(partial(upsampler.apply, cfg))(params, jnp.asarray(LATENT))
    require_equal(np.asarray(got), their_output(model))


def test_we_read_the_folder_of_diffusers_and_give_the_same(tmp_path):
    model = their_model(FORMS["x1.5 of pictures"])
    model.save_pretrained(tmp_path / "latent_upsampler")
    cfg, params = upsampler_files.load_upsampler(tmp_path)
    assert cfg == FORMS["x1.5 of pictures"]
    got = jax.jit(partial(upsampler.apply, cfg))(params, jnp.asarray(LATENT))
    require_equal(np.asarray(got), their_output(model))
    upsampler_files.convert_upsampler(tmp_path, tmp_path / "ours", say=lambda _: None)
    upsampler_files.export_upsampler(
        tmp_path / "ours", tmp_path / "back", say=lambda _: None
    )
    again, same = upsampler_files.load_upsampler(tmp_path / "back")
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, same, params)

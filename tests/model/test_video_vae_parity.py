"""A decoder that denoises, beside the one of diffusers with the same random weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idlora_jax.config_video_vae import video_vae_config
from idlora_jax.model import conv, video_vae
from idlora_jax.weights import rules, tables

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of torch and diffusers, on import
]

UP = ["compress_all", {"multiplier": 2, "residual": True}]
SECTION = {
    "latent_channels": 3,
    "timestep_conditioning": True,
    "decoder_base_channels": 4,
    "spatial_padding_mode": "reflect",
    "encoder_blocks": [],
    "decoder_blocks": [
        ["res_x", {"num_layers": 1, "inject_noise": True}],
        UP,
        ["res_x", {"num_layers": 2}],
        UP,
        ["res_x", {"num_layers": 1, "inject_noise": True}],
    ],
}
CFG = video_vae_config({"vae": SECTION}, "2.3")


def original(name):
    """The key of a checkpoint for a parameter of diffusers: stages have numbers there.

    0 is their mid block; 2n + 1 is the upsampling of their block n, 2n + 2 the rest.
    """
    name = re.sub(r"^(time_embedder|scale_shift_table)", r"last_\1", name)

    def later(found):
        return f"up_blocks.{2 * int(found[1]) + (1 if found[2] else 2)}."

    name = re.sub(r"^up_blocks\.(\d+)\.(upsamplers\.0\.)?", later, name)
    name = name.replace("mid_block.", "up_blocks.0.")
    return "vae.decoder." + name.replace("resnets.", "res_blocks.")


@pytest.fixture(scope="module")
def theirs():
    torch = pytest.importorskip("torch")
    kind = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_ltx2")
    torch.manual_seed(0)
    model = kind.LTX2VideoDecoder3d(
        in_channels=3,
        block_out_channels=(16, 32),
        spatio_temporal_scaling=(True, True),
        layers_per_block=(1, 2, 1),
        upsample_type=("spatiotemporal",) * 2,
        inject_noise=(True, False, True),
        timestep_conditioning=True,
        upsample_residual=(True, True),
        upsample_factor=(2, 2),
        spatial_padding_mode="reflect",
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "per_channel_scale" in name or "table" in name:
                parameter.normal_(std=0.5)
    return torch, model


def test_the_conditioned_decoder_equals_that_of_diffusers(theirs, monkeypatch):
    torch, model = theirs
    draw, maps = torch.randn, []

    def recorded(*shape, **kwargs):
        maps.append(draw(*shape, **{**kwargs, "generator": None}))
        return maps[-1]

    monkeypatch.setattr(torch, "randn", recorded)
    latent, timestep = draw(2, 3, 3, 2, 3), torch.tensor([0.05, 0.4])
    with torch.no_grad():
        want = model(latent, timestep).numpy()
    named = {original(n): p.detach().numpy() for n, p in model.named_parameters()}
    params = rules.import_(named, tables.BASE)["video_vae"]["decoder"]
    decode = jax.jit(conv.run, static_argnums=0)
    got = decode(
        video_vae.Decoder(CFG),
        params,
        jnp.moveaxis(jnp.asarray(latent.numpy()), 1, -1),
        jnp.asarray(timestep.numpy()),
        tuple(jnp.asarray(m.numpy().squeeze()) for m in maps),
    )
    assert len(maps) == len(CFG.noise_factors) == 4
    error = np.abs(np.moveaxis(np.asarray(got), -1, 1) - want).max()
    assert error < 1e-5 * np.abs(want).max()

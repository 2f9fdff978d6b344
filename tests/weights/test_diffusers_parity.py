"""diffusers' classes and ours on the same folders: each runs what the other wrote."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_bases

from idlora_jax.model import audio_vae, text_connector, transformer, video_vae, vocoder
from idlora_jax.types import AV, Branch, Prompt, stream
from idlora_jax.weights import diffusers_folder, diffusers_open, io

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # of torch and diffusers, on import
]

SHARD = 300_000
generations = pytest.mark.parametrize("generation", ["2.0", "2.3"])


def classes(name):
    """diffusers' classes of a network, by their names."""
    import diffusers
    from diffusers.pipelines import ltx2

    names = diffusers_open.COMPONENTS[name].classes
    return {n: getattr(diffusers, n, None) or getattr(ltx2, n) for n in names}


def theirs(folder, name, generation):
    """diffusers' model of a component's folder; nothing may be missing or left over."""
    part = diffusers_open.COMPONENTS[name]
    kinds = [*classes(name).values()]
    kind = kinds[-1 if generation == "2.3" else 0]
    options = {"subfolder": part.folder, "output_loading_info": True}
    model, report = kind.from_pretrained(folder, **options)
    assert not any(report.values()), report
    return model.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """generation -> (the original file, the folder that we made of it)."""
    out = {}
    for generation in ("2.0", "2.3"):
        place = tmp_path_factory.mktemp("base")
        file = small_bases.write(place / "base.safetensors", generation)
        folder = place / "exported"
        options = {"limit": SHARD, "say": lambda line: None}
        diffusers_folder.export_diffusers(file, folder, **options)
        out[generation] = file, folder
    return out


@pytest.fixture(scope="module")
def models(folders):
    """(generation, network) -> diffusers' model of the folder."""
    return functools.cache(lambda g, name: theirs(folders[g][1], name, g))


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """generation -> a folder that diffusers wrote of these models, in small shards."""

    @functools.cache
    def write(generation):
        folder = tmp_path_factory.mktemp("saved")
        for name, part in diffusers_open.COMPONENTS.items():
            model = models(generation, name)
            model.save_pretrained(folder / part.folder, max_shard_size="200KB")
        return folder

    return write


def rng():
    return np.random.default_rng(7)


def normal(*shape):
    return rng().standard_normal(shape).astype(np.float32)


def last(array, axis=1):
    """Channels from torch's place to ours, or back with `axis` swapped."""
    return np.moveaxis(np.asarray(array), axis, -1)


def first(array):
    return np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1))


def tensor(array):
    import torch

    return torch.from_numpy(np.array(array))


TEXT, STATES, SIGMA = 7, small_bases.STATES, np.float32([0.85, 0.3])


def coordinates():
    scale = np.array([1, 90, 90])[:, None, None]
    video = rng().uniform(0, 4, (2, 3, 12, 1)) * scale
    audio = rng().uniform(-4, 4, (2, 1, 9, 1))
    pairs = ((video, 0.5), (audio, 0.04))
    return [np.concatenate([x, x + step], -1).astype(np.float32) for x, step in pairs]


def transformer_inputs(cfg):
    widths = [cfg.video.width, cfg.audio.width]
    widths = [cfg.caption_channels] * 2 if cfg.caption_projection else widths
    noised = [np.arange(12) >= 4, np.arange(9) < 6]
    return {
        "x": [normal(2, 12, 12), normal(2, 9, 10)],
        "text": [normal(2, TEXT, width) for width in widths],
        "denoise": [np.tile(d, (2, 1)) for d in noised],
        "pos": coordinates(),
    }


def run_transformer(model, cfg):
    i = transformer_inputs(cfg)
    times = [d.astype(np.float32) * SIGMA[:, None] * 1000 for d in i["denoise"]]
    return model(
        hidden_states=tensor(i["x"][0]),
        audio_hidden_states=tensor(i["x"][1]),
        encoder_hidden_states=tensor(i["text"][0]),
        audio_encoder_hidden_states=tensor(i["text"][1]),
        timestep=tensor(times[0]),
        audio_timestep=tensor(times[1]),
        sigma=tensor(SIGMA * 1000),
        video_coords=tensor(i["pos"][0]),
        audio_coords=tensor(i["pos"][1]),
        use_cross_timestep=cfg.cross_sigma == "other",
        return_dict=False,
    )


def our_transformer(cfg, params):
    i = jax.tree.map(jnp.asarray, transformer_inputs(cfg))
    parts = zip(i["x"], i["x"], i["denoise"], i["pos"], strict=True)
    streams = AV(*(stream(*part) for part in parts))

    def run(base):
        variables = {"params": base}
        prepared = transformer.prepare(cfg, variables, streams, (Prompt(*i["text"]),))
        sigma = AV(*[jnp.asarray(SIGMA)] * 2)
        return transformer.apply(cfg, variables, prepared, streams, sigma, (Branch(),))[
            0
        ]

    return jax.jit(run)(params)


def connector_inputs(cfg):
    hidden = normal(STATES, 2, small_bases.LENGTH, cfg.text_width)
    valid = np.arange(small_bases.LENGTH)[None] >= np.array([[20], [61]])
    return hidden, valid


def run_connectors(model, cfg):
    hidden, valid = connector_inputs(cfg)
    states = tensor(np.moveaxis(hidden, 0, -1))
    return model(states, tensor(valid.astype(np.int64)))[:2]


def our_connectors(cfg, params):
    hidden, valid = connector_inputs(cfg)

    def run(params):
        made = text_connector.features(cfg, params, hidden, valid)
        prompt = text_connector.connect(cfg, params, made, valid)
        return prompt.video, prompt.audio

    return jax.jit(run)(params)


def per_channel(model, x, *, back):
    """Statistics are applied by diffusers' pipelines, not by its VAE; x [B C ...]."""
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, std = (s.reshape(shape) for s in (model.latents_mean, model.latents_std))
    return x * std + mean if back else (x - mean) / std


def run_video_vae(model, cfg):
    pixels, latent = np.tanh(normal(1, 9, 32, 64, 3)), normal(1, 2, 2, 2, 4)
    moments = model.encode(tensor(first(pixels))).latent_dist.mode()
    encoded = per_channel(model, moments, back=False)
    decoded = model.decode(per_channel(model, tensor(first(latent)), back=True)).sample
    return [last(x.numpy()) for x in (encoded, decoded)]


def our_video_vae(cfg, params):
    pixels, latent = np.tanh(normal(1, 9, 32, 64, 3)), normal(1, 2, 2, 2, 4)
    encoded = jax.jit(video_vae.encode, static_argnums=0)(cfg, params, pixels)
    return encoded, jax.jit(video_vae.decode, static_argnums=0)(cfg, params, latent)


def per_bin(model, x, *, back):
    """The audio VAE has a statistic per channel and bin; x [B C T M]."""
    batch, channels, frames, bins = x.shape
    flat = x.movedim(2, 1).reshape(batch, frames, channels * bins).movedim(2, 1)
    flat = per_channel(model, flat, back=back).movedim(1, 2)
    return flat.reshape(batch, frames, channels, bins).movedim(1, 2)


def run_audio_vae(model, cfg):
    mel, latent = normal(1, 13, cfg.mel_bins, 2), normal(1, 3, cfg.mel_bins // 4, 2)
    moments = model.encode(tensor(first(mel))).latent_dist.mode()
    decoded = model.decode(per_bin(model, tensor(first(latent)), back=True)).sample
    encoded = per_bin(model, moments, back=False)
    return [last(x.numpy()) for x in (encoded, decoded)]


def our_audio_vae(cfg, params):
    mel, latent = normal(1, 13, cfg.mel_bins, 2), normal(1, 3, cfg.mel_bins // 4, 2)
    encoded = jax.jit(audio_vae.encode, static_argnums=0)(cfg, params, mel)
    return encoded, jax.jit(audio_vae.decode, static_argnums=0)(cfg, params, latent)


def run_vocoder(model, cfg):
    return [model(tensor(first(normal(2, 4, 64, 2))))]


def our_vocoder(cfg, params):
    mel = normal(2, 4, 64, 2)
    return [jax.jit(vocoder.synthesize, static_argnums=0)(cfg, params, mel)]


RUNS = {
    "transformer": (run_transformer, our_transformer),
    "text_connector": (run_connectors, our_connectors),
    "video_vae": (run_video_vae, our_video_vae),
    "audio_vae": (run_audio_vae, our_audio_vae),
    "vocoder": (run_vocoder, our_vocoder),
}


def wanted(model, cfg, name):
    import torch

    with torch.no_grad():
        return [np.asarray(x) for x in RUNS[name][0](model, cfg)]


@generations
@pytest.mark.parametrize("name", RUNS)
def test_networks_agree_on_folders_that_either_wrote(
    folders, models, saved, generation, name
):
    exported = io.open_base(folders[generation][1])
    cfg = io.network_config(exported, name)
    want = wanted(models(generation, name), cfg, name)
    base = io.open_base(saved(generation))
    assert base.generation == generation and io.network_config(base, name) == cfg
    params = io.load_network(base, name)
    got = RUNS[name][1](cfg, params)
    for mine, their in zip(got, want, strict=True):
        assert their.std() > 0.01
        assert np.abs(mine - their).max() < 1e-4 * np.abs(their).max()
    original = io.load_network(io.open_base(folders[generation][0]), name)
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), params, without(original, params)
    )
    assert jax.tree.all(same)


def without(original, like):
    """The original's parameters, less the statistics that diffusers drops."""
    if "stats" not in original:
        return original
    kept = {key: original["stats"][key] for key in like["stats"]}
    return {**original, "stats": kept}

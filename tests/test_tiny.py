"""The tiny checkpoint: complete, repeatable, and of sensible scale everywhere."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from idlora_jax import codecs, config, geometry, mel, presets, prompts, sampling, tiny
from idlora_jax.data import synthetic, tokenize
from idlora_jax.model import audio_vae, transformer, video_vae, vocoder
from idlora_jax.types import AV, AudioGrid, each, stream
from idlora_jax.weights import io, networks, tensorfile

NAMES = (*io.NETWORKS, "text_encoder")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(written):
    checkpoint, folder = written
    return networks.load(checkpoint, NAMES, text_encoder_path=folder)


@pytest.fixture(scope="module")
def clip():
    """A clip the statistics were not measured on."""
    return synthetic.clip(0, 2, 7)


def run(f, model, name, *args):
    nets, params = model
    return np.asarray(
        jax.jit(functools.partial(f, getattr(nets, name)))(params[name], *args)
    )


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_network_loads_completely(model):
    nets, params = model
    assert set(params) == set(NAMES) and nets.generation == "2.0"
    assert nets.transformer == config.tiny()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert len(nets.base_hash) == 64


def test_it_is_small_and_in_the_published_format(written):
    checkpoint, folder = written
    total = sum(len(content) for content in contents(checkpoint.parent).values())
    assert total < 60e6
    head = tensorfile.header(checkpoint)
    assert {io.owner(name) for name in head.tensors} == set(io.NETWORKS)
    kinds = {s.dtype.name for n, s in head.tensors.items() if "scale_shift_table" in n}
    assert kinds == {"float32"}
    rest = {s.dtype.name for n, s in head.tensors.items() if "scale_shift" not in n}
    assert rest == {"bfloat16"}
    assert tensorfile.verify(checkpoint)
    names = tensorfile.header(folder / "model.safetensors").tensors
    assert all(name.startswith("language_model.model.") for name in names)


def test_compression_and_latents_are_the_published_ones(model):
    nets, _ = model
    video, audio, sound = nets.video_vae, nets.audio_vae, nets.vocoder
    assert (video.time_factor, video.space_factor, video.latent_channels) == (
        8,
        32,
        128,
    )
    assert (audio.mel_bins // audio.factor, audio.latent_channels) == (16, 8)
    assert (sound.factor, sound.sample_rate) == (240, 24000)
    assert nets.text_connector.registers == tiny.TEXT_LENGTH == 128
    assert (nets.transformer.rope, nets.transformer.rope_float64) == ("split", True)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(written, tmp_path):
    tiny.write(tmp_path / "again")
    first, again = contents(written[0].parent), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(first[name] == again[name] for name in first)
    cfg = config.tiny()
    shapes = io.shapes_of("transformer", cfg)
    draws = [tiny.random_params("transformer", shapes, seed) for seed in (0, 1)]
    same = jax.tree.map(lambda a, b: float((a == b).mean()), *draws)
    assert max(jax.tree.leaves(same)) < 0.1


def test_latents_of_a_new_clip_are_of_order_one(model, clip):
    video = clip.frames[None].astype(np.float32) / 127.5 - 1
    latent = run(video_vae.encode, model, "video_vae", video)
    assert latent.shape == (1, 3, 2, 2, 128)
    assert 0.5 < rms(latent) < 2 and abs(latent.mean()) < 0.3
    pixels = run(video_vae.decode, model, "video_vae", latent)
    assert pixels.shape == video.shape and 0.1 < rms(pixels) < 1
    wave = mel.resample(clip.wave, clip.rate, 16000)
    spectrum = mel.log_mel(wave)[None]
    sound = run(audio_vae.encode, model, "audio_vae", spectrum)
    assert sound.shape == (1, 18, 16, 8)
    assert 0.5 < rms(sound) < 2 and abs(sound.mean()) < 0.3
    back = run(audio_vae.decode, model, "audio_vae", sound)
    assert back.shape == spectrum.shape and -12 < back.mean() < 0
    heard = run(vocoder.synthesize, model, "vocoder", back)
    assert heard.shape == (1, 2, 69 * 240)
    assert 0.01 < rms(heard) < 0.7 and np.abs(heard).max() < 1


def test_the_statistics_make_the_measured_clips_standard(model):
    clips = [synthetic.clip(0, *divmod(n, 2)) for n in range(tiny.CLIPS)]
    frames = np.stack([c.frames for c in clips]).astype(np.float32) / 127.5 - 1
    mels = np.stack([mel.log_mel(mel.resample(c.wave, c.rate, 16000)) for c in clips])
    video = run(video_vae.encode, model, "video_vae", frames)
    audio = run(audio_vae.encode, model, "audio_vae", mels)
    # Over all but channels (and bins); bfloat16 statistics are off by up to 0.4 %.
    for latent, axes in ((video, (0, 1, 2, 3)), (audio, (0, 1))):
        np.testing.assert_allclose(latent.std(axes), 1, atol=0.01)
        assert np.abs(latent.mean(axes)).max() < 0.05


def prompt(model, folder, text):
    return prompts.encode(*model, tokenize.load(folder), [text])


def test_text_and_transformer_give_values_of_order_one(model, written, clip):
    made = prompt(model, written[1], clip.caption)
    assert made.video.shape == made.audio.shape == (1, 128, 48)
    assert 0.5 < rms(made.video) < 2
    cfg, variables = model[0].transformer, {"params": model[1]["transformer"]}
    grids = AV(geometry.video_grid(17, 64, 64, 25.0), AudioGrid(17))
    keys = AV(*jax.random.split(jax.random.key(0)))

    def tokens(grid, key):
        pos = jnp.asarray(geometry.positions(grid))
        x = jax.random.normal(key, (1, pos.shape[-2], 128))
        return stream(
            x, x, jnp.ones(x.shape[:2], bool), pos.reshape(1, *pos.shape[-3:])
        )

    streams = each(tokens, grids, keys)
    prepared = transformer.prepare(cfg, variables, streams, (made,))
    apply = jax.jit(transformer.bind(cfg))
    for sigma in (1.0, 0.1):
        level = AV(jnp.full(1, sigma), jnp.full(1, sigma))
        (velocity,) = apply(variables, prepared, streams, level)
        for v, s in zip(velocity, streams, strict=True):
            assert v.shape == s.x.shape and 0.5 < rms(v) < 2


def test_the_prompt_matters(model, written):
    one, other = (prompt(model, written[1], text) for text in ("a dog", "a cat"))
    assert rms(one.video - other.video) > 0.1


def test_a_checkpoint_of_2_3_passes_all_checks_and_sounds_at_48_khz(written, tmp_path):
    """All but the transformer's steps, whose compilation would take a minute."""
    embedded, states = tiny.tiny_config("2.3"), 7
    nets = {n: io.read_config(n, embedded, "2.3", states) for n in io.NETWORKS}
    params, path = tiny.drawn(nets, 0), tmp_path / "2.3.safetensors"
    io.save_original(path, params, embedded)
    files = {"base": path, "text_encoder": written[1], "output_dir": tmp_path}
    job, _ = sampling.check(dataclasses.replace(presets.tiny_sample(), **files))
    assert job.nets.generation == "2.3"
    assert (job.nets.vocoder.sample_rate, job.nets.vocoder.factor) == (48000, 480)
    names = ("audio_vae", "vocoder")
    _, loaded = networks.load(path, names, dtype=jnp.bfloat16)
    latents = jax.random.normal(jax.random.key(0), (1, 3, 16, 8))
    _, heard = codecs.decode(job.nets, loaded, AV(None, latents))
    assert heard.shape == (1, 2, (4 * 3 - 3) * 480) and heard.dtype == jnp.float32
    assert 0.01 < rms(heard) < 0.7


def test_any_text_encodes_and_decodes_and_captions_fit(written, clip):
    tokenizer = tokenize.load(written[1])
    assert tokenizer.length == 128 and tokenizer.pad == 0
    inner = Tokenizer.from_file(str(written[1] / "tokenizer.json"))
    for text in ("Grüße, 世界! \n\t🎬", clip.caption, "<weird> [SPEECH]"):
        ids = inner.encode(text).ids
        assert ids[0] == 2 and inner.decode(ids) == text
    _, mask = tokenize.encode(tokenizer, [clip.caption])
    assert mask.sum() < 128


def test_the_text_encoder_is_what_its_config_says(written):
    found = json.loads((written[1] / "config.json").read_text())
    assert found == tiny.gemma_config() and found["model_type"] == "gemma3"


def test_the_command_line_fails_with_one_message(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert tiny.main([str(tmp_path / "file")]) == 1
    assert "got a file, expected a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        tiny.main([])
    assert exit_.value.code == 2

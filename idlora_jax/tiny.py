"""A complete tiny LTX-2 in the real file format, with seeded random weights.

    python -m idlora_jax.tiny DIR [--generation 2.3]

writes DIR/ltx-2-tiny.safetensors (original key names, embedded config) and DIR/gemma/
(config.json, model.safetensors, tokenizer.json), so that every command takes the paths
it takes with the published weights of that generation, 2.0 unless told. Compression
factors, latent channels, statistics and the layout of every network are the real ones;
widths and depths are small.

Weights are normal with variance 1 / fan-in times a gain, so that activations stay near
1 through each network, and rounded to bfloat16 as in the published file. The statistics
of both VAEs are measured on synthetic clips, so that latents have mean 0 and deviation
1 per channel. The networks have learned nothing: what they generate is noise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from idlora_jax import config, mel
from idlora_jax.config import Generation
from idlora_jax.config_text import text_encoder_config
from idlora_jax.data import face, synthetic
from idlora_jax.files import PathLike, problem, replacing
from idlora_jax.model import audio_vae, text_encoder, video_vae, vocoder
from idlora_jax.types import Tree
from idlora_jax.weights import io, leaves, rules, tables, tensorfile

NAME = "ltx-2-tiny.safetensors"
TEXT_ENCODER = "gemma"
TEXT_LENGTH = 128
VOCABULARY = 768
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
CLIPS = 8

_CONNECTOR = {
    "use_embeddings_connector": True,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 3,
    "connector_num_layers": 2,
    "connector_positional_embedding_max_pos": [4096],
    "connector_num_learnable_registers": 128,
    "connector_norm_output": True,
}
_CONNECTOR_2_3 = {
    "connector_apply_gated_attention": True,
    "connector_num_attention_heads": 4,
    "audio_connector_attention_head_dim": 8,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "caption_proj_input_norm": False,
    "text_encoder_norm_type": "per_token_rms",
}
_VIDEO_VAE = {
    "latent_channels": 128,
    "patch_size": 4,
    "encoder_blocks": [
        ["compress_space_res", {"multiplier": 1}],
        ["compress_time_res", {"multiplier": 1}],
        ["compress_all_res", {"multiplier": 1}],
        ["res_x", {"num_layers": 1}],
        ["compress_all_res", {"multiplier": 1}],
    ],
    "decoder_blocks": [
        ["compress_all", {"residual": True, "multiplier": 1}],
        ["compress_all", {"residual": True, "multiplier": 1}],
        ["compress_all", {"residual": True, "multiplier": 1}],
        ["res_x", {"num_layers": 1, "inject_noise": False}],
    ],
    "latent_log_var": "uniform",
    "causal_decoder": False,
    "timestep_conditioning": False,
}
_VIDEO_VAE_2_3 = {"spatial_padding_mode": "zeros", "decoder_base_channels": 16}
_AUDIO_VAE = {
    "model": {
        "params": {
            "sampling_rate": 16000,
            "ddconfig": {
                "double_z": True,
                "mel_bins": 64,
                "z_channels": 8,
                "resolution": 256,
                "in_channels": 2,
                "out_ch": 2,
                "ch": 128,
                "ch_mult": [1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "mid_block_add_attention": False,
                "norm_type": "pixel",
                "causality_axis": "height",
            },
        }
    },
    "preprocessing": {
        "stft": {"filter_length": 1024, "hop_length": 160, "win_length": 1024},
        "mel": {"n_mel_channels": 64, "mel_fmin": 0, "mel_fmax": 8000},
    },
}
_VOCODER = {
    "upsample_initial_channel": 64,
    "upsample_rates": [6, 5, 2, 2, 2],
    "upsample_kernel_sizes": [16, 15, 8, 4, 4],
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
    "resblock": "1",
    "stereo": True,
}
_SNAKES = {
    "resblock": "AMP1",
    "activation": "snakebeta",
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "stereo": True,
    "use_tanh_at_final": False,
    "use_bias_at_final": False,
}
_VOCODER_2_3 = {
    "vocoder": {
        **_SNAKES,
        "upsample_initial_channel": 64,
        "upsample_rates": [5, 2, 2, 2, 2, 2],
        "upsample_kernel_sizes": [11, 4, 4, 4, 4, 4],
    },
    "bwe": {
        **_SNAKES,
        "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [12, 11, 4, 4, 4],
        "apply_final_activation": False,
        "input_sampling_rate": 16000,
        "output_sampling_rate": 48000,
        "hop_length": 80,
        "n_fft": 512,
        "win_size": 512,
        "num_mels": 64,
    },
}


def tiny_config(generation: Generation = "2.0") -> dict[str, Any]:
    """The embedded config of the tiny checkpoint, all sections."""
    newer = generation == "2.3"
    text = _CONNECTOR | (_CONNECTOR_2_3 if newer else {})
    return {
        "transformer": config.tiny_section(generation) | text,
        "vae": _VIDEO_VAE | (_VIDEO_VAE_2_3 if newer else {}),
        "audio_vae": _AUDIO_VAE,
        "vocoder": _VOCODER_2_3 if newer else _VOCODER,
    }


def gemma_config() -> dict[str, Any]:
    """The config.json of the tiny text encoder, spelled as the published one."""
    text = {
        "model_type": "gemma3_text",
        "vocab_size": VOCABULARY,
        "hidden_size": config.tiny().caption_channels,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 32,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    }
    kind = "Gemma3ForConditionalGeneration"
    return {"architectures": [kind], "model_type": "gemma3", "text_config": text}


def _generator_gains(path: str, section: dict[str, Any]) -> dict[str, float]:
    # Log-mel values of speech lie around -6, a few units apart; a stage puts zeros
    # between its samples; snakes amplify.
    gain = 0.4 if section["resblock"] == "AMP1" else 1.0
    rates = enumerate(section["upsample_rates"])
    stages = {f"{path}/up_{n}/kernel": gain * rate**0.5 for n, rate in rates}
    return {f"{path}/conv_in/kernel": 0.2, f"{path}/conv_out/kernel": 1.0, **stages}


_GAINS = {
    "audio_vae/decoder/conv_out/kernel": 3.0,
    "video_vae/decoder/conv_out/kernel": 0.5,
    **_generator_gains("vocoder", _VOCODER),
    **_generator_gains("vocoder/base", _VOCODER_2_3["vocoder"]),
    **_generator_gains("vocoder/bwe", _VOCODER_2_3["bwe"]),
}
_OFFSETS = {"audio_vae/decoder/conv_out/bias": -6.0}


def _random(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """One parameter: kernels by fan-in, tables and norms around what `init` gives."""
    leaf = path.rpartition("/")[2]
    noise = rng.standard_normal(shape, np.float32)
    if leaf == "kernel":
        codec = path.startswith(("video_vae", "audio_vae", "vocoder"))
        fan_in = math.prod(shape[:-1]) if codec else shape[-2]
        return _GAINS.get(path, 1.0) * fan_in**-0.5 * noise
    if leaf == "scale":
        around = 0.0 if path.startswith("text_encoder") else 1.0
        return around + 0.1 * noise
    if leaf.endswith("table") or leaf == "embedding":
        return shape[-1] ** -0.5 * noise
    if leaf == "registers":
        return noise
    return _OFFSETS.get(path, 0.0) + 0.02 * noise


def random_params(name: str, shapes: Tree, seed: int) -> Tree:
    """Random parameters of a network, bfloat16 but for tables (float32).

    Args:
        name: of the network; gives it its own numbers.
        shapes: its tree of things with a shape.
        seed: gives the same numbers on every machine.
    """
    flat = {}
    for path, like in sorted(rules.flatten(shapes).items()):
        full = f"{name}/{path}"
        rng = np.random.default_rng([seed, *full.encode()])
        values = _random(full, tuple(like.shape), rng)
        kept = path.endswith("table")
        flat[path] = values if kept else values.astype(ml_dtypes.bfloat16)
    return rules.nest(flat)


def _with_stats(params: Tree, latents: jax.Array, axes: tuple[int, ...]) -> Tree:
    """`params` with mean and deviation of `latents` over all but the channel `axes`."""
    x = np.moveaxis(np.asarray(latents, np.float64), axes, range(len(axes)))
    x = x.reshape(math.prod(x.shape[: len(axes)]), -1)
    measured = {"mean": x.mean(1), "std": np.maximum(x.std(1), 1e-3)}
    stats = {k: v.astype(ml_dtypes.bfloat16) for k, v in measured.items()}
    return {**params, "stats": {**params["stats"], **stats}}


def _neutral(params: Tree) -> Tree:
    """Float32 parameters with statistics that change nothing."""
    stats = {
        n: np.full(v.shape, float(n != "mean"), ml_dtypes.bfloat16)
        for n, v in params["stats"].items()
    }
    return jax.tree.map(lambda x: x.astype(np.float32), {**params, "stats": stats})


def calibrated(
    nets: Mapping[str, Any], params: Mapping[str, Tree], clips: Sequence[synthetic.Clip]
) -> dict[str, Tree]:
    """Parameters with both VAEs' statistics measured on clips.

    Args:
        nets: configurations by network name.
        params: parameters by network name.
        clips: of one size; latents of these get mean 0, deviation 1 per channel.
    """
    video_cfg, audio_cfg = nets["video_vae"], nets["audio_vae"]
    frames = np.stack([clip.frames for clip in clips]).astype(np.float32) / 127.5 - 1
    waves = [mel.resample(c.wave, c.rate, audio_cfg.sample_rate) for c in clips]
    mels = np.stack([mel.log_mel(wave, rate=audio_cfg.sample_rate) for wave in waves])
    encode = jax.jit(video_vae.encode, static_argnums=0)
    video = encode(video_cfg, _neutral(params["video_vae"]), frames)
    encode = jax.jit(audio_vae.encode, static_argnums=0)
    audio = encode(audio_cfg, _neutral(params["audio_vae"]), mels)
    return {
        **params,
        "video_vae": _with_stats(params["video_vae"], video, (4,)),
        "audio_vae": _with_stats(params["audio_vae"], audio, (3, 2)),
    }


def drawn(nets: Mapping[str, Any], seed: int) -> dict[str, Tree]:
    """Random parameters of networks; buffers of the vocoder have their true values."""
    out = {n: random_params(n, io.shapes_of(n, cfg), seed) for n, cfg in nets.items()}
    return {**out, "vocoder": vocoder.with_buffers(nets["vocoder"], out["vocoder"])}


def tokenizer(captions: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer: any text encodes; words of `captions` are short."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    palettes = (face.SKIN, face.HAIR, face.EYES, face.SHIRT, face.WALL)
    words = " ".join(f"{word} " for palette in palettes for word in palette)
    made.train_from_iterator([*captions, *[words] * 4], trainer)
    bos = SPECIAL.index("<bos>")
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return made


def _write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_gemma(folder: PathLike, seed: int, captions: Sequence[str]) -> Path:
    """Write a tiny Gemma-3 folder: tokenizer, config.json, model.safetensors."""
    folder = Path(folder)
    cfg = text_encoder_config(gemma_config())
    like = jax.eval_shape(lambda key: text_encoder.init(cfg, key), jax.random.key(0))
    params = random_params("text_encoder", like, seed)
    needed = leaves.sources("text_encoder", params, tables.GEMMA)
    entries = leaves.original_entries(leaves.from_arrays(params, needed), needed)
    tensorfile.write(folder / "model.safetensors", entries, {"format": "pt"})
    with replacing(folder / "tokenizer.json") as temporary:
        tokenizer(captions).save(str(temporary))
    names = {f"{word[1:-1]}_token": word for word in SPECIAL}
    more = {"model_max_length": TEXT_LENGTH, "padding_side": "left"}
    more["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(folder / "tokenizer_config.json", names | more)
    _write_json(folder / "config.json", gemma_config())
    return folder


def write(
    folder: PathLike, seed: int = 0, *, generation: Generation = "2.0"
) -> tuple[Path, Path]:
    """Write the tiny model; the same seed gives the same bytes.

    Args:
        folder: is made.
        seed: of weights and text encoder.
        generation: of the checkpoint.

    Returns:
        The checkpoint file and the text encoder's folder.

    Raises:
        ValueError: if the folder is a file.
        OSError: if they cannot be written.
    """
    folder, embedded = Path(folder), tiny_config(generation)
    if folder.exists() and not folder.is_dir():
        raise problem("tiny", folder, "a file", "a folder", "choose another name")
    clips = [synthetic.clip(seed, *divmod(n, 2)) for n in range(CLIPS)]
    states = gemma_config()["text_config"]["num_hidden_layers"] + 1
    nets = {n: io.read_config(n, embedded, generation, states) for n in io.NETWORKS}
    params = calibrated(nets, drawn(nets, seed), clips)
    io.save_original(folder / NAME, params, embedded)
    write_gemma(folder / TEXT_ENCODER, seed, [clip.caption for clip in clips])
    return folder / NAME, folder / TEXT_ENCODER


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tiny model into the folder that the command line names."""
    parser = argparse.ArgumentParser("idlora_jax.tiny", description=write.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generation", choices=("2.0", "2.3"), default="2.0")
    args = parser.parse_args(argv)
    try:
        checkpoint, text_encoder_folder = write(
            args.folder, args.seed, generation=args.generation
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {checkpoint} and {text_encoder_folder} (random weights)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

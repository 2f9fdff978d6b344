"""Media -> latents: from clips and captions to the folder that training reads.

    frames u8 [F H W 3] --video VAE--> latents/                  [C f h w]  bfloat16
    sound f32 [2 N]     --audio VAE--> audio_latents/            [C T M]    float32
    next clip's sound   --audio VAE--> reference_audio_latents/  [C T M]    float32
    caption             --Gemma tower--> conditions/             [S D]      bfloat16

One safetensors file a clip and folder, under the clip's name. A clip is encoded whole
before its first file is written, and `latents/`, from which readers take the names,
comes last; a clip that cannot be used is left out with its reason and the others go on.
T is the number of audio latents that belong to the video's length: the encoder is
causal, so cutting later latents equals never having heard them.

    python -m idlora_jax.data.preprocess --manifest clips/metadata.jsonl \
        --base ltx-2-19b-dev.safetensors --text-encoder gemma-3-12b-it --output latents/

Source: ltx_trainer scripts/process_videos.py and process_captions.py.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Float32, UInt8
from tqdm import tqdm

from idlora_jax import codecs, commandline, geometry, media, prompts, sound
from idlora_jax.config_codecs import AudioVAEConfig
from idlora_jax.config_video_vae import VideoVAEConfig
from idlora_jax.data import layout, manifest, tokenize
from idlora_jax.data.latents import AUDIO, REFERENCE, TEXT, VIDEO
from idlora_jax.data.manifest import Clip
from idlora_jax.data.tokenize import TextTokenizer
from idlora_jax.model import video_vae
from idlora_jax.types import AV, Tree, VideoGrid
from idlora_jax.weights import networks, tensorfile
from idlora_jax.weights.networks import Networks

MISSING_SOUND_S = 0.1
"""Sound that ends this much before its video is padded with silence, as containers
often cut it a little shorter; a clip that lacks more is left out."""


@dataclass(frozen=True)
class Options:
    """Encode clips and captions into the folder that training reads.

    Attributes:
        manifest: a .jsonl file, one clip a line: video, caption, speaker.
        base: the LTX-2 checkpoint whose VAEs encode.
        text_encoder: the folder of gemma-3-12b-it.
        output: folder for the latents.
        frames: of each clip, 8k+1.
        height: pixels, a multiple of 32.
        width: pixels, a multiple of 32.
        fps: frames per second; clips at other rates are resampled.
        dtype: of the text encoder; the VAEs compute in float32.
        skip_existing: leave clips alone whose files are there, of this size.
    """

    manifest: Path
    base: Path
    text_encoder: Path
    output: Path
    frames: int = 121
    height: int = 512
    width: int = 512
    fps: float = 25.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    skip_existing: bool = False

    def __post_init__(self) -> None:
        """Check sizes."""
        geometry.audio_grid(self.grid.frames, self.grid.fps)

    @property
    def grid(self) -> VideoGrid:
        """The size of every clip."""
        return geometry.video_grid(self.frames, self.height, self.width, self.fps)


class Outcome(NamedTuple):
    """What became of a clip; `reason` says why it was left out."""

    name: str
    state: Literal["written", "existing", "rejected"]
    reason: str = ""


class Encoders(NamedTuple):
    """The networks that encode, their parameters by name, and the tokenizer."""

    nets: Networks
    params: Mapping[str, Tree]
    tokenizer: TextTokenizer


def load(options: Options) -> Encoders:
    """Read the networks that preprocessing needs.

    Raises:
        ValueError: if a file is missing or is not what it should be.
    """
    names = ("text_encoder", "text_connector", "video_vae", "audio_vae")
    nets, params = networks.load(
        options.base,
        names,
        text_encoder_path=options.text_encoder,
        dtype=jnp.dtype(options.dtype),
    )
    return Encoders(nets, params, tokenize.load(options.text_encoder))


@functools.partial(jax.jit, static_argnums=0)
def _encode_video(
    cfg: VideoVAEConfig, params: Tree, frames: UInt8[Array, "F H W 3"]
) -> Float[Array, "f h w C"]:
    pixels = frames.astype(jnp.float32) / 127.5 - 1
    return video_vae.encode(cfg, params, pixels[None])[0]


def encode_video(
    cfg: VideoVAEConfig, params: Tree, path: Path, grid: VideoGrid
) -> Float32[np.ndarray, "f h w C"]:
    """Latents of a clip's first frames, scaled to cover the grid and centre-cropped.

    Raises:
        ValueError: if the file cannot be read or is too short.
    """
    frames = media.read_video(path, grid.fps, grid.frames)
    frames = media.resize_crop(frames, grid.height, grid.width)
    return np.asarray(_encode_video(cfg, params, jnp.asarray(frames)))


def encode_sound(
    cfg: AudioVAEConfig, params: Tree, path: Path, grid: VideoGrid
) -> Float32[np.ndarray, "T M C"]:
    """Audio latents that accompany a clip's first frames.

    Raises:
        ValueError: if the file cannot be read, has no sound, or it is silent or ends
            before the video does.
    """
    wave = media.read_audio(path, cfg.sample_rate)
    wanted = round(geometry.seconds(grid) * cfg.sample_rate)
    missing = wanted - wave.shape[1]
    if missing > MISSING_SOUND_S * cfg.sample_rate:
        raise ValueError(
            f"{path}: got {wave.shape[1] / cfg.sample_rate:.2f} s of sound, expected "
            f"{geometry.seconds(grid):.2f} s; ask for fewer frames"
        )
    wave = np.pad(wave[:, :wanted], ((0, 0), (0, max(0, missing))))
    if np.abs(wave).max() < sound.SILENCE:
        raise ValueError(
            f"{path}: silent in its first {geometry.seconds(grid):.2f} s; cut the clip "
            "to where someone speaks"
        )
    latents = codecs.encode_reference(cfg, params, wave)[0]
    return np.asarray(latents)[: geometry.audio_grid(grid.frames, grid.fps).frames]


def _write(path: Path, arrays: layout.Arrays, clip: Clip) -> None:
    entries = [tensorfile.entry(name, array) for name, array in arrays.items()]
    tensorfile.write(path, entries, {"source": clip.name})


def _has_shape(path: Path, shape: Sequence[int]) -> bool:
    try:
        return tensorfile.header(path).tensors["latents"].shape == tuple(shape)
    except (ValueError, KeyError, OSError):
        return False


def is_complete(options: Options, nets: Networks, name: str) -> bool:
    """Whether all files of a clip are there, for clips of this size."""
    grid, voice = options.grid, nets.audio_vae
    heard = geometry.audio_grid(grid.frames, grid.fps).frames
    sounds = (voice.latent_channels, heard, voice.mel_bins // voice.factor)
    shapes = {
        VIDEO: (nets.video_vae.latent_channels, *geometry.latent_shape(grid)),
        AUDIO: sounds,
        REFERENCE: sounds,
    }
    files = {
        kind: layout.file_of(options.output, kind, name) for kind in layout.FOLDERS
    }
    fits = (_has_shape(files[kind], shape) for kind, shape in shapes.items())
    return files[TEXT].is_file() and all(fits)


class Encoded(NamedTuple):
    """A clip's latents and the clip whose sound is its reference."""

    video: np.ndarray
    sound: np.ndarray
    reference: Clip
    reference_sound: np.ndarray


def write_clip(
    options: Options, encoders: Encoders, clip: Clip, encoded: Encoded
) -> None:
    """Encode the caption of a clip, then write its four files, `latents/` last.

    Raises:
        OSError: if a file cannot be written.
    """
    nets, params, tokenizer = encoders
    features, mask = prompts.features(nets, params, tokenizer, [clip.caption])
    features = AV(*(np.asarray(x[0]) for x in features))
    shared = nets.text_connector.features == "range"
    condition = layout.condition_file(features, np.asarray(mask[0]), shared=shared)
    files = {
        TEXT: (condition, clip),
        REFERENCE: (layout.sound_file(encoded.reference_sound), encoded.reference),
        AUDIO: (layout.sound_file(encoded.sound), clip),
        VIDEO: (layout.video_file(encoded.video, options.fps), clip),
    }
    for kind in layout.FOLDERS:
        _write(layout.file_of(options.output, kind, clip.name), *files[kind])


def _sounds(
    options: Options, encoders: Encoders, group: Sequence[Clip]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Audio latents by name, and the reasons where there are none."""
    cfg, params = encoders.nets.audio_vae, encoders.params["audio_vae"]
    good, bad = {}, {}
    for clip in group:
        try:
            good[clip.name] = encode_sound(cfg, params, clip.video, options.grid)
        except (ValueError, OSError) as error:
            bad[clip.name] = str(error)
    return good, bad


def _encode_clip(
    options: Options,
    encoders: Encoders,
    clip: Clip,
    sounds: Mapping[str, np.ndarray],
    group: Sequence[Clip],
) -> Outcome:
    ref = manifest.reference(clip, group, sounds)
    if ref is None:
        reason = f"no other clip of {clip.speaker} has sound to refer to"
        return Outcome(clip.name, "rejected", reason)
    cfg, params = encoders.nets.video_vae, encoders.params["video_vae"]
    try:
        video = encode_video(cfg, params, clip.video, options.grid)
    except (ValueError, OSError) as error:
        return Outcome(clip.name, "rejected", str(error))
    encoded = Encoded(video, sounds[clip.name], ref, sounds[ref.name])
    write_clip(options, encoders, clip, encoded)
    return Outcome(clip.name, "written")


def encode_group(
    options: Options, encoders: Encoders, group: Sequence[Clip]
) -> Iterator[Outcome]:
    """Encode all clips of one speaker, each with the next as its reference."""
    todo = list(group)
    if options.skip_existing:
        todo = [c for c in group if not is_complete(options, encoders.nets, c.name)]
    for clip in group:
        if clip not in todo:
            yield Outcome(clip.name, "existing")
    good, bad = _sounds(options, encoders, group if todo else ())
    for clip in todo:
        if clip.name in bad:
            yield Outcome(clip.name, "rejected", bad[clip.name])
        else:
            yield _encode_clip(options, encoders, clip, good, group)


def run(options: Options, encoders: Encoders | None = None) -> tuple[Outcome, ...]:
    """Encode every clip of the manifest that can be encoded.

    Args:
        options: what to encode, how, and where to.
        encoders: from `load`; read here if None.

    Returns:
        What became of each clip.

    Raises:
        ValueError: if the manifest or the networks cannot be read.
        OSError: if a file cannot be written.
    """
    clips = manifest.read(options.manifest)
    encoders = load(options) if encoders is None else encoders
    outcomes = []
    with tqdm(total=len(clips), unit="clip", desc="encode", disable=None) as bar:
        for group in manifest.by_speaker(clips).values():
            for outcome in encode_group(options, encoders, group):
                outcomes.append(outcome)
                bar.update()
    return tuple(outcomes)


def summary(outcomes: Sequence[Outcome], output: Path) -> str:
    """The result in words: counts, then one line a clip that was left out."""
    count = Counter(outcome.state for outcome in outcomes)
    text = f"{output}: wrote {count['written']} of {len(outcomes)} clips"
    if count["existing"]:
        text += f", {count['existing']} were there already"
    left_out = [f"  {o.name}: {o.reason}" for o in outcomes if o.state == "rejected"]
    if left_out:
        text += f", left out {len(left_out)}:"
    return "\n".join([text, *left_out])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: status 0, or 1 if a clip was left out; usage errors are 2."""
    options = tyro.cli(Options, args=argv, prog="python -m idlora_jax.data.preprocess")
    outcomes = run(options)
    print(summary(outcomes, options.output))
    failed = any(outcome.state == "rejected" for outcome in outcomes)
    return commandline.FAILURE if failed else 0


if __name__ == "__main__":
    commandline.guarded(main)

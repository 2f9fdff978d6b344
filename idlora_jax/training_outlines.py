"""A training run without its numbers: shapes of all it holds, and its traced functions.

    nets, params = built_in("2.3")       as published, where there is no base
    run = of(config, nets, clips)
    run.state, run.batch(4), run.step, run.evaluation

Nothing is read but headers and one clip, and nothing is allocated. What is traced are
the functions that run: `training.make_train_step`, `evaluation.make_evaluate`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax import ShapeDtypeStruct as Shape

from idlora_jax import (
    axes,
    config,
    evaluation,
    fitting,
    geometry,
    hosted,
    optimizers,
    outlines,
    records,
    strategies,
    training,
)
from idlora_jax.assumed import Assume
from idlora_jax.config import Generation, TransformerConfig
from idlora_jax.config_text import TextConnectorConfig
from idlora_jax.data.collection import Collection
from idlora_jax.data.stored import Stored
from idlora_jax.experiment import TrainConfig
from idlora_jax.model import text_connector
from idlora_jax.strategies import Batch
from idlora_jax.training import TrainState
from idlora_jax.types import AV, Prompt, Rate, Tree
from idlora_jax.weights import catalog, rules
from idlora_jax.weights.fp8 import INPUT_SCALE, SCALE, Choice
from idlora_jax.weights.leaves import Leaf, Narrow
from idlora_jax.weights.networks import Networks
from idlora_jax.weights.tensorfile import Spec

NAMES = ("transformer", "text_connector")
"""The networks that training loads."""
TEXT = 1024
"""Tokens of a stored prompt."""
_IN_8_BITS: Mapping[Generation, int] = {"2.0": 42, "2.3": 44}
"""How many layers of the published files in 8 bits are so."""


@dataclass(frozen=True)
class Nets:
    """What the networks of training are; `Networks` say so of all."""

    transformer: TransformerConfig
    text_connector: TextConnectorConfig
    generation: Generation


@dataclass(frozen=True)
class Clips:
    """What decides the shapes of a batch.

    Attributes:
        fps: frames per second.
        like: one clip as it is stored, in shapes; sounds as long as the longest.
        ragged: whether (sounds, references) differ in length.
    """

    fps: float
    like: Stored
    ragged: tuple[bool, bool] = (False, False)


def _longest(sound: Any, frames: int) -> Any:
    return None if sound is None else Shape((frames, *sound.shape[1:]), sound.dtype)


def of_collection(clips: Collection) -> Clips:
    """The largest clips of a collection; one of them is read.

    Raises:
        ValueError: if its files are damaged.
    """
    index = max(clips.buckets, key=lambda one: math.prod(one.clips[0].video))
    found = index.load(index.clips[0])
    like = jax.tree.map(lambda x: Shape(x.shape, x.dtype), found)
    like = like._replace(
        audio=_longest(like.audio, index.audio),
        reference=_longest(like.reference, index.reference),
    )
    return Clips(index.fps, like, index.ragged)


def assumed(assume: Assume, folders: tuple[str, ...], nets: Nets | Networks) -> Clips:
    """Clips as a dry run assumes them, with what the folders hold.

    Args:
        assume: their size.
        folders: that a training mode reads (`fitting.folders`).
        nets: whose text features they have.
    """
    narrow = np.dtype(ml_dtypes.bfloat16)
    grid = geometry.video_grid(assume.frames, assume.height, assume.width, assume.fps)
    video = Shape((*geometry.latent_shape(grid), geometry.VIDEO_CHANNELS), narrow)

    def sound(seconds: float) -> Shape:
        frames = math.ceil(seconds * geometry.AUDIO_LATENTS_PER_S)
        cells = geometry.AUDIO_BINS, geometry.AUDIO_CHANNELS
        return Shape((frames, *cells), np.dtype(np.float32))

    connector = nets.text_connector
    sides = (connector.video.width, connector.audio.width)
    features = AV(*(Shape((TEXT, n), narrow) for n in sides))
    parts = {
        "audio_latents": sound(assume.frames / assume.fps),
        "reference_audio_latents": sound(assume.reference_s),
        "reference_latents": video,
    }
    audio, reference, seen = (parts[f] if f in folders else None for f in parts)
    mask = Shape((TEXT,), np.dtype(bool))
    like = Stored._make((video, audio, reference, features, mask, seen))
    return Clips(assume.fps, like)


def _published(path: str, like: Any, generation: Generation, choice: Choice) -> Leaf:
    """A parameter as published files hold it, without its numbers."""

    def piece(_: int) -> np.ndarray:
        raise AssertionError("a parameter without numbers was read")

    kinds = np.float32 if path.endswith("table") else ml_dtypes.bfloat16
    spec = Spec(tuple(like.shape), np.dtype(kinds))
    narrow = None
    stacked = path.startswith("blocks/") and path.endswith("/kernel")
    if choice == "keep" and stacked:
        at = tuple(range(1, _IN_8_BITS[generation] + 1))
        scale = Leaf(Spec((len(at),), np.dtype(np.float32)), len(at), piece)
        scales = {SCALE: scale, INPUT_SCALE: scale}
        narrow = Narrow(np.dtype(ml_dtypes.float8_e4m3fn), at, True, scales)
    return Leaf(spec, like.shape[0] if like.shape else 1, piece, narrow)


def built_in(
    generation: Generation,
    dtype: str = "bfloat16",
    choice: Choice = "upcast",
    where: hosted.Where = "device",
) -> tuple[Nets, dict[str, Tree]]:
    """The published networks that training uses, and shapes of their parameters.

    Args:
        generation: which.
        dtype: of the parameters.
        choice: of kernels in 8 bits; "keep" stands for the published files with such.
        where: where kernels of the transformer's blocks are.
    """
    section = config.published(generation)
    made = {name: catalog.read_config(name, section, generation) for name in NAMES}
    nets, params = Nets(**made, generation=generation), {}
    for name in NAMES:
        flat = rules.flatten(catalog.shapes_of(name, made[name]))
        main = name == "transformer"
        own: Choice = choice if main else "upcast"
        found = {p: _published(p, like, generation, own) for p, like in flat.items()}
        place: hosted.Where = where if main else "device"
        params[name] = outlines.shapes(found, jnp.dtype(dtype), own, place)
    return nets, params


@dataclass(frozen=True)
class Outline:
    """A training run in shapes.

    Attributes:
        config: its settings, for the base's generation (`experiment.of_generation`).
        nets: what the networks are.
        params: shapes of "transformer" and "text_connector" as they are loaded.
        clips: the largest ones.
    """

    config: TrainConfig
    nets: Nets | Networks
    params: Mapping[str, Tree]
    clips: Clips

    @property
    def parts(self) -> int:
        """Over how many devices the clips of a batch are divided."""
        return axes.parts(axes.parse(self.config.mesh))

    @functools.cached_property
    def task(self) -> training.Task:
        """What is trained."""
        args = self.config, self.nets.transformer, float(self.clips.fps)
        return fitting.task_for(*args)

    @functools.cached_property
    def tx(self) -> Any:
        """The optimizer."""
        config = self.config
        return optimizers.make_optimizer(config.optimizer, config.steps, ema=config.ema)

    @property
    def frozen(self) -> Tree:
        """What is not trained: the base, nothing in mode "full"."""
        return {} if self.config.mode == "full" else self.params["transformer"]

    @functools.cached_property
    def state(self) -> TrainState:
        """What training changes."""

        tx = self.tx  # reads its schedule: not while something is traced

        def start(base: Tree) -> TrainState:
            made, frozen = fitting.trained(self.config, base)
            return training.init(made, frozen, tx)

        return jax.eval_shape(start, self.params["transformer"])

    @functools.cached_property
    def prompt(self) -> Prompt:
        """Of one clip, [1 S D] each."""
        connect = functools.partial(
            text_connector.connect,
            self.nets.text_connector,
            numerics=self.config.numerics,
        )
        features, mask = jax.tree.map(
            lambda x: Shape((1, *x.shape), x.dtype),
            (self.clips.like.features, self.clips.like.mask),
        )
        return jax.eval_shape(connect, self.params["text_connector"], features, mask)

    def batch(self, count: int) -> Batch:
        """So many clips, as `latents.collate` gives them."""
        like, ragged = self.clips.like, self.clips.ragged
        sounds = like.audio, like.reference
        lengths = Shape((count,), np.dtype(np.int32))
        sizes = [
            lengths if differ and sound is not None else None
            for differ, sound in zip(ragged, sounds, strict=True)
        ]
        one = jax.tree.map(lambda x: Shape(x.shape[1:], x.dtype), self.prompt)
        many = functools.partial(
            jax.tree.map, lambda x: Shape((count, *x.shape), x.dtype)
        )
        rows = (like.video, *sounds, one)
        seen = many(like.video_reference)
        return Batch._make((*map(many, rows), *sizes, seen, Rate(self.clips.fps)))

    @property
    def share(self) -> int:
        """Clips of a step that one device works on, those of all its batches."""
        return max(1, self.config.clips_per_step // self.parts)

    @property
    def tokens(self) -> int:
        """Target and reference tokens of a clip."""
        return records.tokens(self.batch(1))

    def _step(self, tx: Any) -> Any:
        step = training.make_train_step(self.task, tx, jax.random.key(0))
        state = self.state._replace(
            opt_state=jax.eval_shape(tx.init, self.state.adapter)
        )
        args = state, hosted.traceable(self.frozen), self.batch(self.share)
        return step.trace(*args).jaxpr  # pyright: ignore

    @functools.cached_property
    def step(self) -> Any:
        """One training step of one device's clips, as a jaxpr."""
        return self._step(self.tx)

    @functools.cached_property
    def idle_step(self) -> Any:
        """The same with an optimizer that does nothing."""
        return self._step(optax.set_to_zero())

    @property
    def held(self) -> int:
        """Clips of the fixed evaluation that one device works on."""
        count = self.config.heldout.clips
        return count if count % self.parts else count // self.parts

    @property
    def noise(self) -> AV:
        """Of these clips."""
        batch, spec = self.batch(self.held), self.config.strategy
        draw = lambda key: strategies.draw(key, batch, spec).noise
        return jax.eval_shape(draw, jax.random.key(0))

    @functools.cached_property
    def evaluation(self) -> Any:
        """The fixed evaluation as a jaxpr, or None."""
        if not self.config.heldout.clips:
            return None
        batch, noise = self.batch(self.held), self.noise
        levels = Shape((len(self.config.heldout.sigmas),), np.dtype(np.float32))
        run = evaluation.make_evaluate(self.task).velocities
        frozen = hosted.traceable(self.frozen)
        args = self.state.adapter, frozen, batch, levels, noise
        return run.trace(*args).jaxpr  # pyright: ignore

    def other(self, config: TrainConfig) -> Outline:
        """The run with other settings."""
        return of(config, self.nets, self.clips)


def of(config: TrainConfig, nets: Nets | Networks, clips: Clips) -> Outline:
    """A run in shapes.

    Args:
        config: its settings, for the base's generation.
        nets: what the networks are.
        clips: the largest ones.

    Raises:
        ValueError: if the base is there, and unreadable or incomplete.
    """
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "choice": config.weights,
        "where": config.weights_in,
    }
    if config.base.exists():
        params = outlines.parameters(config.base, names=NAMES, **options)
    else:
        params = built_in(nets.generation, **options)[1]
    return Outline(config, nets, params, clips)

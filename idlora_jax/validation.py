"""Clips sampled while training goes on, by the functions that `sample.py` calls.

    plan(run) -> Planned               settings and files checked; no weights yet
    session(planned, now) -> Session   the clips of one step
    load(planned) -> Loaded            prompts encoded, decoders read, in host memory
    Sampler(planned, loaded, ...)      (updates, state) -> clips, for `loop.Hooks`

    output/samples/step_<updates>/<name>.mp4, .wav, .png, .json
    output/samples/step_<updates>_ema/...       of the moving average

A clip is what `sample.py` makes of the adapter that is exported at that step, bit by
bit on CPU, and its JSON says so: with that file `sample.py` finds it finished. The base
is that of training. The VAEs, the vocoder and an upsampler are on the device only while
clips are made. Nothing that training depends on is touched.

What fails ends one clip, and is told; a disk that cannot be written to ends the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax

from idlora_jax import (
    adapters,
    batches,
    checkpoints,
    commandline,
    finished,
    jobs,
    outputs,
    parallel,
    runs,
    sampling,
    sessions,
)
from idlora_jax.checkpoints import AdapterMeta
from idlora_jax.experiment import TrainConfig
from idlora_jax.jobs import Opened
from idlora_jax.monitoring import Samples
from idlora_jax.prompt_cache import Say
from idlora_jax.records import Sampled
from idlora_jax.runs import Run
from idlora_jax.sample_config import SampleConfig
from idlora_jax.sessions import Loaded, Outcome
from idlora_jax.settings import UsageError
from idlora_jax.training import TrainState
from idlora_jax.types import Tree

FOLDER = "samples"
NETWORKS = ("video_vae", "audio_vae", "vocoder")
OWN = frozenset(
    "prompt negative_prompt reference_audio first_frame continue_from name seed frames "
    "height width fps".split()
)
"""Settings that each clip has for itself."""


@dataclass(frozen=True)
class Planned:
    """What is sampled, checked.

    Attributes:
        run: what is trained.
        configs: one for each clip, without the adapter that is trained.
        found: networks, and adapters of the configurations' own.
        warnings: (name, line) of what is likely to make a bad clip.
    """

    run: Run
    configs: tuple[SampleConfig, ...]
    found: Opened
    warnings: tuple[tuple[str, str], ...] = ()


class Now(NamedTuple):
    """What is sampled at one step.

    Attributes:
        label: where the clips stand in the logs.
        folder: where they are written.
        path: where what is trained is exported to.
        tree: what is trained, unscaled.
        about: facts of it.
    """

    label: str
    folder: Path
    path: Path
    tree: Tree
    about: AdapterMeta


def _source(samples: Samples) -> SampleConfig:
    """The configuration file's values."""
    assert samples.config is not None, "Samples asks for one"
    try:
        made = commandline.load_config(samples.config, SampleConfig)
        if samples.prompts_file is None:
            return made
        return replace(made, prompts_file=samples.prompts_file, input_dir=None)
    except ValueError as error:
        said = str(error).removeprefix("--config: ")
        raise ValueError(f"samples.config: {said}") from None


def _check_equal(configs: Sequence[SampleConfig]) -> None:
    """Raise unless the clips can pass the networks one after the other."""
    names = [config.name for config in configs]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"samples.clips: got several of the name {twice[0]!r}, expected different "
            "ones; rename one"
        )
    for field in dataclasses.fields(SampleConfig):
        values = [getattr(config, field.name) for config in configs]
        other = next((v for v in values if v != values[0]), None)
        if field.name not in OWN and other is not None:
            raise ValueError(
                f"samples.clips: got {field.name} {values[0]!r} and {other!r}, "
                "expected one for all clips"
            )


def wanted(config: TrainConfig, warn: batches.Warn) -> tuple[SampleConfig, ...]:
    """One configuration for each clip, with base, dtype, weights and mesh of training.

    Args:
        config: `samples` says what is sampled.
        warn: called with a line for each unknown key of a prompts file.

    Raises:
        ValueError: naming what was got, what was expected, and what to do.
    """
    samples = config.samples
    given = samples.clips or (_source(samples),)
    encoder = samples.text_encoder
    made = tuple(
        replace(
            one,
            base=config.base,
            dtype=config.dtype,
            weights=config.weights,
            weights_in=config.weights_in,
            text_encoder=one.text_encoder if encoder is None else encoder,
            output_dir=config.output / FOLDER,
            mesh=config.mesh,
            memory="off",
            preview=0,
            overwrite=False,
            verify=False,
        )
        for one in given
    )
    every = tuple(clip for one in made for clip in batches.read(one, warn))
    _check_equal(every)
    return every


def plan(run: Run) -> Planned | None:
    """Check everything about the clips that can be checked without reading weights.

    Args:
        run: what is trained.

    Returns:
        What is sampled; None: nothing is.

    Raises:
        ValueError: naming what was got, what was expected, and what to do.
    """
    if not run.config.samples.every:
        return None
    if jax.process_count() > 1:
        raise UsageError(
            f"samples.every: got {run.config.samples.every} with {jax.process_count()} "
            "processes, expected 0: clips are sampled where one process trains; "
            "use sample.py with the exported adapters"
        )
    said: list[tuple[str, str]] = []
    configs = wanted(run.config, lambda line: said.append(("samples", line)))
    try:
        found = jobs.opened(configs[0])
    except ValueError as error:
        raise ValueError(f"samples: {error}") from None
    now = Now("", Path(), run.adapter(0), {}, run.meta)
    for config, bare in zip(configs, _with(now, configs, run), strict=True):
        try:
            job, _ = jobs.read(bare, _opened(now, found, bare, run))
        except ValueError as error:
            raise ValueError(f"samples: {config.name}: {error}") from None
        said += [(config.name, line) for line in job.warnings]
    return Planned(run, configs, found, tuple(said))


def _with(
    now: Now, configs: Sequence[SampleConfig], run: Run
) -> tuple[SampleConfig, ...]:
    """The clips' configurations at a step: with its folder and its adapter, at 1."""

    def one(config: SampleConfig) -> SampleConfig:
        config = replace(config, output_dir=now.folder)
        if run.config.mode == "full":
            return config
        factors = config.lora_strength and (*config.lora_strength, 1.0)
        return replace(config, lora=(*config.lora, now.path), lora_strength=factors)

    return tuple(map(one, configs))


def _opened(now: Now, found: Opened, config: SampleConfig, run: Run) -> Opened:
    """What is shared by the clips of a step: the adapter as its file would give it."""
    if run.config.mode == "full":
        trained = f"{found.nets.base_hash}, trained: {now.path.stem}"
        return found._replace(nets=replace(found.nets, base_hash=trained))
    name = jobs.adapter_names(config.lora)[-1]
    parts = {**found.parts, name: {"transformer": now.tree}}
    return found._replace(parts=parts, metas={**found.metas, name: now.about})


def load(planned: Planned, say: Say) -> Loaded:
    """Encode the prompts, let go of the text encoder, read decoders into host memory.

    Args:
        planned: from `plan`.
        say: takes a line about prompts that could not be kept.

    Raises:
        ValueError: if weights are missing or do not fit.
    """
    config, found = planned.configs[0], planned.found
    changes = jobs.text_parts(config, found)
    prompts = sampling.texts(planned.configs, found.nets, changes, say)
    params = sampling.load(config, found.nets, NETWORKS)
    return Loaded(jax.device_get(params), prompts)


def _renewed(config: SampleConfig, found: Opened) -> SampleConfig:
    """Replacing what stands there of another adapter.

    It is from before a state that the run went back to, on a device whose sums are
    not always the same.
    """
    if not (config.output_dir / f"{config.name}.json").is_file():
        return config
    try:
        finished.is_finished(jobs.read(config, found)[0])
    except ValueError:
        return replace(config, overwrite=True)
    return config


def session(planned: Planned, now: Now) -> sessions.Session:
    """The clips of one step, as `sample.py` would prepare them.

    Args:
        planned: from `plan`.
        now: the step, and what is trained then.

    Raises:
        ValueError: if none of them can be made.
        OSError: if their folder cannot be written to.
    """
    run = planned.run
    if run.config.mode == "lora":
        # On the host, as a file would give it: so that sampling compiles to what
        # `sample.py` compiles to, however training holds its state.
        scaled = jax.device_get(adapters.scale(now.tree, run.config.lora.factor))
        about = replace(now.about, content_hash=checkpoints.content_hash(scaled))
        now = now._replace(tree=scaled, about=about)
    configs = _with(now, planned.configs, run)
    found = _opened(now, planned.found, configs[0], run)
    return sessions.prepare([_renewed(config, found) for config in configs], found)


def _moments(run: Run, updates: int, state: TrainState) -> Iterator[Now]:
    """What is sampled of a state: what is trained and, if asked for, its average."""
    folder, count = run.config.output / FOLDER, 1 + run.config.samples.ema
    facts = runs.exports(run, state)[:count]
    for end, own in zip(("", "_ema"), facts, strict=False):
        yield Now(FOLDER + end, folder / f"step_{updates:05d}{end}", *own)


def _refuse(folder: Path, error: OSError) -> NoReturn:
    reason = error.strerror or str(error)
    raise OSError(
        error.errno,
        f"could not write the samples in {folder} ({reason}); the states and adapters "
        "saved before are still there: free some disk space and go on with --resume",
    ) from error


def _sampled(label: str, outcome: Outcome) -> Sampled:
    config = outcome.config
    name = f"{label}/{config.name}"
    if outcome.error is not None:
        if isinstance(outcome.error, OSError):
            _refuse(config.output_dir, outcome.error)
        return Sampled(name, message=outcome.message)
    every = {k: config.output_dir / f"{config.name}.{k}" for k in outputs.KINDS}
    files = {kind: path for kind, path in every.items() if path.is_file()}
    return Sampled(name, files, new=outcome.state == "written")


@dataclass(frozen=True)
class Sampler:
    """Samples the clips with what is trained; `loop.Hooks.sample`.

    Attributes:
        planned: from `plan`.
        loaded: from `load`.
        transformer: from what is trained to the transformer's parameters as
            `sample.py` would read them: those of the base, where an adapter is trained.
    """

    planned: Planned
    loaded: Loaded
    transformer: Callable[[Tree], Tree]

    def __call__(self, updates: int, state: TrainState) -> Iterator[Sampled]:
        """The clips of a step, made one by one; none where none are due.

        Raises:
            OSError: if they cannot be written.
        """
        config = self.planned.run.config
        if config.samples.due(updates, config.steps):
            for now in _moments(self.planned.run, updates, state):
                yield from self._clips(now)

    def _clips(self, now: Now) -> Iterator[Sampled]:
        try:
            clips = session(self.planned, now)
            made = self._made(clips, now.tree) if clips.todo else ()
            for outcome in itertools.chain(clips.outcomes, made):
                yield _sampled(now.label, outcome)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            yield Sampled(now.label, message=str(error).strip().partition("\n")[0])
        except OSError as error:
            _refuse(now.folder, error)

    def _made(self, session: sessions.Session, trained: Tree) -> Iterator[Outcome]:
        mesh = sampling.mesh_of(session.todo[0])
        host = self.loaded.params.items()
        params = {name: parallel.place(tree, mesh, name) for name, tree in host}
        if mesh is None:
            params = jax.device_put(params)
        params["transformer"] = self.transformer(trained)
        loaded = self.loaded._replace(params=params)
        return sessions.make(session, loaded=loaded)


def sampler(
    planned: Planned, loaded: Loaded, transformer: Callable[[Tree], Tree]
) -> Sampler:
    """A `Sampler`, after what a kill left half-written was removed."""
    folder = planned.run.config.output / FOLDER
    for path in folder.glob(f"step_*/{outputs.TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    return Sampler(planned, loaded, transformer)

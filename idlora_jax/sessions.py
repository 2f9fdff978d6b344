"""Many samples from one reading of the weights: what `sample.py` does.

    prepare(configs) -> Session      all files checked, finished samples left out
    make(session) -> Outcomes        texts, then the other networks, then the samples

The networks are read once, whatever the number of samples. Samples of equal shapes pass
the transformer together, `batch` at a time, each with the noise of its own seed. What
goes wrong with a sample is its outcome, and the others go on; files are only there when
they are complete.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from idlora_jax import (
    jobs,
    memory,
    previews,
    prompt_cache,
    sampling,
    tile_choice,
    trajectories,
)
from idlora_jax.data import tokenize
from idlora_jax.experiment import plain
from idlora_jax.finished import is_finished, trajectory
from idlora_jax.jobs import Inputs, Job, Opened, check
from idlora_jax.outputs import keep_inputs, write
from idlora_jax.pipeline import Request, Seen, Watch, layouts
from idlora_jax.prompt_cache import Say
from idlora_jax.sample_config import SampleConfig
from idlora_jax.tile_choice import Cut
from idlora_jax.types import Layout, Prompt, Tree

FAILURES = (ValueError, OSError, jax.errors.JaxRuntimeError)
"""What ends one sample, and not the others; a device without memory among them."""

WatchNamed = Callable[[Sequence[str], Seen], Any]
"""(names of the samples that pass together, what is seen of them)."""


class Outcome(NamedTuple):
    """What became of a sample.

    Attributes:
        config: its settings.
        state: "skipped" if it was finished before.
        paths: of the files that were written.
        message: what went wrong, in one line.
        error: the same as it was raised.
    """

    config: SampleConfig
    state: Literal["written", "skipped", "failed"]
    paths: tuple[Path, ...] = ()
    message: str = ""
    error: Exception | None = None


class Loaded(NamedTuple):
    """What samples need beside their own files.

    Attributes:
        params: of all networks but the text side, by network.
        prompts: by text.
        seconds: how long each took to read.
    """

    params: Mapping[str, Tree]
    prompts: Mapping[str, Prompt]
    seconds: Mapping[str, float] = {}


@dataclass(frozen=True)
class Session:
    """Samples that were checked.

    Attributes:
        found: what all of them share.
        todo: those that are to be made.
        outcomes: of those that are not: finished before, or something is wrong.
        warnings: (name, line) of what is likely to make a bad clip.
        memory: what they need of the device, a table for each shape.
        tiles: that their videos are decoded in, where memory decided it, by layout.
    """

    found: Opened
    todo: tuple[SampleConfig, ...]
    outcomes: tuple[Outcome, ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()
    memory: tuple[str, ...] = ()
    tiles: Mapping[Layout, Cut] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps of all samples that are to be made."""
        plans = (jobs.plan_of(config) for config in self.todo)
        return sum(stage.sigmas.steps for plan in plans for stage in plan.stages)


class _Ready(NamedTuple):
    job: Job
    inputs: Inputs
    request: Request


class _Shared(NamedTuple):
    """What all groups of a session use."""

    found: Opened
    loaded: Loaded
    colours: Callable[[], previews.LinearMap]
    watch: WatchNamed | None
    tiles: Mapping[Layout, Cut]

    def cut(self, job: Job) -> Cut:
        """How the sample is decoded."""
        return self.tiles.get(job.layout, tile_choice.explicit(job.config))


def _failed(config: SampleConfig, error: Exception) -> Outcome:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return Outcome(config, "failed", message=lines[0], error=error)


def _clip(config: SampleConfig) -> Path:
    return config.output_dir / f"{config.name}.mp4"


def _follow(config: SampleConfig, outcomes: Sequence[Outcome]) -> None:
    """Raise if the clip that a sample goes on from was to be made here, and failed."""
    for before in outcomes:
        if before.state == "failed" and _clip(before.config) == config.continue_from:
            raise ValueError(f"continue_from: {before.config.name} failed")


def prepare(configs: Sequence[SampleConfig], found: Opened | None = None) -> Session:
    """Check all samples, before any weights of the base are read.

    One that goes on from another that is still to be made is checked in its turn.

    Args:
        configs: from `batches.read`: they share all files but those of media.
        found: from `jobs.opened`, where that is known; None: opened here.

    Raises:
        ValueError: if nothing can be made: weights that do not fit each other, or
            anything wrong with the only sample.
        OSError: if the only sample's output folder cannot be written to.
    """
    found = jobs.opened(configs[0]) if found is None else found
    todo: list[SampleConfig] = []
    outcomes: list[Outcome] = []
    warnings: list[tuple[str, str]] = []
    judge = _judge(configs, found)
    for config in configs:
        try:
            _follow(config, outcomes)
            if config.continue_from not in [_clip(before) for before in todo]:
                job, inputs = check(config, found)
                keep_inputs(job)
                if is_finished(job):
                    outcomes.append(Outcome(config, "skipped"))
                    continue
                lines = (*job.warnings, *judge.lines(job, inputs))
                warnings += [(config.name, line) for line in lines]
            todo.append(config)
        except FAILURES as error:
            if len(configs) == 1:
                raise
            outcomes.append(_failed(config, error))
    said = tuple(warnings), tuple(judge.tables)
    return Session(found, tuple(todo), tuple(outcomes), *said, judge.tiles)


@dataclass(frozen=True)
class _Judge:
    """Whether samples fit into the device, each shape asked once.

    Attributes:
        batch: how many samples pass together, at most.
        options: of `memory.for_job`.
        said: what was said of the shapes so far.
        tables: of their memory plans.
        tiles: that their videos are decoded in, by layout.
    """

    batch: int
    options: Mapping[str, Any]
    said: dict[Any, ValueError | None] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    tiles: dict[Layout, Cut] = field(default_factory=dict)

    def lines(self, job: Job, inputs: Inputs) -> tuple[str, ...]:
        """What is to be said of a sample that does not fit.

        Raises:
            ValueError: if that is an error.
        """
        if job.config.memory == "off":
            return ()
        config = replace(job.config, batch=self.batch)
        job, voices = replace(job, config=config), [w.shape for w in inputs.waves]
        begins = inputs.image is not None, inputs.ending is not None
        key = job.layout, tuple(voices), begins
        line = None
        if key not in self.said:
            most = memory.limit()
            plan = memory.for_job(job, inputs, most=most, **self.options)
            self.tiles[job.layout] = plan.tiles
            if plan.table() not in self.tables:
                self.tables.append(plan.table())
            self.said[key] = None
            try:
                line = memory.check(job, inputs, plan, most, **self.options)
            except ValueError as error:
                self.said[key] = error
        error = self.said[key]
        if error is not None:
            raise error
        return () if line is None else (line,)


def _judge(configs: Sequence[SampleConfig], found: Opened) -> _Judge:
    config = configs[0]
    batch = min(config.batch, len(configs))
    if config.memory == "off":
        return _Judge(batch, {})
    texts = [text for c in configs for text in (c.prompt, c.negative_prompt)]
    args = (config, found.nets, texts, jobs.text_parts(config, found))
    length = tokenize.load(config.text_encoder).length
    encodes = bool(prompt_cache.lacking(*args))
    return _Judge(batch, {"text_length": length, "encodes": encodes})


def make(
    session: Session,
    watch: WatchNamed | None = None,
    note: Say | None = None,
    loaded: Loaded | None = None,
) -> Iterator[Outcome]:
    """Make the samples of a session; outcomes come as they are known.

    Args:
        session: from `prepare`.
        watch: called after every step of every group of samples.
        note: takes a line about prompts that could not be kept, and what is likely to
            make a bad clip of those that could not be checked before.
        loaded: what `load` gives, where it is there already.

    Raises:
        ValueError: if weights are missing or do not fit.
    """
    if not session.todo:
        return
    loaded = load(session, note) if loaded is None else loaded
    shared, known = _shared(session, loaded, watch), [*session.outcomes]
    told = {name for name, _ in session.warnings}

    def ready(config: SampleConfig) -> _Ready | Outcome:
        _follow(config, known)
        one = _ready(config, shared)
        if isinstance(one, _Ready) and note and config.name not in told:
            for line in one.job.warnings:
                note(f"{config.name}: {line}")
        return one

    for group in _groups(session.todo, ready):
        alone = isinstance(group, Outcome)
        for outcome in (group,) if alone else _outcomes(group, shared):
            known.append(outcome)
            yield outcome


def rehearse(session: Session, loaded: Loaded) -> Iterator[Outcome]:
    """Go through the samples of a session as `make` does, and write nothing.

    Args:
        session: from `prepare`.
        loaded: of `load`, or shapes in place of parameters (see `precompile`).

    Yields:
        The samples that nothing can be said of yet, or for which it fails.
    """
    shared = _shared(session, loaded, None)
    for group in _groups(session.todo, lambda config: _ready(config, shared)):
        if isinstance(group, Outcome):
            yield group
            continue
        made, config = [one.job for one in group], group[0].job.config
        # Steps are dispatched one by one where anything looks at them.
        looks = config.progress or config.preview or config.save_trajectory
        watch = (lambda seen: None) if looks else None
        requests = [one.request for one in group]
        try:
            args = (made, group[0].inputs, requests, loaded.params)
            result = sampling.run(*args, watch, shared.cut(made[0]))
            for n, job in enumerate(made):
                sampling.single(job, result, n)
        except FAILURES as error:
            yield from (_failed(job.config, error) for job in made)


def load(session: Session, note: Say | None = None) -> Loaded:
    """Encode the texts of a session, then read the other networks.

    Args:
        session: from `prepare`.
        note: takes a line about prompts that could not be kept.

    Raises:
        ValueError: if weights are missing or do not fit.
    """
    found, config = session.found, session.todo[0]
    nets, clock = found.nets, [time.perf_counter()]
    changes = jobs.text_parts(config, found)
    prompts = sampling.texts(session.todo, nets, changes, note)
    clock.append(time.perf_counter())
    params = sampling.load(config, nets)
    clock.append(time.perf_counter())
    text_s, load_s = np.diff(clock).tolist()
    return Loaded(params, prompts, {"text": text_s, "load": load_s})


def _shared(session: Session, loaded: Loaded, watch: WatchNamed | None) -> _Shared:
    cfg, params = session.found.nets.video_vae, loaded.params
    colours = functools.cache(lambda: previews.fit(cfg, params["video_vae"]))
    return _Shared(session.found, loaded, colours, watch, session.tiles)


def _ready(config: SampleConfig, shared: _Shared) -> _Ready | Outcome:
    """A sample in its turn: read again, since pictures of all would fill the memory."""
    job, inputs = check(config, shared.found)
    if is_finished(job):
        return Outcome(config, "skipped")
    loaded = shared.loaded
    request = sampling.request(job, inputs, loaded.params, loaded.prompts)
    return _Ready(job, inputs, request)


def _groups(
    configs: Sequence[SampleConfig], ready: Callable[[SampleConfig], _Ready | Outcome]
) -> Iterator[Outcome | list[_Ready]]:
    """Samples of equal shapes, `batch` at a time, and what is known before."""
    waiting: dict[Any, list[_Ready]] = {}
    for config in configs:
        if config.continue_from is not None:
            # Perhaps from one of those that wait.
            yield from waiting.values()
            waiting = {}
        try:
            one = ready(config)
        except FAILURES as error:
            one = _failed(config, error)
        if isinstance(one, Outcome):
            yield one
            continue
        leaves, structure = jax.tree.flatten(one.request)
        key = one.job.layout, structure, tuple(x.shape for x in leaves)
        waiting.setdefault(key, []).append(one)
        if len(waiting[key]) >= config.batch:
            yield waiting.pop(key)
    yield from waiting.values()


def _outcomes(group: Sequence[_Ready], shared: _Shared) -> Iterator[Outcome]:
    """Make samples together, and write them one by one."""
    made = [one.job for one in group]
    keep = made[0].config.save_trajectory
    recorder = trajectories.Recorder() if keep else None
    watch = _watching([job.config for job in made], recorder, shared)
    start, requests = time.perf_counter(), [one.request for one in group]
    try:
        args = (made, group[0].inputs, requests, shared.loaded.params)
        result = sampling.run(*args, watch, shared.cut(made[0]))
    except FAILURES as error:
        yield from (_failed(job.config, error) for job in made)
        return
    own = (time.perf_counter() - start) / len(group)
    seconds = {**shared.loaded.seconds, "sample": own}
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    for n, job in enumerate(made):
        try:
            one = sampling.single(job, result, n)
            if recorder is not None:
                _keep(job, recorder, n)
            paths = write(job, one, seconds)
        except FAILURES as error:
            yield _failed(job.config, error)
        else:
            yield Outcome(job.config, "written", tuple(paths))


def _keep(job: Job, recorder: trajectories.Recorder, sample: int) -> None:
    facts = {
        "settings": plain(job.config),
        "layouts": [plain(size) for size in layouts(job.plan, job.layout)],
        "model": {"hash": job.nets.base_hash, "generation": job.nets.generation},
    }
    path = trajectory(job.config)
    trajectories.save(path, recorder.steps, sample=sample, facts=facts)


def _watching(
    configs: Sequence[SampleConfig],
    recorder: trajectories.Recorder | None,
    shared: _Shared,
) -> Watch | None:
    """All that looks at the steps of a group; None: nothing does."""
    watchers: list[Watch] = [] if recorder is None else [recorder]
    if every := configs[0].preview:
        paths = [c.output_dir / f"{c.name}.preview.png" for c in configs]
        watchers.append(previews.Watcher(paths, every, shared.colours))
    if shared.watch is not None:
        names = [config.name for config in configs]
        watchers.append(functools.partial(shared.watch, names))
    if not watchers:
        return None
    return lambda seen: [watcher(seen) for watcher in watchers]

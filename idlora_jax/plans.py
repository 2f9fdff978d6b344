"""Pipelines as data: which solver, which noise levels, which guidance, per stage.

A `Stage` is one run of the sampler, a `Plan` the stages in order. Everything here is
static and holds no array, but for scales that are given as one; what the numbers mean
is said once, in `solvers`, `schedules` and `guidance`. A stage's guidance is linear,

    x0 = x0_0 + sum_g w_g (x0_0 - x0_g),

over its terms, with w_g from the scales (video, audio) given here: s - 1 for text
guidance and the bimodal term, s for STG and identity guidance. A scale that does
nothing (1 or 0) makes the term absent, so that its forward pass is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from idlora_jax import geometry, guidance, schedules, solvers
from idlora_jax.denoise import Mode
from idlora_jax.guidance import Term
from idlora_jax.references import USUAL, Placing
from idlora_jax.solvers import Solver
from idlora_jax.types import AV, Branch, Layout, Numerics

Real = float | int
Scale = tuple[guidance.Scale, guidance.Scale]
"""(video, audio)."""

SOLVERS: Mapping[str, Callable[[], Solver]] = {
    "euler": solvers.euler,
    "res2s": solvers.res2s,
    "gradient_estimation": solvers.gradient_estimation,
}


def _known(what: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"plans: {what} {name!r} is unknown, use one of {[*names]}")


@dataclass(frozen=True)
class Sigmas:
    """How to make a stage's noise levels.

    Attributes:
        name: one of `RECIPES`.
        steps: how many; the distilled lists have their own number.
        tokens: what the shift of "ltx2" counts; None: the video's latent tokens.
    """

    name: str = "ltx2"
    steps: int = 30
    tokens: int | None = schedules.MANY_TOKENS

    def __post_init__(self) -> None:
        _known("schedule", self.name, [*RECIPES])

    def table(
        self, layout: Layout, numerics: Numerics = "exact"
    ) -> Float[np.ndarray, " N"]:
        """The falling noise levels for a clip of this size, the last one 0."""
        return RECIPES[self.name](self, layout, numerics)


def _ltx2(recipe: Sigmas, layout: Layout, numerics: Numerics) -> np.ndarray:
    tokens = recipe.tokens
    if tokens is None:
        if layout.video is None:
            raise ValueError(
                "plans: tokens=None counts video tokens, but there is no video; give "
                f"a number ({schedules.MANY_TOKENS})"
            )
        tokens = geometry.tokens(layout.video)
    return schedules.ltx2(recipe.steps, tokens=tokens, numerics=numerics)


RECIPES: Mapping[str, Callable[[Sigmas, Layout, Numerics], np.ndarray]] = {
    "ltx2": _ltx2,
    "linear_quadratic": lambda recipe, *_: schedules.linear_quadratic(recipe.steps),
    "beta": lambda recipe, *_: schedules.beta(recipe.steps),
    "distilled": lambda *_: schedules.distilled(),
    "stage2_distilled": lambda *_: schedules.stage2_distilled(),
}


@dataclass(frozen=True)
class Levels:
    """Noise levels of one's own, used as they are.

    Attributes:
        values: falling, the first at most 1, the last usually 0.
    """

    values: tuple[Real, ...]

    @property
    def steps(self) -> int:
        """How many steps they make."""
        return len(self.values) - 1

    def table(
        self, layout: Layout, numerics: Numerics = "exact"
    ) -> Float[np.ndarray, " N"]:
        """The levels; the size of the clip does not matter."""
        return np.array(self.values, np.float32)


PLAIN = Branch()
VIDEO_ONLY = Branch(reads=frozenset({"video"}))
"""What a pass does where all audio is given (`starts.refine`)."""
ALWAYS = (0.0, 1.0)
"""The window of all noise levels."""


@dataclass(frozen=True)
class Stage:
    """One run of the sampler.

    Attributes:
        name: for messages and records.
        solver: one of `SOLVERS`, or one's own.
        sigmas: the noise levels.
        terms: guidance directions; each costs a forward pass per model call.
        scales: (video, audio) per term.
        adapters: (name, strength) of the adapters in use.
        positive: what the positive pass does; the terms' passes start from it. What it
            does not read has to be given.
        placing: where references lie.
        branches: how the passes of a step are laid out; results are equal.
        rescale: share, for video and audio, by which guidance's change of deviation is
            undone; None: off.
        refines: whether it starts from the stage before, at twice the size.

    Raises:
        ValueError: if there is not one scale per term, or the solver is unknown.
    """

    name: str
    solver: str | Solver = "euler"
    sigmas: Sigmas | Levels = Sigmas()
    terms: tuple[Term, ...] = ()
    scales: tuple[Scale, ...] = ()
    adapters: tuple[tuple[str, Real], ...] = ()
    positive: Branch = PLAIN
    placing: Placing = USUAL
    branches: Mode = "sweep"
    rescale: tuple[Real, Real] | None = None
    refines: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.solver, str):
            _known("solver", self.solver, [*SOLVERS])
        if len(self.terms) != len(self.scales):
            raise ValueError(
                f"plans: stage {self.name!r} has {len(self.terms)} terms and "
                f"{len(self.scales)} scales; give one (video, audio) pair per term"
            )

    def weights(self, sigmas: Float[np.ndarray, " N"]) -> Float[Any, "steps terms 2"]:
        """The weight of each term in each step, for video and audio.

        Args:
            sigmas: the stage's noise levels, the last one included.
        """
        names = (term.name for term in self.terms)
        scales = dict(zip(names, self.scales, strict=True))
        return guidance.weights(self.terms, scales, sigmas[:-1])


@dataclass(frozen=True)
class Plan:
    """The stages of a pipeline, in order.

    Raises:
        ValueError: if there is none, or the first would refine nothing.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].refines:
            raise ValueError("plans: a plan needs a first stage that does not refine")


def solver_of(stage: Stage) -> Solver:
    """The stage's solver."""
    solver = stage.solver
    return SOLVERS[solver]() if isinstance(solver, str) else solver


def without_reference(stage: Stage) -> Stage:
    """The stage for a request without reference: terms that drop it are absent."""
    pairs = zip(stage.terms, stage.scales, strict=True)
    return _with_terms(stage, [(t, s) for t, s in pairs if not t.drop_ref])


def _with_terms(stage: Stage, pairs: Sequence[tuple[Term, Scale]]) -> Stage:
    """The stage with those of the terms that do something."""
    kept = [(t, s) for t, s in pairs if not all(_is_off(v, t.neutral) for v in s)]
    terms, scales = (tuple(part[i] for part in kept) for i in range(2))
    return replace(stage, terms=terms, scales=scales)


def _is_off(scale: guidance.Scale, neutral: float) -> bool:
    """Whether a scale does nothing at any noise level, as far as can be seen."""
    if isinstance(scale, guidance.Window):
        scale = scale.scale if scale.outside == neutral else np.nan
    return not (callable(scale) or isinstance(scale, jax.Array)) and scale == neutral


@dataclass(frozen=True)
class Scales:
    """How far predictions are pushed, by term.

    A scale is a number, an array (a traced one, too) or a schedule: any function of the
    noise level. Windows are noise levels (lowest, highest) outside of which a term is
    off.

    Attributes:
        video_cfg: text guidance of the video; 1 is off.
        audio_cfg: text guidance of the audio; 1 is off.
        identity: guidance of the audio towards the reference voice; 0 is off.
        stg: guidance away from skipped self-attention; 0 is off.
        stg_layer: the layer whose self-attention is skipped.
        bimodal: guidance away from unconnected video and audio; 1 is off.
        video_star: whether the negative prediction of the video's text guidance is
            scaled first.
        audio_star: the same of the audio's.
        text_window: when text guidance is on.
        identity_window: when identity guidance is on.
        stg_window: when STG is on.
        bimodal_window: when the bimodal term is on.
        video_rescale: share of the change of deviation that is undone, video.
        audio_rescale: the same, audio.
        apg: whether text guidance is projected; see `guidance.Apg`.
        apg_eta: its `eta`.
        apg_norm: its `norm_threshold`; 0: any.
        apg_momentum: factor of the running sum of its directions; 0: none.
    """

    video_cfg: guidance.Scale = 3.0
    audio_cfg: guidance.Scale = 7.0
    identity: guidance.Scale = 3.0
    stg: guidance.Scale = 1.0
    stg_layer: int = 29
    bimodal: guidance.Scale = 3.0
    video_star: bool = False
    audio_star: bool = False
    text_window: Sequence[Real] = ALWAYS
    identity_window: Sequence[Real] = ALWAYS
    stg_window: Sequence[Real] = ALWAYS
    bimodal_window: Sequence[Real] = ALWAYS
    video_rescale: Real = 0.0
    audio_rescale: Real = 0.0
    apg: bool = False
    apg_eta: Real = 1.0
    apg_norm: Real = 0.0
    apg_momentum: Real = 0.0

    def pairs(self) -> list[tuple[Term, Scale]]:
        """The terms with their scales for video and audio, off ones included."""
        found = [
            (self._text(), (self.video_cfg, self.audio_cfg), self.text_window),
            (guidance.identity(), (0.0, self.identity), self.identity_window),
            (guidance.stg([self.stg_layer]), (self.stg,) * 2, self.stg_window),
            (guidance.bimodal(), (self.bimodal,) * 2, self.bimodal_window),
        ]
        return [(term, _within(window, s, term)) for term, s, window in found]

    def _text(self) -> Term:
        if self.apg:
            shape = guidance.Apg(self.apg_eta, self.apg_norm or None)
            term = guidance.text_cfg(shape)
            return replace(term, momentum=self.apg_momentum or None)
        switches = AV(self.video_star, self.audio_star)
        star = AV(*(guidance.star if on else None for on in switches))
        return guidance.text_cfg(star if any(switches) else None)

    def rescale(self) -> tuple[Real, Real] | None:
        """`Stage.rescale`."""
        shares = self.video_rescale, self.audio_rescale
        return shares if any(shares) else None


def _within(window: Sequence[Real], scales: Scale, term: Term) -> Scale:
    """Scales that are off outside of a window of noise levels."""
    low, high = window
    if (low, high) == ALWAYS:
        return scales

    def one(scale: guidance.Scale) -> guidance.Scale:
        if not callable(scale):
            return guidance.Window(scale, low, high, term.neutral)
        return lambda sigma: scale(sigma) if low <= sigma <= high else term.neutral

    video, audio = scales
    return one(video), one(audio)


DEFAULT = Scales()
HQ = Scales(stg=0.0, stg_layer=28, video_star=True, audio_star=True)
DISTILLED = Scales(video_cfg=1.0, audio_cfg=1.0, identity=0.0, stg=0.0, bimodal=1.0)


def _first(
    name: str,
    scales: Scales,
    sigmas: Sigmas,
    adapters: Mapping[str, Real] | None,
    *,
    solver: str = "euler",
    branches: Mode = "sweep",
) -> Stage:
    used = tuple((adapters or {}).items())
    stage = Stage(
        name,
        solver,
        sigmas,
        adapters=used,
        branches=branches,
        rescale=scales.rescale(),
    )
    return _with_terms(stage, scales.pairs())


def _refining(adapters: Mapping[str, Real] | None, solver: str = "euler") -> Stage:
    used = tuple((adapters or {}).items())
    sigmas = Sigmas("stage2_distilled", steps=3)
    options: dict[str, Any] = {"adapters": used, "refines": True}
    return Stage("refine", solver, sigmas, positive=VIDEO_ONLY, **options)


def one_stage(
    *,
    steps: int = 30,
    adapters: Mapping[str, Real] | None = None,
    branches: Mode = "sweep",
    **scales: Any,
) -> Plan:
    """Noise to sample in one go: the pipeline of ID-LoRA's one-stage script.

    Args:
        steps: Euler steps along the default schedule at 4096 tokens.
        adapters: strength by name.
        branches: how the passes of a step are laid out.
        scales: fields of `Scales`; by default those of `DEFAULT`.

    Source: scripts/inference_one_stage.py.
    """
    sigmas = Sigmas(steps=steps)
    return Plan(
        (
            _first(
                "one_stage",
                replace(DEFAULT, **scales),
                sigmas,
                adapters,
                branches=branches,
            ),
        )
    )


def two_stage(
    *,
    steps: int = 30,
    adapters: Mapping[str, Real] | None = None,
    refining: Mapping[str, Real] | None = None,
    branches: Mode = "sweep",
    **scales: Any,
) -> Plan:
    """One stage, then three steps of refinement at twice the sides, audio given.

    Args:
        steps: of the first stage.
        adapters: of the first stage, strength by name.
        refining: of the second: the distilled LoRA at 0.8, and no ID-LoRA.
        branches: how the passes of a step are laid out.
        scales: fields of `Scales`; by default those of `DEFAULT`.

    Source: scripts/inference_two_stage.py.
    """
    sigmas = Sigmas(steps=steps)
    first = _first(
        "first", replace(DEFAULT, **scales), sigmas, adapters, branches=branches
    )
    return Plan((first, _refining(refining)))


def two_stage_hq(
    *,
    steps: int = 15,
    adapters: Mapping[str, Real] | None = None,
    refining: Mapping[str, Real] | None = None,
    branches: Mode = "sweep",
    **scales: Any,
) -> Plan:
    """As `two_stage` with res_2s in both, a schedule that counts tokens, and CFG-star.

    Args:
        steps: of the first stage, two model calls each.
        adapters: of the first stage: ID-LoRA at 1, the distilled LoRA at 0.25.
        refining: of the second: the distilled LoRA at 0.5.
        branches: how the passes of a step are laid out.
        scales: fields of `Scales`; by default those of `HQ`.

    Source: ID-LoRA-2.3/scripts/inference_two_stage_hq.py.
    """
    sigmas = Sigmas(steps=steps, tokens=None)
    options: dict[str, Any] = {"solver": "res2s", "branches": branches}
    first = _first("first", replace(HQ, **scales), sigmas, adapters, **options)
    return Plan((first, _refining(refining, "res2s")))


def distilled(
    *,
    adapters: Mapping[str, Real] | None = None,
    branches: Mode = "sweep",
    **scales: Any,
) -> Plan:
    """Eight steps along the distilled model's noise levels, without text guidance.

    Args:
        adapters: strength by name; on a base that is not distilled, the distilled LoRA
            at 1 among them.
        branches: how the passes of a step are laid out.
        scales: fields of `Scales`; by default those of `DISTILLED`.

    Source: ltx_pipelines/utils/constants.py: DISTILLED_SIGMA_VALUES.
    """
    sigmas = Sigmas("distilled", steps=8)
    return Plan(
        (
            _first(
                "distilled",
                replace(DISTILLED, **scales),
                sigmas,
                adapters,
                branches=branches,
            ),
        )
    )

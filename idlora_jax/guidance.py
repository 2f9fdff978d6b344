"""Guidance: away from what the model predicts when something is missing.

A `Term` names one such direction and says what its forward pass leaves out; `branches`
turns terms into the passes of one step, the positive one first. With x0_g the clean
prediction of pass g, every linear guidance of the method is

    x0 = x0_0 + sum_g w_g (x0_0 - x0_g)

with one weight per term and modality. The usual scale s is w + 1 for text guidance and
the bimodal term, w for identity guidance and STG (`Term.neutral` says which). Weights
are arrays, so changing or scheduling them never recompiles; a term that is off is
absent. On top of it: `star` and `Apg` reshape a direction before it is weighted, a
term's momentum averages it over steps, `rescale` restores the deviation afterwards.
Sums and norms run over all tokens of a sample, fixed and reference tokens included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from idlora_jax.types import AV, BOTH, Branch, Skip, each

Project = Callable[[Array, Array], Array]
"""(positive prediction, direction) -> direction, [B ...] each."""


NOTHING = Skip()


@dataclass(frozen=True)
class Term:
    """One guidance direction; static and hashable.

    Attributes:
        name: what weights are given by.
        prompt: index of the prompt its pass sees (0: the positive one).
        skip: what its pass leaves out of `layers`.
        layers: where `skip` holds; None: in all layers.
        drop_ref: whether its pass drops the reference tokens.
        neutral: the scale at which the term does nothing; weight = scale - neutral.
        project: reshapes the direction (`star`, `Apg`); None leaves it. An `AV` of them
            does so for each modality by itself.
        momentum: factor of the running sum of directions; None: no memory.
        reads: modalities whose predictions it moves; its weight on the other is 0, and
            its pass leaves out what only that one would need.
    """

    name: str
    prompt: int = 0
    skip: Skip = NOTHING
    layers: tuple[int, ...] | None = None
    drop_ref: bool = False
    neutral: float | int = 0.0
    project: Project | AV | None = None
    momentum: float | int | None = None
    reads: frozenset[str] = BOTH


def text_cfg(project: Project | AV | None = None) -> Term:
    """Away from the negative prompt (prompt 1). Source: guiders.py: CFGGuider."""
    return Term("text", prompt=1, neutral=1.0, project=project)


def identity(*, video: bool = False) -> Term:
    """Away from the prediction without the reference voice (ID-LoRA).

    Args:
        video: whether it moves the video, too, and not the audio alone.

    Source: scripts/inference_one_stage.py.
    """
    return Term("identity", drop_ref=True, reads=BOTH if video else BOTH - {"video"})


def stg(layers: Sequence[int]) -> Term:
    """Away from skipped self-attention in `layers`. Source: guiders.py: STGGuider."""
    return Term("stg", skip=Skip(video_self=True, audio_self=True), layers=(*layers,))


def bimodal() -> Term:
    """Away from video and audio that do not see each other.

    Source: scripts/inference_one_stage.py: _av_bimodal_config.
    """
    return Term("bimodal", skip=Skip(a2v=True, v2a=True), neutral=1.0)


def branches(
    terms: Sequence[Term], depth: int, positive: Branch | None = None
) -> tuple[Branch, ...]:
    """The passes of one step: the positive branch, then one per term.

    Args:
        terms: the guidance terms.
        depth: number L of transformer layers.
        positive: what the positive pass does (default: `Branch()`).

    Raises:
        ValueError: if a term names a layer outside of the model.
    """
    positive = Branch() if positive is None else positive
    return (positive, *(_branch(term, depth, positive) for term in terms))


def _branch(term: Term, depth: int, positive: Branch) -> Branch:
    layers = range(depth) if term.layers is None else term.layers
    for layer in layers:
        if not 0 <= layer < depth:
            raise ValueError(
                f"{term.name}: layer {layer} is outside of a model of {depth} layers; "
                f"give layers in 0..{depth - 1}"
            )
    skip = positive.skip or (NOTHING,) * depth
    skip = tuple(
        Skip(*map(max, old, term.skip)) if i in layers else old
        for i, old in enumerate(skip)
    )
    return replace(
        positive,
        prompt=term.prompt,
        skip=skip if any(map(any, skip)) else (),
        use_ref=positive.use_ref and not term.drop_ref,
        reads=positive.reads & term.reads,
    )


@dataclass(frozen=True)
class Window:
    """A scale at some noise levels: a schedule for `weights`.

    Attributes:
        scale: within the window; a number, host or traced.
        low: lowest noise level of the window.
        high: highest noise level of the window.
        outside: the scale elsewhere; a term's `neutral` switches it off there.
    """

    scale: Any
    low: float | int = 0.0
    high: float | int = 1.0
    outside: float | int = 0.0

    def __call__(self, sigma: float) -> Any:
        """The scale at a noise level."""
        return self.scale if self.low <= sigma <= self.high else self.outside


Scale = float | int | Array | np.generic | Callable[[float], Any]
"""A number, host or traced, or a schedule: noise level -> number."""


def _at(scale: Scale, sigma: float) -> Any:
    return scale(sigma) if callable(scale) else scale


def weights(
    terms: Sequence[Term],
    scales: Mapping[str, Sequence[Scale]],
    steps: int | Sequence[float] | np.ndarray,
) -> Float[Any, "steps terms 2"]:
    """A weight table from scales by term name, (video, audio) each.

    Schedules are evaluated here, on the host, at the noise level a step starts from.

    Args:
        terms: the guidance terms.
        scales: numbers (traced ones, too) or schedules such as `Window`.
        steps: the noise level each step starts from; for scales that are all numbers,
            how many steps.

    Returns:
        float32 numpy, or a jax array where a scale is one.

    Raises:
        ValueError: unless every term has scales and every scale a term, or if one moves
            a modality that its term does not read.
    """
    names = [term.name for term in terms]
    if sorted(names) != sorted(scales):
        raise ValueError(
            f"weights: scales for {sorted(scales)}, expected one for each of the terms "
            f"{sorted(names)}"
        )
    pairs = [(scales[term.name], term.neutral) for term in terms]
    varying = any(callable(s) for pair, _ in pairs for s in pair)
    if isinstance(steps, int) and varying:
        raise ValueError(
            "weights: a scale depends on the noise level, but only the number of steps "
            "is given; give the noise level each step starts from"
        )
    levels = [0.0] * steps if isinstance(steps, int) else [float(s) for s in steps]
    table = [
        [[_at(s, sigma) - neutral for s in pair] for pair, neutral in pairs]
        for sigma in levels
    ]
    for row in table:
        _check_reads(terms, row)
    traced = any(isinstance(x, jax.Array) for x in jax.tree.leaves(table))
    made = jnp.asarray(table, jnp.float32) if traced else np.array(table, np.float32)
    return made.reshape(len(levels), len(pairs), 2)


def _check_reads(terms: Sequence[Term], row: Sequence[Sequence[Any]]) -> None:
    for term, weights in zip(terms, row, strict=True):
        for name, weight in zip(AV._fields, weights, strict=True):
            known = not isinstance(weight, jax.Array)
            if name not in term.reads and known and weight != 0:
                raise ValueError(
                    f"weights: the term {term.name!r} reads {sorted(term.reads)} only, "
                    f"but its scale for {name} is {weight + term.neutral}, expected "
                    f"{term.neutral}; use a term that reads both (Term.reads)"
                )


def _read(term: Term, x: AV) -> AV:
    """The modalities that a term moves."""
    return AV(*(x if n in term.reads else None for n, x in x._asdict().items()))


def _per_sample(x: Float[Array, "B ..."]) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def projection(
    x: Float[Array, "B ..."], onto: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """The part of each sample of `x` along `onto`.

    Source: guiders.py: projection_coef.
    """
    axes = _per_sample(x)
    dot = jnp.sum(x * onto, axis=axes, keepdims=True)
    return dot / (jnp.sum(onto * onto, axis=axes, keepdims=True) + 1e-8) * onto


def star(
    positive: Float[Array, "B ..."], direction: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """CFG-star: away from the negative scaled to be nearest to the positive.

    Source: guiders.py: CFGStarRescalingGuider.
    """
    return positive - projection(positive, onto=positive - direction)


@dataclass(frozen=True)
class Apg:
    """Adaptive projected guidance: shrink the part along the positive prediction.

    Attributes:
        eta: factor of the part along the positive prediction (1 keeps it).
        norm_threshold: longest allowed direction per sample; None: any.

    Source: arXiv 2410.02416; guiders.py: LtxAPGGuider, LegacyStatefulAPGGuider.
    """

    eta: float | int = 1.0
    norm_threshold: float | int | None = None

    def __call__(
        self, positive: Float[Array, "B ..."], direction: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """Reshape `direction`."""
        if self.norm_threshold is not None:
            squares = direction * direction
            total = jnp.sum(squares, axis=_per_sample(squares), keepdims=True)
            limit = self.norm_threshold / jnp.sqrt(jnp.maximum(total, 1e-30))
            direction = direction * jnp.minimum(1.0, limit)
        along = projection(direction, onto=positive)
        return self.eta * along + (direction - along)


def memory(terms: Sequence[Term], x: AV) -> tuple[Any, ...]:
    """What `directions` carries from step to step: () unless a term has momentum."""
    if all(term.momentum is None for term in terms):
        return ()
    return tuple(
        None if term.momentum is None else each(jnp.zeros_like, _read(term, x))
        for term in terms
    )


def _reshaped(project: Project | AV | None, positive: AV, direction: AV) -> AV:
    both = project if isinstance(project, AV) else AV(project, project)

    def one(f: Project | None, p: Any, d: Any) -> Any:
        return d if f is None or d is None else f(p, d)

    return AV(*map(one, both, positive, direction))


def directions(
    terms: Sequence[Term], x0: tuple[AV, ...], memory: tuple[Any, ...] = ()
) -> tuple[tuple[AV, ...], tuple[Any, ...]]:
    """x0_0 - x0_g per term, averaged and reshaped as the term says.

    Args:
        terms: the guidance terms.
        x0: predictions, the positive one first, then one per term.
        memory: from `memory(terms, x)`, or from the step before.

    Returns:
        One direction per term (None for what it does not read), and the memory for the
        next step.
    """
    positive, *others = x0
    out = [
        each(lambda other, p: p - other, _read(term, other), positive)
        for term, other in zip(terms, others, strict=True)
    ]
    if memory:
        for i, (term, last) in enumerate(zip(terms, memory, strict=True)):
            if last is not None:
                out[i] = each(lambda d, m, f=term.momentum: f * m + d, out[i], last)
        kept = (None if m is None else d for d, m in zip(out, memory, strict=True))
        memory = tuple(kept)
    out = [
        _reshaped(term.project, positive, direction)
        for term, direction in zip(terms, out, strict=True)
    ]
    return tuple(out), memory


def combine(
    x0: tuple[AV, ...],
    weights: Float[Array, "terms 2"],
    *,
    rescale: Float[Array, " 2"] | None = None,
    over: Literal["sample", "batch"] = "sample",
    project: tuple[AV, ...] | None = None,
) -> AV:
    """One guided prediction from those of all branches.

    Args:
        x0: predictions, the positive one first, then one per term.
        weights: per term, for video and audio.
        rescale: share, for video and audio, by which the deviation is brought back to
            that of the positive prediction.
        over: "sample" takes the deviation per sample; "batch" over the whole tensor,
            as the reference does (equal for one sample).
        project: the directions to add (from `directions`); default: the differences.

    Source: guiders.py: MultiModalGuider.calculate.
    """
    if project is None:
        project = tuple(each(lambda o, p: p - o, other, x0[0]) for other in x0[1:])

    def add(positive: Array, w: Array, *steps: Array | None) -> Array:
        moves = (w[g] * step for g, step in enumerate(steps) if step is not None)
        return positive + sum(moves)

    guided = each(add, x0[0], AV(weights[:, 0], weights[:, 1]), *project)
    if rescale is None:
        return guided
    share = AV(rescale[0], rescale[1])
    return each(lambda x, p, r: restore_deviation(x, p, r, over), guided, x0[0], share)


def restore_deviation(
    x: Float[Array, "B ..."],
    positive: Float[Array, "B ..."],
    share: Float[Array, ""],
    over: Literal["sample", "batch"] = "sample",
) -> Float[Array, "B ..."]:
    """Scale x so that its deviation moves by `share` towards that of `positive`."""
    axes = _per_sample(x) if over == "sample" else None
    kept = jnp.std(positive, axis=axes, ddof=1, keepdims=True)
    ratio = kept / jnp.std(x, axis=axes, ddof=1, keepdims=True)
    return x * (share * ratio + (1 - share))

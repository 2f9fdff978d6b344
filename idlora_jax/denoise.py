"""From velocities to samples: one guided prediction, one step, one scan.

    velocity of each branch -> x0 = x - sigma v -> guided x0 -> pinned x0 -> solver step

A `Denoise` maps streams at a noise level to the clean prediction. `sample` scans the
step over a solver's table, `iterate` runs the very same step row by row and hands out
what it has after each. Fixed tokens (`denoise` False) are `clean` before, during and
after: whatever the model returns for them is discarded, not multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from idlora_jax import guidance, keys, programs
from idlora_jax.guidance import Term
from idlora_jax.keys import Keys
from idlora_jax.solvers import Solver, Table
from idlora_jax.types import AV, BOTH, Branch, Stream, each

Mode = Literal["sweep", "pair", "batch"]
Draws = Keys | AV | None


Denoise = Callable[..., tuple[AV, Any]]
"""(streams, sigma [], weights [terms 2], memory) -> (x0, memory)."""


def to_x0(
    x: Float[Array, "B T C"],
    v: Float[Array, "B T C"],
    denoise: Bool[Array, "B T"],
    sigma: Float[Array, " B"],
) -> Float[Array, "B T C"]:
    """x - denoise * sigma * v, in float32; fixed tokens return x whatever v holds.

    Source: ltx_core/utils.py: to_denoised.
    """
    move = sigma.astype(jnp.float32)[:, None, None] * v.astype(jnp.float32)
    move = jnp.where(denoise[..., None], move, 0.0)
    return (x.astype(jnp.float32) - move).astype(x.dtype)


def pin(x: Float[Array, "B T C"], s: Stream) -> Float[Array, "B T C"]:
    """Put `clean` back where `denoise` is False.

    Source: ltx_pipelines/utils/helpers.py: post_process_latent.
    """
    return jnp.where(s.denoise[..., None], x, s.clean.astype(x.dtype))


def predict(
    apply: Callable[..., tuple[AV, ...]],
    variables: Any,
    prepared: Any,
    streams: AV,
    sigma: Float[Array, ""],
    branches: tuple[Branch, ...],
    *,
    targets: AV,
    mode: Mode = "sweep",
) -> tuple[AV, ...]:
    """The clean prediction of every branch, before guidance.

    Args:
        apply: the transformer, configuration bound.
        variables: its parameters and adapter.
        prepared: its prepared positions and prompts.
        streams: `AV` of `Stream`.
        sigma: the noise level of all samples.
        branches: what each pass does.
        targets: number of target tokens of each modality, static.
        mode: how the passes are laid out; the results are equal.
    """
    level = each(lambda s: jnp.broadcast_to(sigma, s.x.shape[:1]), streams)
    velocities = apply(
        variables, prepared, streams, level, branches, targets=targets, mode=mode
    )

    def one(v: Array, s: Stream, level: Array) -> Array:
        return to_x0(s.x, v, s.denoise, level)

    return tuple(each(one, v, streams, level) for v in velocities)


@dataclass(frozen=True)
class _Guided:
    """The static part of a `Denoise`: equal settings share one compiled stage."""

    apply: Callable[..., tuple[AV, ...]]
    terms: tuple[Term, ...]
    branches: tuple[Branch, ...]
    targets: AV
    mode: Mode
    over: Literal["sample", "batch"]

    def predict(
        self, variables: Any, prepared: Any, streams: AV, sigma: Any
    ) -> tuple[AV, ...]:
        args = (self.apply, variables, prepared, streams, sigma, self.branches)
        return predict(*args, targets=self.targets, mode=self.mode)

    def __call__(
        self,
        variables: Any,
        prepared: Any,
        rescale: Any,
        streams: AV,
        sigma: Any,
        weights: Any,
        memory: Any,
    ) -> tuple[AV, Any]:
        if weights.shape[0] != len(self.terms):
            raise ValueError(
                f"denoise: weights for {weights.shape[0]} terms, expected "
                f"{[term.name for term in self.terms]}"
            )
        x0 = self.predict(variables, prepared, streams, sigma)
        steps, memory = guidance.directions(self.terms, x0, memory)
        guided = x0[0]
        if self.terms:
            guided = guidance.combine(
                x0, weights, rescale=rescale, over=self.over, project=steps
            )
        # What the positive pass does not read are given tokens, and stays.
        kept = each(lambda s, g: s.x if g is None else g, streams, guided)
        return kept, memory


def make_denoiser(
    apply: Callable[..., tuple[AV, ...]],
    variables: Any,
    prepared: Any,
    terms: Sequence[Term],
    targets: AV,
    *,
    depth: int,
    positive: Branch | None = None,
    branches: Mode = "sweep",
    rescale: tuple[float, float] | None = None,
    over: Literal["sample", "batch"] = "sample",
) -> Denoise:
    """Guided clean prediction by the transformer, of given tokens, too (see `pin`).

    The result is a pytree whose leaves are the arrays given here: `sample` compiles it
    once per `apply`, terms, targets and mode. `apply` counts as the same only if it is
    the same object, so bind the configuration once.

    Args:
        apply: (variables, prepared, streams, sigma `AV` of [B], branches, targets=,
            mode=) -> one `AV` of velocities [B T C] per branch.
        variables: parameters and adapter.
        prepared: positions and prompts as `apply` wants them.
        terms: guidance terms; none gives the positive prediction.
        targets: number of target tokens of each modality.
        depth: number of transformer layers.
        positive: what the positive pass does (default: `Branch()`).
        branches: how `apply` lays out the passes.
        rescale: see `guidance.combine`; None: off.
        over: see `guidance.combine`.

    Raises:
        ValueError: if a term names a layer outside of the model.
    """
    passes = guidance.branches(terms, depth, positive)
    static = _Guided(apply, (*terms,), passes, targets, branches, over)
    share = None if rescale is None else jnp.asarray(rescale, jnp.float32)
    return Partial(static, variables, prepared, share)


def predictions(denoise: Denoise, streams: AV, sigma: Any) -> tuple[AV, ...]:
    """`predict` of a denoiser from `make_denoiser`: positive, then one per term.

    Of both modalities, also what its guidance does not read.
    """
    assert isinstance(denoise, Partial) and isinstance(denoise.func, _Guided)
    variables, prepared, _ = denoise.args
    passes = tuple(replace(b, reads=BOTH) for b in denoise.func.branches)
    whole = replace(denoise.func, branches=passes)
    return whole.predict(variables, prepared, streams, sigma)


class Record(NamedTuple):
    """What every model call took and gave, `AV` of [calls B T C] each.

    Attributes:
        x: its input.
        x0: its guided prediction, given tokens set back: what the solver takes.
        guided: the same before that.
    """

    x: AV
    x0: AV
    guided: AV


class _State(NamedTuple):
    """What one row hands to the next."""

    x: AV
    carry: Any
    memory: Any


class _Row(NamedTuple):
    """One model call: its row of the solver's table, its weights, its draws."""

    sigma: Any
    rows: Any
    weights: Any
    draws: Any


def _noise(draws: Any, x: AV) -> AV | None:
    """Recorded noise as it is, or standard normal noise from a key."""
    if draws is None or isinstance(draws, AV):
        return draws
    pair = AV(*keys.split(draws, 2))
    return each(lambda x, key: keys.normal(key, x.shape), x, pair)


def _advance(
    denoise: Denoise, step: Callable[..., Any], streams: AV, state: _State, row: _Row
) -> tuple[_State, Record]:
    """One model call and one solver step: the body `sample` and `iterate` share."""
    now = _with_x(streams, state.x)
    x0, memory = denoise(now, row.sigma, row.weights, state.memory)
    guided = each(_float32, x0)
    x0 = each(pin, guided, streams)
    noise = _noise(row.draws, state.x)
    x, carry = step(state.x, x0, state.carry, row.rows, noise)
    seen = Record(state.x, x0, guided)
    return _State(each(pin, x, streams), carry, memory), seen


def _all_steps(
    denoise: Denoise,
    step: Callable[..., Any],
    streams: AV,
    state: _State,
    rows: _Row,
    record: bool,
    remat: bool,
) -> tuple[_State, Record | None]:
    def body(state: _State, row: _Row) -> tuple[_State, Record | None]:
        state, seen = _advance(denoise, step, streams, state, row)
        return state, seen if record else None

    # In a scan nothing can undo the checkpoint by sharing (no common subexpressions).
    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jax.lax.scan(body, state, rows)


_static = ("step", "record", "remat")
_scan = programs.jit(_all_steps, "sampler", static_argnames=_static)
_one = programs.jit(_advance, "sampler step", static_argnames=("step",))


def _weights(weights: Any, table: Table) -> Any:
    """The weights of each row from those of each step; no terms: [rows 0 2]."""
    steps = int(table.step[-1]) + 1
    weights = np.zeros((steps, 0, 2)) if weights is None else weights
    if not isinstance(weights, jax.Array):
        weights = np.asarray(weights)
    if weights.ndim != 3 or weights.shape[::2] != (steps, 2):
        raise ValueError(
            f"sample: weights must be [steps, terms, 2] with {steps} steps, got shape "
            f"{weights.shape} (guidance.weights makes one from scales)"
        )
    return weights.astype(np.float32)[table.step]


def _draws(draws: Draws, solver: Solver, calls: int) -> Any:
    """One key, or one piece of recorded noise, per row."""
    if not solver.noisy:
        return None
    if draws is None:
        raise ValueError("sample: this solver draws noise; give `draws` a key")
    if not isinstance(draws, AV):
        return keys.split(draws, calls)

    def fill(noise: Array) -> Array:
        # The last call of res_2s uses no noise, so that none is recorded for it.
        if calls - len(noise) not in (0, 1):
            raise ValueError(
                f"sample: noise for {len(noise)} calls, expected {calls} (or "
                f"{calls - 1}, without the last)"
            )
        return noise[np.minimum(np.arange(calls), len(noise) - 1)]

    return each(fill, draws)


def _memory(denoise: Denoise, x: AV) -> tuple[Any, ...]:
    """What the terms of a denoiser from `make_denoiser` remember, at the start."""
    static = denoise.func if isinstance(denoise, Partial) else denoise
    return guidance.memory(static.terms, x) if isinstance(static, _Guided) else ()


def _start(
    denoise: Denoise,
    solver: Solver,
    sigmas: Any,
    streams: AV,
    draws: Draws,
    weights: Any,
) -> tuple[Denoise, Table, _State, _Row]:
    table = solver.table(np.asarray(sigmas))
    x = each(lambda s: _float32(pin(s.x, s)), streams)
    rows = _Row(
        table.sigma,
        table.rows,
        _weights(weights, table),
        _draws(draws, solver, len(table.sigma)),
    )
    # A plain function becomes a pytree without leaves, so that jit takes it.
    tree = denoise if isinstance(denoise, Partial) else Partial(denoise)
    return tree, table, _State(x, solver.init(x), _memory(denoise, x)), rows


def _float32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _with_x(streams: AV, x: AV) -> AV:
    return each(lambda s, x: s._replace(x=x), streams, x)


@overload
def sample(
    denoise: Denoise,
    solver: Solver,
    sigmas: Any,
    streams: AV,
    draws: Draws = None,
    *,
    weights: Any = None,
    record: Literal[False] = False,
    remat: bool = False,
) -> AV: ...


@overload
def sample(
    denoise: Denoise,
    solver: Solver,
    sigmas: Any,
    streams: AV,
    draws: Draws = None,
    *,
    weights: Any = None,
    record: Literal[True],
    remat: bool = False,
) -> tuple[AV, Record]: ...


def sample(
    denoise: Denoise,
    solver: Solver,
    sigmas: Any,
    streams: AV,
    draws: Draws = None,
    *,
    weights: Any = None,
    record: bool = False,
    remat: bool = False,
) -> AV | tuple[AV, Record]:
    """Denoise `streams` along `sigmas`: one `lax.scan` over the solver's table.

    Compiled once per denoiser, solver and shapes; other sigmas, weights or solver
    settings of the same sizes reuse it. The state is float32.

    Args:
        denoise: from `make_denoiser`, or any function of the same arguments.
        solver: from `solvers`.
        sigmas: falling noise levels [n+1], host values; x is at the first one.
        streams: `AV` of `Stream`.
        draws: a key, a key per sample, or recorded noise: `AV` of [calls B T C], in
            the order of the calls (middle, step, middle, ...). Only for solvers that
            draw.
        weights: guidance weights [n, terms, 2].
        record: also return input and prediction of every model call.
        remat: for gradients: keep each step's input only, and run it again backwards.

    Returns:
        The streams with x at the last sigma.

    Raises:
        ValueError: if sigmas rise, or weights or noise have the wrong sizes.
    """
    denoise, _, state, rows = _start(denoise, solver, sigmas, streams, draws, weights)
    args = (denoise, solver.step, streams, state, rows)
    state, seen = _scan(*args, record=record, remat=remat)
    done = _with_x(streams, state.x)
    return done if seen is None else (done, seen)


def iterate(
    denoise: Denoise,
    solver: Solver,
    sigmas: Any,
    streams: AV,
    draws: Draws = None,
    *,
    weights: Any = None,
) -> Iterator[tuple[AV, Record]]:
    """As `sample`, yielding after each of the n steps.

    Yields:
        The streams, and input and prediction [B T C] of the step's last model call.
    """
    denoise, table, state, rows = _start(
        denoise, solver, sigmas, streams, draws, weights
    )
    calls, state = len(table.step), programs.beside(state, denoise)
    for i in range(calls):
        row = jax.tree.map(lambda a, i=i: a[i], rows)
        state, seen = _one(denoise, solver.step, streams, state, row)
        if i + 1 == calls or table.step[i + 1] != table.step[i]:
            yield _with_x(streams, state.x), seen

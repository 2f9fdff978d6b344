"""Every saving is exact, and each can be switched off."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
import small_transformer as small
from small_transformer import LAYERS, TARGETS, close, levels, pair, prompt

from idlora_jax import flops, guidance
from idlora_jax.model import transformer
from idlora_jax.savings import Saving
from idlora_jax.types import AV, Branch, each

SAVINGS = get_args(Saving)
TERMS = (
    guidance.text_cfg(),
    guidance.identity(),
    guidance.stg([1]),
    guidance.bimodal(),
)
BRANCHES = guidance.branches(TERMS, LAYERS)
generations = pytest.mark.parametrize("generation", ["2.0", "2.3"])
MODES = ("sweep", "pair", "batch")


def parts(generation: str, cached: bool = False) -> tuple[Any, ...]:
    cfg, variables = small.config(generation), {"params": small.base(generation)}
    prompts = prompt(generation), prompt(generation, 7)
    args = (cfg, variables, pair(), prompts)
    prepared = transformer.prepare(*args, text_kv=cached)
    return variables, prepared, pair(), levels()


def step(generation: str, **options: Any) -> Any:
    options = {"targets": TARGETS, "branches": BRANCHES} | options
    return transformer.bind(small.config(generation), **options)


@functools.cache
def found(generation: str, cached: bool = False, **options: Any) -> tuple[AV, ...]:
    return jax.jit(step(generation, **options))(*parts(generation, cached))


def traced(generation: str, **options: Any) -> Any:
    return jax.make_jaxpr(step(generation, **options))(*parts(generation))


def same(got: tuple[AV, ...], want: tuple[AV, ...], mode: str = "sweep") -> None:
    for g, w, branch in zip(got, want, BRANCHES, strict=True):
        counts = AV(None, None) if branch.use_ref else TARGETS
        assert (w.video is None) == ("video" not in branch.reads)
        cut = functools.partial(each, lambda x, n: x[:, :n])
        close(cut(g, counts), cut(w, counts))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@generations
def test_all_savings_together_change_nothing(generation: str, mode: str):
    without = found(generation, without=SAVINGS, mode=mode)
    same(without, found(generation, mode=mode))


@pytest.mark.slow
@pytest.mark.parametrize("saving", SAVINGS)
@generations
def test_results_with_and_without_a_saving_agree(generation, saving):
    same(found(generation, without=(saving,)), found(generation))


@pytest.mark.parametrize("mode", ["sweep", "batch"])
def test_text_made_once_for_all_steps_is_that_of_every_step(mode: str):
    same(found("2.0", cached=True, mode=mode), found("2.0"))


def test_text_that_the_noise_level_modulates_is_not_made_once():
    with pytest.raises(ValueError, match="modulates text by the noise level"):
        parts("2.3", cached=True)


@pytest.mark.parametrize("saving", SAVINGS[:5])
@generations
def test_without_a_saving_there_is_more_to_do(generation: str, saving: Saving):
    less, more = (traced(generation, without=w) for w in ((), (saving,)))
    assert flops.count(more) > flops.count(less)


def cosines(jaxpr: Any) -> int:
    """How many operations take a cosine."""
    own = sum(eqn.primitive.name == "cos" for eqn in jaxpr.eqns)
    inside = (inner for eqn in jaxpr.eqns for inner in flops._inner(eqn))
    return own + sum(map(cosines, inside))


def test_rope_tables_are_made_in_the_step_without_their_saving():
    waves = [cosines(traced("2.0", without=w).jaxpr) for w in ((), ("rope_tables",))]
    assert waves[1] >= waves[0] + 4  # two tables of each modality


@generations
def test_text_is_projected_once_for_each_prompt(generation: str):
    """Of any number of branches: keys and values of two prompts, of a third none."""
    one = flops.count(traced(generation, branches=BRANCHES[:1]))
    apart = (BRANCHES[0], BRANCHES[4])
    other = (BRANCHES[0], replace(BRANCHES[4], prompt=1))
    shared, own = (flops.count(traced(generation, branches=b)) for b in (apart, other))
    cfg = small.config(generation)
    widths = sum(2 * m.text_width * m.width for m in (cfg.video, cfg.audio))
    assert own - shared == 2 * small.S * LAYERS * widths
    assert shared < 2 * one


@generations
def test_a_call_without_guidance_costs_one_plain_pass(generation: str):
    plain = flops.count(traced(generation, branches=BRANCHES[:1]))
    twice = flops.count(traced(generation, branches=BRANCHES[:1] * 2))
    assert twice == pytest.approx(plain, rel=0.02)  # the same branch is one pass
    video = Branch(reads=frozenset({"video"}))
    assert flops.count(traced(generation, branches=(video,))) < plain


@pytest.mark.parametrize(
    ("generation", "reads"), [("2.0", "video"), ("2.0", "audio"), ("2.3", "audio")]
)
def test_what_is_read_alone_is_what_it_is_beside_the_other(generation, reads):
    branch = Branch(reads=frozenset({reads}))
    run = jax.jit(step(generation, branches=(branch,)))
    (got,) = run(*parts(generation))
    (want,) = jax.jit(step(generation, branches=BRANCHES[:1]))(*parts(generation))
    keep = lambda x: AV(*(v if n == reads else None for n, v in x._asdict().items()))
    assert got == keep(got) and getattr(got, reads) is not None
    close(got, keep(want))


@pytest.mark.parametrize(("generation", "mode"), [("2.0", "sweep"), ("2.3", "batch")])
def test_no_copy_of_the_stack_is_made_for_a_guided_step(generation, mode):
    args = parts(generation)
    base = args[0]["params"]
    # Enough layers that a stack is larger than all states together.
    many = jax.tree.map(lambda w: jnp.concatenate([w] * 24), base["blocks"])
    variables = {"params": {**base, "blocks": many}}
    cfg = small.config(generation)
    cfg = replace(cfg, layers=24 * LAYERS)
    branches = guidance.branches(TERMS, cfg.layers)
    run = transformer.bind(cfg, targets=TARGETS, branches=branches, mode=mode)
    compiled = jax.jit(run).lower(variables, *args[1:]).compile()
    stack = sum(w.nbytes for w in jax.tree.leaves(many))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * stack

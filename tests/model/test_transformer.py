"""What must hold of the whole transformer, in both generations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small
from small_transformer import LAYERS, TARGETS, close, levels, pair, prompt

from idlora_jax import adapters, streams
from idlora_jax.model import transformer
from idlora_jax.types import AV, Branch, Prompt, Skip, each

generations = pytest.mark.parametrize("generation", ["2.0", "2.3"])


def everywhere(**skip: bool) -> tuple[Skip, ...]:
    return (Skip(**skip),) * LAYERS


BRANCHES = {
    "plain": Branch(),
    "other prompt": Branch(prompt=1),
    "last layer": Branch(skip=(Skip(), Skip(video_self=True, audio_self=True))),
    "apart": Branch(skip=everywhere(a2v=True, v2a=True)),
    "dropped": Branch(use_ref=False),
    "still, dropped": Branch(use_ref=False, frozen=frozenset({"audio"})),
    "still, unseen": Branch(video_sees_ref=False, frozen=frozenset({"audio"})),
}


@functools.cache
def compiled(generation: str, branches: tuple[Branch, ...], mode: str, targets: Any):
    cfg = small.config(generation)

    def run(variables, prepared, s, sigma):
        args = (cfg, variables, prepared, s, sigma, branches)
        return transformer.apply(*args, targets=targets, mode=mode)

    return jax.jit(run)


def forward(
    generation: str,
    s: AV,
    prompts: tuple[Prompt, ...],
    branches: tuple[Branch, ...] = (Branch(),),
    mode: str = "sweep",
    targets: AV = TARGETS,
    lora: Any = None,
    base: Any = None,
    sigma: float = 0.6,
) -> tuple[AV, ...]:
    variables = {"params": small.base(generation) if base is None else base}
    variables |= {"lora": lora} if lora else {}
    prepared = transformer.prepare(small.config(generation), variables, s, prompts)
    run = compiled(generation, branches, mode, targets)
    batch = next(len(part.x) for part in s if part is not None)
    level = each(lambda part, level: level, s, levels(sigma, batch))
    return run(variables, prepared, s, level)


@functools.cache
def outputs(generation: str, mode: str = "sweep") -> dict[str, AV]:
    """All of `BRANCHES` in one call."""
    prompts = prompt(generation), prompt(generation, 7)
    found = forward(generation, pair(), prompts, tuple(BRANCHES.values()), mode)
    return dict(zip(BRANCHES, found, strict=True))


def first(x: AV, counts: AV = TARGETS) -> AV:
    return each(lambda x, n: x[:, :n], x, counts)


def rows(s: Any, order: np.ndarray) -> Any:
    """The stream with its tokens in another order."""
    return s._replace(
        x=s.x[:, order],
        clean=s.clean[:, order],
        denoise=s.denoise[:, order],
        pos=s.pos[:, :, order],
        is_ref=s.is_ref[:, order],
    )


@generations
def test_permuting_tokens_permutes_outputs(generation: str):
    order = np.array([3, 0, 4, 1, 2, 6, 7, 5])
    orders = AV(np.array([2, 0, 3, 1]), order)  # references stay behind targets
    (usual,) = forward(generation, pair(), (prompt(generation),))
    permuted = each(rows, pair(), orders)
    (got,) = forward(generation, permuted, (prompt(generation),))
    close(got, each(lambda x, order: x[:, order], usual, orders))


@pytest.mark.slow
@generations
def test_audio_alone_equals_audio_that_video_does_not_touch(generation: str):
    s = pair()._replace(video=None)
    text = prompt(generation)._replace(video=None)
    targets = TARGETS._replace(video=None)
    (alone,) = forward(generation, s, (text,), targets=targets)
    assert alone.video is None
    close(AV(None, alone.audio), AV(None, outputs(generation)["apart"].audio))


@pytest.mark.slow
@generations
def test_video_alone_equals_video_that_audio_does_not_touch(generation: str):
    s = pair()._replace(audio=None)
    text = prompt(generation)._replace(audio=None)
    targets = TARGETS._replace(audio=None)
    (alone,) = forward(generation, s, (text,), targets=targets)
    close(alone, AV(outputs(generation)["apart"].video, None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "mode"), [("2.0", "pair"), ("2.0", "batch"), ("2.3", "batch")]
)
def test_branches_in_pairs_or_one_batch_equal_the_sweep(generation: str, mode: str):
    want = outputs(generation)
    for name, got in outputs(generation, mode).items():
        dropped = not BRANCHES[name].use_ref
        counts = TARGETS if dropped else AV(None, None)
        close(first(got, counts), first(want[name], counts))


@generations
def test_branches_differ(generation: str):
    found = outputs(generation)
    for name in ("other prompt", "last layer", "apart", "dropped"):
        assert not np.allclose(found[name].audio[:, :5], found["plain"].audio[:, :5])


@generations
def test_dropping_the_reference_equals_never_having_it(generation: str):
    (never,) = forward(generation, pair(reference=0), (prompt(generation),))
    close(first(outputs(generation)["dropped"]), never)


@generations
def test_rows_of_a_dropped_reference_are_zero(generation: str):
    np.testing.assert_array_equal(outputs(generation)["dropped"].audio[:, 5:], 0)


@generations
def test_an_unseen_reference_of_still_audio_equals_none_for_video(generation: str):
    """Audio that is not updated cannot carry the reference to video by itself."""
    found = outputs(generation)
    want = found["still, dropped"].video
    close(AV(found["still, unseen"].video, None), AV(want, None))


@generations
def test_padding_behind_the_valid_length_changes_nothing(generation: str):
    """With a length of the targets alone, masking the reference equals dropping it."""
    s = pair()
    masked = s._replace(audio=s.audio._replace(length=jnp.array([5])))
    (got,) = forward(generation, masked, (prompt(generation),))
    close(first(got), first(outputs(generation)["dropped"]))


@generations
def test_a_batch_equals_its_samples(generation: str):
    s, text = pair(batch=2), prompt(generation, batch=2)
    (both,) = forward(generation, s, (text,))
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i : i + 1], (s, text))
        (alone,) = forward(generation, one[0], (one[1],))
        close(each(lambda x, i=i: x[i : i + 1], both), alone)


@generations
def test_an_adapter_beside_the_base_equals_one_merged_into_it(generation: str):
    base = small.base(generation)
    shapes = jax.eval_shape(lambda k: adapters.init(k, base, 2), jax.random.key(0))
    lora = small.random_like(shapes, 3)
    prompts = (prompt(generation),)
    (beside,) = forward(generation, pair(), prompts, lora=lora)
    merged = adapters.merge(base, lora)
    (inside,) = forward(generation, pair(), prompts, base=merged)
    close(beside, inside, 1e-4)
    (without,) = forward(generation, pair(), prompts)
    assert not np.allclose(beside.audio, without.audio, atol=1e-3)


@generations
def test_the_velocity_of_fixed_tokens_ignores_the_noise_level(generation: str):
    """Their timestep is 0, but text AdaLN (2.3) reads the noise level itself."""
    s = pair()._replace(audio=None)
    s = s._replace(video=streams.freeze(s.video))
    text, targets = prompt(generation)._replace(audio=None), AV(TARGETS.video, None)
    low, high = (
        forward(generation, s, (text,), targets=targets, sigma=sigma)[0].video
        for sigma in (0.2, 0.9)
    )
    assert np.allclose(low, high) == (generation == "2.0")

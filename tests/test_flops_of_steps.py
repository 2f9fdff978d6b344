"""FLOPs of guided steps at full size: 19B and 22B, 121 frames of 512 x 512.

Nothing is computed: the transformer is traced over shapes. What the reference does are
five passes one after another without any saving; in 2.3 it, too, leaves out the
attention between modalities that is skipped.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest

from idlora_jax import adapters, flops, guidance, plans
from idlora_jax.config import LTX2_3_22B, LTX2_19B
from idlora_jax.model import transformer
from idlora_jax.savings import Saving
from idlora_jax.types import AV, Branch, Prompt, Stream

TOKENS, TARGETS, TEXT = AV(4096, 126 + 121), AV(4096, 121), 1024
CONFIGS = {"2.0": LTX2_19B, "2.3": LTX2_3_22B}
ALL: tuple[Any, ...] = get_args(Saving)
TERMS = (
    guidance.text_cfg(),
    guidance.identity(),
    guidance.stg([29]),
    guidance.bimodal(),
)
REFERENCE = {"2.0": 652.5, "2.3": 635.1}
SMALLEST = {"2.0": 530.6, "2.3": 538.8}
"""TFLOP of a step, counted from the reference's shapes by hand and by torch."""
generations = pytest.mark.parametrize("generation", CONFIGS)


def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def stream(tokens: int, axes: int) -> Stream:
    x, flag = shape(1, tokens, 128), shape(1, tokens, dtype=bool)
    pos = shape(1, axes, tokens, 2, dtype=jnp.float32)
    return Stream(x, x, flag, pos, flag, None)


def parts(generation: str, cached: bool = False, tokens: AV = TOKENS) -> Any:
    """Shapes of the parameters, of streams, and of what is made once for all steps."""
    cfg = CONFIGS[generation]
    widths = (3840, 3840) if cfg.caption_projection else (4096, 2048)
    texts = (Prompt(*(shape(1, TEXT, w) for w in widths)),) * 2
    base = jax.eval_shape(lambda k: transformer.init(cfg, k), jax.random.key(0))
    s = AV(stream(tokens.video, 3), stream(tokens.audio, 1))
    cached = cached and not cfg.text_adaln
    make = functools.partial(transformer.prepare, cfg, text_kv=cached)
    return base, s, jax.eval_shape(make, {"params": base}, s, texts)


@functools.cache
def tera(
    generation: str,
    branches: tuple[Branch, ...],
    without: tuple[Any, ...] = (),
    mode: str = "sweep",
    tokens: AV = TOKENS,
) -> float:
    """TFLOP of a step, with everything that is made once for all steps left out."""
    cfg = CONFIGS[generation]
    base, s, prepared = parts(generation, "text_kv" not in without, tokens)
    variables = {"params": base}
    options: dict[str, Any] = {"targets": TARGETS, "mode": mode, "without": without}

    def run(variables: Any, prepared: Any, s: Any, level: Any) -> Any:
        args = (cfg, variables, prepared, s, AV(level, level), branches)
        return transformer.apply(*args, **options)

    level = shape(1, dtype=jnp.float32)
    return flops.count(jax.make_jaxpr(run)(variables, prepared, s, level)) / 1e12


def step(generation: str) -> tuple[Branch, ...]:
    return guidance.branches(TERMS, CONFIGS[generation].layers)


@functools.cache
def reference(generation: str) -> float:
    """Positive, negative and STG, without reference, and apart."""
    *_, apart = step(generation)
    off = ALL if generation == "2.0" else tuple(n for n in ALL if n != "skip")
    alone = AV(TARGETS.video, TARGETS.audio)
    plain, short = (
        tera(generation, (Branch(),), off, tokens=t) for t in (TOKENS, alone)
    )
    return 3 * plain + short + tera(generation, (apart,), off)


@generations
def test_five_passes_cost_what_the_reference_does(generation: str):
    assert reference(generation) == pytest.approx(REFERENCE[generation], rel=0.005)


@pytest.mark.parametrize(("generation", "most"), [("2.0", 0.82), ("2.3", 0.86)])
def test_a_guided_step_does_a_fifth_less(generation: str, most: float, record_property):
    share = tera(generation, step(generation)) / reference(generation)
    record_property("share", share)
    assert share <= most
    assert tera(generation, step(generation)) == pytest.approx(
        SMALLEST[generation], rel=0.005
    )


SAVED: dict[tuple[str, str], float] = {
    ("2.0", "text_kv"): 18.1,
    ("2.3", "text_kv"): 9.9,
    ("2.0", "prefix"): 75.4,
    ("2.3", "prefix"): 75.5,
    ("2.0", "skip"): 14.4,
    ("2.3", "skip"): 14.4,
    ("2.0", "dead_tail"): 1.24,
    ("2.3", "dead_tail"): 1.24,
    ("2.0", "two_timesteps"): 1.98,
    ("2.3", "two_timesteps"): 1.40,
    ("2.0", "rope_tables"): 0.0,
    ("2.0", "chunked_attention"): 0.0,
}
"""TFLOP of a step; AdaLN is made once a step either way."""


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "saving"), SAVED)
def test_what_each_saving_removes(generation: str, saving: Saving):
    more = tera(generation, step(generation), (saving,))
    saved = more - tera(generation, step(generation))
    assert saved == pytest.approx(SAVED[generation, saving], rel=0.02, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pair", "batch"])
@generations
def test_branches_side_by_side_cost_little_more(generation: str, mode: str):
    """Rows of one batch are of one length, the dropped reference included."""
    usual = tera(generation, step(generation))
    assert usual <= tera(generation, step(generation), mode=mode) < 1.01 * usual


@generations
def test_a_call_without_guidance_costs_one_pass_and_no_more(generation: str):
    plain, (refining, *_) = tera(generation, (Branch(),)), plans.two_stage().stages[1:]
    off = tuple(name for name in ALL if name not in ("two_timesteps", "text_kv"))
    # Chunks of queries are of one size: the last may be filled up.
    assert plain == pytest.approx(tera(generation, (Branch(),), off), rel=1e-4)
    assert 0 < plain - tera(generation, (refining.positive,)) < 0.005 * plain


@functools.cache
def training(generation: str, remat: str) -> float:
    """TFLOP of a clip's forward and backward pass; only the adapter has a gradient."""
    cfg = CONFIGS[generation]
    base, s, prepared = parts(generation)
    init = lambda key: adapters.init(key, base, 128)
    lora = jax.eval_shape(init, jax.random.key(0))
    bound = transformer.bind(cfg, targets=TARGETS, remat=remat)

    def loss(lora: Any, base: Any, prepared: Any, s: Any, level: Any) -> Any:
        variables = {"params": base, "lora": lora}
        (out,) = bound(variables, prepared, s, AV(level, level))
        return sum(jnp.sum(x.astype(jnp.float32)) for x in out)

    level = shape(1, dtype=jnp.float32)
    traced = jax.make_jaxpr(jax.grad(loss))(lora, base, prepared, s, level)
    return flops.count(traced) / 1e12


@pytest.mark.slow
@generations
def test_the_selective_remat_makes_neither_attention_nor_feed_forward_again(generation):
    cfg, (tv, ta) = CONFIGS[generation], TOKENS
    v, a = cfg.video.width, cfg.audio.width
    attended = tv * (tv + TEXT) * v + ta * (ta + TEXT) * a + 2 * tv * ta * a
    up = 2 * 4 * (tv * v**2 + ta * a**2)
    saved = training(generation, "full") - training(generation, "selective")
    assert saved == pytest.approx(cfg.layers * (4 * attended + up) / 1e12, rel=0.01)


@pytest.mark.slow
def test_the_base_has_no_gradient():
    """Forwards, and backwards through the activations alone: less than three times."""
    assert training("2.0", "none") < 2.2 * tera("2.0", (Branch(),))


def unrolled(body: Any, carry: Any, xs: Any) -> tuple[Any, None]:
    """`jax.lax.scan` as a Python loop, of bodies that give nothing but their carry."""
    for n in range(jax.tree.leaves(xs)[0].shape[0]):
        carry, _ = body(carry, jax.tree.map(lambda x, n=n: x[n], xs))
    return carry, None


@pytest.mark.slow
@generations
def test_the_count_is_that_of_xla_for_layers_one_after_another(
    generation: str, monkeypatch: pytest.MonkeyPatch
):
    """Four layers; XLA counts elementwise work, too, and of a loop one round alone."""
    four = replace(CONFIGS[generation], layers=4)
    monkeypatch.setitem(CONFIGS, generation, four)
    branches = guidance.branches([*TERMS[:2], guidance.stg([2]), TERMS[3]], 4)
    base, s, prepared = parts(generation)
    options: dict[str, Any] = {"targets": TARGETS, "branches": branches}
    # Loops over heads and branches would count once, like those over layers.
    options |= {"mode": "batch", "without": ("chunked_attention",)}
    apply = transformer.bind(four, **options)

    def run(base: Any, prepared: Any, s: Any, level: Any) -> Any:
        return apply({"params": base}, prepared, s, AV(level, level))

    args = (base, prepared, s, shape(1, dtype=jnp.float32))
    counted = flops.count(jax.make_jaxpr(run)(*args))
    monkeypatch.setattr(jax.lax, "scan", unrolled)
    of_xla = jax.jit(lambda *args: run(*args)).lower(*args).cost_analysis()["flops"]
    assert counted < of_xla < 1.03 * counted

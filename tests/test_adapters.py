"""Adapters as tree deltas: merging, stacking, scaling, refusing what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small

from idlora_jax import adapters, experiment

AUDIO = adapters.AUDIO_TARGETS


@pytest.fixture(scope="module")
def base():
    return small.base("2.0")


def random(base, rank, seed, targets=AUDIO):
    shapes = jax.eval_shape(
        lambda key: adapters.init(key, base, rank, targets), jax.random.key(0)
    )
    return small.random_like(shapes, seed)


def same(a, b, atol=0.0):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), a, b)


def test_a_new_adapter_changes_nothing(base):
    new = adapters.init(jax.random.key(0), base, 4)
    same(adapters.merge(base, new), base)


def test_the_published_targets_are_18_modules_a_layer(base):
    assert len(adapters.select(base, AUDIO)) == 18
    gated = adapters.select(small.base("2.3"), AUDIO)
    assert len(gated) == 18, "gates are no targets"


def test_stacking_equals_merging_in_turn(base):
    one, two = random(base, 2, 1), random(base, 3, 2, ("blocks/audio/ff/*",))
    stacked = adapters.stack(one, two)
    assert adapters.rank(stacked) == 5
    in_turn = adapters.merge(adapters.merge(base, one), two)
    same(adapters.merge(base, stacked), in_turn, atol=1e-5)
    same(adapters.merge(base, one, two), in_turn, atol=1e-5)


def test_scaling_scales_the_change(base):
    one = random(base, 2, 1)
    change = lambda a: jax.tree.map(jnp.subtract, adapters.merge(base, a), base)
    half, full = change(adapters.scale(one, 0.5)), change(one)
    same(half, jax.tree.map(lambda x: x / 2, full), atol=1e-5)


def test_a_bfloat16_adapter_is_scaled_with_one_rounding():
    b = jnp.asarray(np.linspace(-2, 2, 101), jnp.bfloat16)[:, None]
    pair = {"kernel": {"a": jnp.ones((1, 101), jnp.bfloat16), "b": b}}
    got = adapters.scale(pair, 0.8)["kernel"]["b"]
    want = (b.astype(jnp.float32) * np.float32(0.8)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, want)


def test_ranks_and_scales_may_differ_from_module_to_module(base):
    settings = experiment.Lora(
        rank=4, alpha=8.0, ranks=("blocks/audio/ff/*=2", "blocks/audio/*=3"),
        alphas=("*/ff/down=6",),
    )  # fmt: skip
    made = adapters.init(jax.random.key(0), base, settings.rank_of)
    ff, cross = made["blocks"]["audio"]["ff"], made["blocks"]["video"]["cross_attn"]
    self_attn = made["blocks"]["audio"]["self_attn"]
    sizes = [m["kernel"]["a"].shape[-1] for m in (ff["up"], self_attn["q"], cross["q"])]
    assert sizes == [2, 3, 4]
    assert adapters.rank(made) == 4
    ones = jax.tree.map(jnp.ones_like, made)
    scaled = adapters.scale(ones, settings.factor)["blocks"]
    got = [
        scaled["audio"]["ff"]["up"], scaled["audio"]["ff"]["down"],
        scaled["audio"]["self_attn"]["q"], scaled["video"]["cross_attn"]["q"],
    ]  # fmt: skip
    for module, want in zip(got, (8 / 2, 6 / 2, 8 / 3, 8 / 4), strict=True):
        np.testing.assert_allclose(module["kernel"]["b"], want, rtol=1e-6)


def test_a_root_scale_keeps_the_change_as_large_at_every_rank():
    small, large = (experiment.Lora(rank=r, alpha=16.0, rslora=True) for r in (4, 64))
    assert small.factor("x", 4) == 8.0
    assert large.factor("x", 64) == 2.0


def test_one_scale_for_all_is_what_every_module_gets(base):
    one = random(base, 4, 1)
    by_module = adapters.scale(one, experiment.Lora(rank=4, alpha=3.0).factor)
    same(by_module, adapters.scale(one, 3.0 / 4))
    assert jax.tree.structure(by_module) == jax.tree.structure(one)


def test_patterns_that_fit_no_adapted_module_are_named(base):
    made = adapters.select(base, ("blocks/audio/ff/*",))
    adapters.require_used(made, ("*/ff/up", "blocks/*"))
    with pytest.raises(ValueError, match=r"no adapted module matches \['\*/q'\]"):
        adapters.require_used(made, ("*/ff/up", "*/q"))


def test_each_module_and_layer_has_its_own_dropout(base):
    made = adapters.with_dropout(random(base, 2, 1), jax.random.key(0), 0.25)
    adapters.check(random(base, 2, 1), base)
    pairs = [p for path, p in adapters._leaves(made) if path.endswith("/key")]
    assert {p.shape for p in pairs} == {(small.LAYERS, 2)}
    rows = np.concatenate([np.asarray(p) for p in pairs])
    assert len(np.unique(rows, axis=0)) == len(rows) == 18 * small.LAYERS


def test_merging_keeps_the_dtype_of_the_base(base):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merged = adapters.merge(half, random(base, 2, 1))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_an_adapter_vmaps_over_a_stack(base):
    pair = [random(base, 2, seed, ("blocks/audio/ff/*",)) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *pair)
    merged = jax.vmap(lambda a: adapters.merge(base, a))(stacked)
    same(jax.tree.map(lambda x: x[1], merged), adapters.merge(base, pair[1]), atol=1e-6)


def test_unknown_paths_and_widths_are_listed(base):
    good = random(base, 2, 1)
    with pytest.raises(ValueError, match=r"blocks/audio/nose/kernel: the base has no"):
        odd = {"blocks": {"audio": {"nose": {"kernel": {"a": 0, "b": 0}}}}}
        adapters.check(odd, base)
    wide = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, 1)]), good)
    with pytest.raises(ValueError, match=r"does not fit the base in 18 places"):
        adapters.check(wide, base)
    with pytest.raises(ValueError, match="another generation or model size"):
        adapters.check(good, {"video": base["video"]})


def test_targets_that_match_nothing_are_named(base):
    with pytest.raises(ValueError, match=r"no module matches \['blocks/audoi/\*'\]"):
        adapters.select(base, ("blocks/audio/ff/*", "blocks/audoi/*"))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        adapters.init(jax.random.key(0), base, 0)

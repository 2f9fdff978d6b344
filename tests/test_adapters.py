"""Adapters as tree deltas: merging, stacking, scaling, refusing what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer as small

from idlora_jax import adapters

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

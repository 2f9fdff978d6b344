"""The rule engine: every key by one rule, stacks complete, nothing lost on the way."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idlora_jax import config
from idlora_jax.weights import io, rules, tables
from idlora_jax.weights.rules import KeyMismatchError, Rule, conv, linear

TABLE = (
    *linear("net.layers.{L}.fc", "layers/fc"),
    *conv("net.conv", "conv"),
    Rule("net.up.{i}.weight", "up_{i}/kernel", "conv_transpose"),
    Rule("net.table", "table"),
)


def tensors(layers=3, seed=0):
    draw = np.random.default_rng(seed).normal
    shapes = {
        **{f"net.layers.{n}.fc.weight": (4, 3) for n in range(layers)},
        **{f"net.layers.{n}.fc.bias": (4,) for n in range(layers)},
        "net.conv.weight": (5, 2, 3, 3, 1),
        "net.conv.bias": (5,),
        "net.up.7.weight": (2, 6, 4),
        "net.table": (2, 3),
    }
    return {k: draw(size=s).astype(np.float32) for k, s in shapes.items()}


def equal(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype
        np.testing.assert_array_equal(got[key], want[key])


def test_layers_become_one_stack_and_axes_are_ours():
    tree = rules.import_(tensors(), TABLE)
    assert jax.tree.map(np.shape, tree) == {
        "layers": {"fc": {"kernel": (3, 3, 4), "bias": (3, 4)}},
        "conv": {"kernel": (3, 3, 1, 2, 5), "bias": (5,)},
        "up_7": {"kernel": (4, 2, 6)},
        "table": (2, 3),
    }
    second = tensors()["net.layers.1.fc.weight"]
    np.testing.assert_array_equal(tree["layers"]["fc"]["kernel"][1], second.T)


def test_export_undoes_import():
    equal(rules.export(rules.import_(tensors(), TABLE), TABLE), tensors())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    layout=st.sampled_from(["linear", "conv", "conv_transpose", "as_is"]),
    size=st.lists(st.integers(1, 4), min_size=3, max_size=5),
    layers=st.integers(1, 12),
)
def test_any_layout_and_number_of_layers_survives_the_round_trip(layout, size, layers):
    size = size[:2] if layout == "linear" else size
    draw = np.random.default_rng(layers).normal
    given = {f"a.{n}.w": draw(size=size) for n in range(layers)}
    table = (Rule("a.{L}.w", "a/w", layout),)
    tree = rules.import_(given, table)
    assert tree["a"]["w"].shape[0] == layers
    equal(rules.export(tree, table), given)


def test_the_order_of_keys_does_not_matter():
    backwards = dict(reversed(tensors(layers=11).items()))
    tree = rules.import_(backwards, TABLE)
    want = rules.import_(tensors(layers=11), TABLE)
    jax.tree.map(np.testing.assert_array_equal, tree, want)


def test_an_unknown_key_is_named():
    with pytest.raises(KeyMismatchError, match=r"net\.extra: matched by 0 rules"):
        rules.import_(tensors() | {"net.extra": np.zeros(1)}, TABLE)


def test_a_key_matched_by_two_rules_is_named():
    twice = (*TABLE, Rule("net.conv.{i}", "other_{i}"), Rule("net.conv.7", "seven"))
    with pytest.raises(KeyMismatchError, match=r"net\.conv\.7: matched by 2 rules"):
        rules.import_(tensors() | {"net.conv.7": np.zeros(1)}, twice)


def test_missing_layers_are_named():
    gone = {k: v for k, v in tensors(5).items() if not re.search(r"\.[13]\.fc\.b", k)}
    with pytest.raises(KeyMismatchError, match=r"layers/fc/bias: layers \[1, 3\]"):
        rules.import_(gone, TABLE)


def test_offenders_are_listed_together_and_long_lists_are_cut():
    odd = {f"odd.{n}": np.zeros(1) for n in range(20)}
    with pytest.raises(KeyMismatchError, match="20 keys do not fit") as caught:
        rules.import_(tensors() | odd, TABLE)
    assert str(caught.value).count("odd.") == 12 and "and 8 more" in str(caught.value)


def test_a_parameter_without_a_name_is_refused_on_export():
    with pytest.raises(KeyMismatchError, match="conv/extra"):
        rules.export({"conv": {"extra": np.zeros(1)}}, TABLE)


def test_absent_layers_of_a_given_depth_are_zero():
    part = {k: v for k, v in tensors().items() if ".1.fc" not in k}
    kernel = rules.import_(part, TABLE, depth=5)["layers"]["fc"]["kernel"]
    assert kernel.shape[0] == 5
    np.testing.assert_array_equal(np.abs(kernel).max((1, 2)) > 0, [1, 0, 1, 0, 0])
    with pytest.raises(KeyMismatchError, match="got layer 2, expected at most 1"):
        rules.import_(part, TABLE, depth=2)


def test_flatten_undoes_nest():
    flat = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert rules.nest(flat) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert rules.flatten(rules.nest(flat)) == flat
    assert rules.flatten({"c": 1}, "a/b") == {"a/b/c": 1}


@pytest.mark.parametrize("side", ["torch", "flax"])
@pytest.mark.parametrize("table", ["BASE", "GEMMA"])
def test_no_two_rules_of_the_shipped_tables_share_a_name(table, side):
    table = getattr(tables, table)
    names = [re.sub(r"\{(\w)\}", "7", getattr(rule, side)) for rule in table]
    match = rules.matcher(table, side)
    assert [len(match(name)) for name in names] == [1] * len(names)


@pytest.mark.parametrize("generation", ["2.0", "2.3"])
def test_the_shipped_table_is_a_bijection_on_a_transformer(generation):
    shapes = io.shapes_of("transformer", config.tiny(generation))
    flat = {p: np.zeros(s.shape, bool) for p, s in rules.flatten(shapes).items()}
    exported = rules.export({"transformer": rules.nest(flat)}, tables.BASE)
    blocks = sum(p.startswith("blocks/") for p in flat)
    assert len(exported) == len(flat) - blocks + 4 * blocks
    back = rules.import_(exported, tables.BASE)["transformer"]
    assert jax.tree.map(np.shape, back) == jax.tree.map(lambda s: s.shape, shapes)

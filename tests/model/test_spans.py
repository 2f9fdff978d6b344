"""The static plan of a sweep: who is computed where, and how often."""

import pytest

from idlora_jax import guidance
from idlora_jax.model import spans
from idlora_jax.types import Branch, Skip

DEPTH = 48


def plan(terms, mode="sweep", any_ref=True, depth=DEPTH):
    branches = guidance.branches(terms, depth)
    return spans.spans(spans.checked(branches, depth, any_ref=any_ref), depth, mode)


def computed(plan) -> int:
    """Layers run, over all branches."""
    return sum((s.stop - s.start) * sum(len(k.groups) for k in s.kinds) for s in plan)


def test_one_branch_is_one_span_of_one_kind():
    (only,) = plan([])
    assert (only.start, only.stop, len(only.kinds)) == (0, DEPTH, 1)


def test_stg_shares_the_layers_before_the_skipped_one():
    terms = [guidance.stg([29])]
    cut = plan(terms)
    assert [(s.start, s.stop) for s in cut] == [(0, 29), (29, 30), (30, 48)]
    assert computed(cut) == 48 + (48 - 29)


def test_the_published_step_runs_four_passes_and_the_rest_of_stg():
    terms = [guidance.text_cfg(), guidance.identity(), guidance.stg([29])]
    cut = plan([*terms, guidance.bimodal()])
    assert computed(cut) == 4 * 48 + (48 - 29)
    # Plain, without reference, apart: three bodies, and one more where STG skips.
    assert [len(s.kinds) for s in cut] == [3, 4, 3]


def test_rows_of_a_batch_may_differ_in_the_reference():
    terms = [guidance.identity()]
    assert [len(s.kinds) for s in plan(terms)] == [2]
    assert [len(s.kinds) for s in plan(terms, "batch")] == [1]


def test_without_reference_tokens_dropping_them_is_the_same_pass():
    assert computed(plan([guidance.identity()], any_ref=False)) == DEPTH


def test_every_branch_has_a_source_in_every_span():
    for span in plan([guidance.text_cfg(), guidance.stg([0, 5])]):
        groups = {g for kind in span.kinds for g in kind.groups}
        assert set(span.source) == groups


def test_skips_of_another_depth_are_refused():
    with pytest.raises(ValueError, match="got 2 layers, expected 3"):
        spans.checked((Branch(skip=(Skip(), Skip())),), 3, any_ref=False)

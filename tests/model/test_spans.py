"""The static plan of a sweep: who is computed where, and how often."""

import pytest

from idlora_jax import guidance
from idlora_jax.model import spans
from idlora_jax.types import Branch, Skip

DEPTH = 48


def plan(terms, mode="sweep", any_ref=True, depth=DEPTH, without=()):
    branches = guidance.branches(terms, depth)
    tidy = spans.checked(branches, depth, any_ref=any_ref)
    return spans.spans(tidy, depth, mode, without)


def computed(plan) -> int:
    """Layers run, over all branches."""
    return sum((s.stop - s.start) * sum(len(k.groups) for k in s.kinds) for s in plan)


def bodies(plan) -> int:
    """Bodies compiled, of all spans."""
    return sum(len(s.kinds) for s in plan)


def test_one_branch_is_one_span_of_one_kind():
    (only,) = plan([])
    assert (only.start, only.stop, len(only.kinds)) == (0, DEPTH, 1)


def test_stg_shares_the_layers_before_the_skipped_one():
    terms = [guidance.stg([29])]
    cut = plan(terms)
    assert [(s.start, s.stop) for s in cut] == [(0, 29), (29, 48)]
    assert computed(cut) == 48 + (48 - 29)
    assert computed(plan(terms, without=("prefix",))) == 2 * 48


def test_what_is_skipped_in_one_layer_alone_has_no_body_of_its_own():
    once, often = (plan([guidance.stg(layers)]) for layers in ([29], [28, 29]))
    assert [kind.skip for span in once for kind in span.kinds] == [Skip()] * 2
    (kept,) = {kind.skip for span in often for kind in span.kinds} - {Skip()}
    assert kept == Skip(video_self=True, audio_self=True)
    assert bodies(once) == 2 < bodies(often)


def test_the_published_step_runs_four_passes_and_the_rest_of_stg():
    terms = [guidance.text_cfg(), guidance.identity(), guidance.stg([29])]
    cut = plan([*terms, guidance.bimodal()])
    assert computed(cut) == 4 * 48 + (48 - 29)
    # Plain, without reference, apart; the last layer of the second one is another.
    assert [(s.start, s.stop) for s in cut] == [(0, 29), (29, 47), (47, 48)]
    assert bodies(cut) == 3 * 3


def test_only_the_last_layer_leaves_out_what_is_not_read():
    cut = plan([guidance.identity()])
    assert [(s.start, s.stop) for s in cut] == [(0, 47), (47, 48)]
    reads = [[sorted(kind.branch.reads) for kind in span.kinds] for span in cut]
    assert reads == [[["audio", "video"]] * 2, [["audio", "video"], ["audio"]]]
    assert len(plan([guidance.identity()], without=("dead_tail",))) == 1
    assert len(plan([guidance.identity(video=True)])) == 1


def test_passes_that_differ_in_what_is_read_are_one():
    sound = Branch(reads=frozenset({"audio"}))
    for tidy in spans.checked((Branch(), sound), 3, any_ref=False):
        assert tidy == Branch(skip=(Skip(),) * 3)


def test_rows_of_a_batch_may_differ_in_the_reference():
    terms = [guidance.identity()]
    assert bodies(plan(terms, without=("dead_tail",))) == 2
    assert bodies(plan(terms, "batch", without=("dead_tail",))) == 1


def test_without_reference_tokens_dropping_them_is_the_same_pass():
    assert computed(plan([guidance.identity()], any_ref=False)) == DEPTH


def test_every_branch_has_a_source_in_every_span():
    for span in plan([guidance.text_cfg(), guidance.stg([0, 5])]):
        groups = {g for kind in span.kinds for g in kind.groups}
        assert set(span.source) == groups


def test_skips_of_another_depth_are_refused():
    with pytest.raises(ValueError, match="got 2 layers, expected 3"):
        spans.checked((Branch(skip=(Skip(), Skip())),), 3, any_ref=False)

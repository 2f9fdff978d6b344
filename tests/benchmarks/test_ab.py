"""Equality before times, rounds in turns, ratios within rounds."""

import numpy as np
import pytest

from benchmarks import ab
from benchmarks.works import Work


def work(name: str, value: object, log: list[str] | None = None) -> Work:
    def run() -> object:
        if log is not None:
            log.append(name)
        return value

    return Work(name, "test", run, lambda out: {"x": np.asarray(out, float)})


def test_rounds_are_interleaved():
    log: list[str] = []
    times = ab.measure([work(n, 1, log) for n in "abc"], 2)
    assert log == [*"abcabc"]
    assert [len(t.wall) for t in times] == [2, 2, 2]


def test_ratios_are_taken_within_each_round():
    base, own = ab.Times((2.0, 9.0), (4.0, 6.0)), ab.Times((1.0, 3.0), (1.0, 3.0))
    assert ab.ratios(base, own) == (4.0, 2.0)
    assert ab.ratios(base, own, clock="wall") == (2.0, 3.0)


def test_equal_works_pass_and_their_differences_are_told():
    firsts = ab.check([work("a", [1.0, 4.0]), work("b", [1.0, 4.0001])])
    assert firsts[0].error == (0.0, 0.0)
    np.testing.assert_allclose(firsts[1].error, (1e-4, 2.5e-5), rtol=1e-6)


@pytest.mark.parametrize("bad", [[1.0, 4.01], [1.0, np.nan], [np.inf, 4.0]])
def test_unequal_works_are_refused_by_name_before_anything_is_timed(bad):
    log: list[str] = []
    works = [work("right", [1.0, 4.0], log), work("wrong", bad, log)]
    with pytest.raises(ab.UnequalError, match=r"test wrong: .*"):
        ab.check(works)
    assert log == ["right", "wrong"], "each ran once"


@pytest.mark.parametrize("value", [[np.nan, 1.0], [0.0, 0.0]])
def test_a_baseline_that_computes_nothing_is_refused(value):
    with pytest.raises(ab.UnequalError, match="not timed"):
        ab.check([work("a", value), work("b", value)])


def test_outputs_of_other_shapes_are_refused():
    with pytest.raises(ab.UnequalError, match="got outputs"):
        ab.check([work("a", [1.0, 2.0]), work("b", [1.0])])


def test_what_is_compared_is_a_copy():
    """Buffers that a later run writes over must not hide a difference."""
    shared = np.ones(2)

    def run(value: float) -> np.ndarray:
        shared[:] = value
        return shared

    works = [
        Work(str(v), "test", lambda v=v: run(v), lambda x: {"x": x}) for v in (1.0, 2.0)
    ]
    with pytest.raises(ab.UnequalError):
        ab.check(works)

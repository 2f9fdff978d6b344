import threading
import time

import pytest

from idlora_jax.data import prefetch


def test_results_come_in_order_whatever_takes_longest():
    def work(n):
        time.sleep(0.02 * (3 - n % 4))
        return n

    assert list(prefetch.ordered(work, range(12), 4)) == list(range(12))


def test_only_so_much_is_begun_before_it_is_used():
    begun, lock = [], threading.Lock()

    def work(n):
        with lock:
            begun.append(n)
        return n

    results = prefetch.ordered(work, range(100), 3)
    for n in results:
        time.sleep(0.002)
        assert len(begun) <= n + 4
        if n == 10:
            break
    results.close()
    assert len(begun) <= 14


def test_several_threads_work_at_once():
    together = threading.Barrier(3, timeout=10)
    results = prefetch.ordered(lambda n: together.wait() >= 0, range(3), 3)
    assert all(results)


def test_an_error_comes_when_its_result_is_due():
    results = prefetch.ordered(lambda n: 1 // (2 - n), range(4), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)

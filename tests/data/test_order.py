"""Which clips a batch holds."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from idlora_jax.data.order import Order

counts = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def clips(order: Order, number: int) -> list[tuple[int, int]]:
    bucket, rows = order.at(number)
    return [(bucket, int(row)) for row in rows]


def batches_of(order: Order, epochs: int) -> int:
    return sum(epochs * count // order.batch for count in order.counts)


@settings(max_examples=40, deadline=None)
@given(counts, st.integers(1, 5), st.integers(0, 3), st.integers(1, 4))
def test_no_clip_is_lost_and_none_comes_before_its_turn(counts, batch, seed, epochs):
    order = Order(counts, batch, seed)
    seen: Counter[tuple[int, int]] = Counter()
    for number in range(batches_of(order, epochs)):
        seen.update(clips(order, number))
    for bucket, count in enumerate(counts):
        times = [seen[bucket, row] for row in range(count)]
        assert max(times) - min(times) <= 1
        waiting = epochs * count - sum(times)
        assert 0 <= waiting < batch
        assert max(times) <= epochs


@settings(max_examples=20, deadline=None)
@given(counts, st.integers(1, 5), st.integers(0, 200))
def test_any_batch_is_found_at_once_and_holds_clips_of_one_bucket(counts, batch, at):
    order = Order(counts, batch)
    found = order.at(at)
    assert found.rows.shape == (batch,)
    assert ((found.rows >= 0) & (found.rows < counts[found.bucket])).all()
    np.testing.assert_array_equal(found.rows, Order(counts, batch).at(at).rows)


def test_every_epoch_of_one_bucket_is_a_permutation_of_its_own():
    order = Order((7,), 2)
    rows = np.concatenate([order.at(number).rows for number in range(7)])
    epochs = rows.reshape(2, 7)
    np.testing.assert_array_equal(np.sort(epochs, 1), [range(7)] * 2)
    assert not np.array_equal(*epochs)


def test_buckets_come_in_a_new_order_every_epoch_in_proportion_to_their_clips():
    order = Order((6, 12), 3)
    buckets = [order.at(number).bucket for number in range(60)]
    epochs = np.array(buckets).reshape(10, 6)
    np.testing.assert_array_equal(epochs.sum(1), [4] * 10)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 3


def test_another_seed_is_another_order():
    orders = [[clips(Order((9, 5), 2, s), n) for n in range(14)] for s in (0, 1)]
    assert orders[0] != orders[1]


def test_the_order_is_the_same_in_every_version():
    order = Order((5, 3), 2, seed=1)
    assert [clips(order, n) for n in (0, 1, 2, 50)] == [
        [(0, 4), (0, 0)], [(1, 2), (1, 0)], [(0, 1), (0, 2)], [(0, 0), (0, 4)],
    ]  # fmt: skip
    # Of one bucket: permutations by (seed, epoch) one after the other, as ever.
    rows = [Order((7,), 2, seed=5).at(number).rows for number in range(7)]
    draws = [np.random.default_rng([5, epoch]).permutation(7) for epoch in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(draws))

"""The promises of the order, for any shards, lanes, windows and numbers of ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.order.samples import PADDING, Order, layout_of
from resnet_dist.order.versions import VERSIONS


@st.composite
def orders(draw: st.DrawFn, *, training: bool) -> Order:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24]))
    batch = lanes * draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12))
    counts[0] += batch  # enough for one step
    window, seed, version = (
        draw(st.integers(1, 90)),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(VERSIONS)),
    )
    return Order(tuple(counts), batch, lanes, window, seed, training, version=version)


def epoch_ids(order: Order, epoch: int) -> np.ndarray:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return np.concatenate([order.ids_at(step, range(order.lanes)) for step in steps])


@given(orders(training=True), st.integers(0, 5))
def test_training_sees_each_sample_at_most_once_per_epoch(order: Order, epoch: int) -> None:
    ids = epoch_ids(order, epoch)
    assert len(ids) == order.num_samples // order.global_batch_size * order.global_batch_size
    assert len(np.unique(ids)) == len(ids)
    assert ids.min() >= 0
    assert ids.max() < order.num_samples


@given(orders(training=False))
def test_evaluation_sees_each_sample_exactly_once(order: Order) -> None:
    ids = epoch_ids(order, 0)
    assert sorted(ids[ids != PADDING]) == list(range(order.num_samples))
    assert 0 <= (ids == PADDING).sum() < order.global_batch_size


@given(orders(training=True), st.data())
def test_ranks_together_draw_the_global_batch(order: Order, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 3 * order.steps_per_epoch))
    whole = order.ids_at(step, range(order.lanes))
    for world_size in (size for size in range(1, order.lanes + 1) if order.lanes % size == 0):
        shares = [order.ids_at(step, order.lanes_of(rank, world_size)) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(shares), whole)


@given(orders(training=True), st.data())
def test_resuming_reaches_what_running_reaches(order: Order, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * order.steps_per_epoch))
    for earlier in range(step):
        order.ids_at(earlier, range(order.lanes))
    fresh = replace(order)
    np.testing.assert_array_equal(
        fresh.ids_at(step, range(order.lanes)), order.ids_at(step, range(order.lanes))
    )


@given(orders(training=True), st.data())
def test_the_shards_ahead_are_those_that_are_read(order: Order, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * order.steps_per_epoch))
    steps = data.draw(st.integers(1, order.steps_per_epoch))
    lanes = range(data.draw(st.integers(0, order.lanes - 1)), order.lanes)
    ahead = order.shards_ahead(step, lanes, steps)
    assert len(ahead) == len(set(ahead))
    ids = np.concatenate([order.ids_at(s, lanes) for s in range(step, step + steps)])
    read = np.searchsorted(np.cumsum(order.counts), ids, side="right")
    assert set(read.tolist()) <= set(ahead)


def test_every_sample_of_a_single_shard_is_seen_in_time() -> None:
    order = Order((103,), 8, 4, 16, seed=0, training=True)
    seen = [set(epoch_ids(order, epoch).tolist()) for epoch in range(40)]
    assert len(seen[0]) == 96
    assert set.union(*seen) == set(range(103))
    assert seen[0] != seen[1]


def test_shards_spread() -> None:
    # 64 shards of one class each: unshuffled, a batch of 64 from 16 lanes holds 16 classes.
    order = Order((100,) * 64, 64, 16, 400, seed=1, training=True)
    classes = [len(np.unique(order.ids_at(step, range(16)) // 100)) for step in range(order.steps_per_epoch)]
    perfect = 64 * (1 - (1 - 1 / 64) ** 64)  # 40.6 in a perfect shuffle
    assert np.mean(classes) > 0.75 * perfect


def test_epochs_and_seeds_differ() -> None:
    def first_epoch(seed: int, epoch: int) -> list[int]:
        return epoch_ids(Order((50, 50), 10, 2, 50, seed, training=True), epoch).tolist()

    assert first_epoch(0, 0) != first_epoch(0, 1)
    assert first_epoch(0, 0) != first_epoch(1, 0)
    assert first_epoch(5, 2) == first_epoch(5, 2)


def test_empty_shards_hold_nothing() -> None:
    layout = layout_of((0, 3, 0, 0, 2, 0), seed=0, epoch=0)
    assert sorted(layout.ids(np.arange(5))) == [0, 1, 2, 3, 4]

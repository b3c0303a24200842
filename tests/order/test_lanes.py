"""The shuffle inside a lane, in both versions: a stretch is that of the whole lane, and the edges mix as the middle."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.order.lanes import _delays, emissions
from resnet_dist.order.samples import Order
from resnet_dist.order.versions import FIRST_VERSION, NEWEST_VERSION, VERSIONS

LENGTHS, WINDOWS, WHICH = st.integers(1, 400), st.integers(1, 500), st.sampled_from(VERSIONS)


def sorted_lane(length: int, window: int, version: int) -> np.ndarray:
    """Return all emissions of a lane, by the definition of the keys, in units of 2**-32."""
    half, keys = window // 2, []
    for i, delay in enumerate(_delays(0, length, seed=7, epoch=3, lane=2).tolist()):
        start, end = i, i + window
        if version >= 2 and i < window:
            start = half
        if version >= 2 and i >= length - window:
            end = length + half
        keys.append(start * 2**32 + delay * (end - start))
    return np.array(sorted(range(length), key=keys.__getitem__))


def lane(first: int, count: int, length: int, window: int, version: int) -> np.ndarray:
    return emissions(first, count, length=length, window=window, seed=7, epoch=3, lane=2, version=version)


@given(LENGTHS, WINDOWS, WHICH, st.data())
def test_a_stretch_of_a_lane_equals_sorting_all_of_it(
    length: int, window: int, version: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, length - 1))
    count = data.draw(st.integers(1, length - first))
    found = lane(first, count, length, window, version)
    np.testing.assert_array_equal(found, sorted_lane(length, window, version)[first : first + count])
    assert np.abs(found - np.arange(first, first + count)).max() < window


@given(LENGTHS, WINDOWS, WHICH)
def test_samples_a_window_apart_keep_their_places(length: int, window: int, version: int) -> None:
    """So no shard is in use for longer than a window, at the edges neither."""
    emitted = lane(0, length, length, window, version)
    assert sorted(emitted.tolist()) == list(range(length))
    place = np.argsort(emitted)
    last_so_far, first_from_here = np.maximum.accumulate(place), np.minimum.accumulate(place[::-1])[::-1]
    assert (last_so_far[: max(0, length - window)] < first_from_here[window:]).all()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("first", [0, 30_000, 95_000])
def test_a_window_that_needs_many_bits_gives_the_same_order(version: int, first: int) -> None:
    """Cover keys that are too wide to be sorted together with their offsets."""
    expected = sorted_lane(100_000, 60_000, version)[first : first + 5_000]
    np.testing.assert_array_equal(lane(first, 5_000, 100_000, 60_000, version), expected)


@given(st.integers(1_000, 5_000), st.integers(100, 2_000))
def test_only_the_two_edges_differ_between_the_versions(length: int, window: int) -> None:
    """Two windows from either end, no sample is emitted whose key the versions draw from different ranges."""
    first, last = 2 * window, length - 2 * window
    if first < last:
        count = last - first
        expected = lane(first, count, length, window, FIRST_VERSION)
        np.testing.assert_array_equal(lane(first, count, length, window, NEWEST_VERSION), expected)


def mean_classes(version: int) -> np.ndarray:
    """Return the mean number of classes in the first, the middle and the last batch of an epoch.

    256 shards of one class each; 16 lanes with a window of four shards; batches of 256.
    """
    counts = []
    for seed in range(20):
        order = Order((100,) * 256, 256, 16, 400, seed, training=True, version=version)
        steps = (0, order.steps_per_epoch // 2, order.steps_per_epoch - 1)
        counts.append([len(np.unique(order.ids_at(step, range(16)) // 100)) for step in steps])
    return np.mean(counts, axis=0)


def test_the_first_and_the_last_batch_mix_as_many_classes_as_the_middle() -> None:
    first, middle, last = mean_classes(NEWEST_VERSION)
    assert min(first, last) > 0.95 * middle
    first, middle, last = mean_classes(FIRST_VERSION)
    assert max(first, last) < 0.6 * middle


def test_neighbours_spread() -> None:
    for version in VERSIONS:
        assert (np.abs(np.diff(lane(0, 400, 400, 400, version))) == 1).mean() < 0.05


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (1, "5054e6b3c8abc5f1d19cc38aa9646abffa184ad18d277a13d8238926b351661b"),  # since 0.2.0
        (2, "16673b9f83762e80f49c60037a1bbcca4ca963f286c4c1d936673b8f2dfd4a9d"),
    ],
)
def test_a_version_gives_the_samples_that_it_gave(version: int, expected: str) -> None:
    """A run keeps its version, so the samples of a version never change."""
    digest = hashlib.sha256()
    for counts, batch, lanes, window, seed in (
        ((100,) * 13, 64, 8, 50, 3),
        ((7, 0, 61, 40, 93), 12, 4, 400, 9),
        ((5000, 3000), 96, 24, 17, 0),
    ):
        for training, epochs in ((True, 2), (False, 1)):
            order = Order(counts, batch, lanes, window, seed, training, version=version)
            for step in range(epochs * order.steps_per_epoch):
                digest.update(order.ids_at(step, range(lanes)).astype("<i8").tobytes())
    assert digest.hexdigest() == expected

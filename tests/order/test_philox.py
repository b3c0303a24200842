"""Philox4x32-10 against the known answers published with Random123, and independence of the batch."""

import numpy as np
import pytest

from resnet_dist.order.philox import Purpose, permutation, philox4x32, uniform, words_of

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    words = philox4x32(tuple(np.array([value], np.uint64) for value in counter), key)
    assert tuple(words[0].tolist()) == answer


def test_words_do_not_depend_on_the_batch_they_are_drawn_in() -> None:
    ids = np.array([5, 2**40, 0, 77])
    together = words_of(ids, Purpose.AUGMENT, seed=3, epoch=9, blocks=3)
    for row, sample_id in zip(together, ids, strict=True):
        alone = words_of(np.array([sample_id]), Purpose.AUGMENT, seed=3, epoch=9, blocks=3)[0]
        np.testing.assert_array_equal(row, alone)
    others = [
        words_of(ids, Purpose.DELAY, seed=3, epoch=9, blocks=3),
        words_of(ids, Purpose.AUGMENT, seed=4, epoch=9, blocks=3),
        words_of(ids, Purpose.AUGMENT, seed=3, epoch=8, blocks=3),
        words_of(ids, Purpose.AUGMENT, seed=3, epoch=9, sub=1, blocks=3),
    ]
    assert all((together != other).all(axis=1).all() for other in others)


def test_uniform_and_permutation() -> None:
    draws = uniform(words_of(np.arange(20_000), Purpose.DELAY, seed=0, epoch=0))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005
    assert sorted(permutation(1000, Purpose.SHARDS, seed=0).tolist()) == list(range(1000))

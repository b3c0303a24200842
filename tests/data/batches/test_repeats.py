"""Repeated augmentation and alternate mirroring: each sample has several copies, augmented independently."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.config import Data, Recipe
from resnet_dist.data.batches.loader import Batch
from resnet_dist.data.images.crop import to_sizes
from resnet_dist.data.images.decode import open_image
from resnet_dist.data.images.draws import randomness
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.shards.reader import ShardReader
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import RecipeError
from resnet_dist.order.samples import Order
from resnet_dist.order.shares import Share
from tests.data.conftest import data_of, encoded, global_batches, picture, write_shards

COUNTS = (61, 0, 40, 77, 30)
REPEATS = 4
FIELDS = {"global_batch_size": 96, "lanes": 6, "repeats": REPEATS}  # 24 distinct samples per step
STEPS = sum(COUNTS) // 24


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("repeats")
    return build_index(expand(write_shards(folder, COUNTS)), folder, CacheLimits(folder / "cache", 1, 1.0))[0]


def contents(batches: list[list[Batch]]) -> list[tuple[bytes, bytes, bytes]]:
    return [
        (
            torch.cat([part.images_BSSC for part in parts]).numpy().tobytes(),
            torch.cat([part.labels_B for part in parts]).numpy().tobytes(),
            np.concatenate([part.ids_B for part in parts]).tobytes(),
        )
        for parts in batches
    ]


@st.composite
def orders(draw: st.DrawFn) -> Order:
    lanes, repeats = draw(st.sampled_from([1, 2, 4, 12])), draw(st.integers(1, 5))
    batch = lanes * repeats * draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=9))
    counts[0] += batch // repeats  # An epoch needs at least one step.
    seed = draw(st.integers(0, 2**32 - 1))
    return Order(tuple(counts), batch, lanes, draw(st.integers(1, 90)), seed, training=True, repeats=repeats)


@given(orders(), st.integers(0, 4))
def test_every_sample_comes_repeats_times_in_one_batch_and_one_lane(order: Order, epoch: int) -> None:
    seen: Counter[int] = Counter()
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        by_lane = [order.ids_at(step, [lane]) for lane in range(order.lanes)]
        np.testing.assert_array_equal(np.concatenate(by_lane), order.ids_at(step, range(order.lanes)))
        for ids in by_lane:
            assert set(Counter(ids.tolist()).values()) == {order.repeats}
            grouped = ids[order.rows_of_samples(1)]
            assert (grouped == grouped[:, :1]).all()
            if order.distinct_per_lane > 1:  # Mixing needs neighbours that differ.
                assert (ids != np.roll(ids, 1)).all()
            seen.update(ids.tolist())
    assert set(seen.values()) == {order.repeats}
    missing = order.num_samples - len(seen)  # the incomplete last batch, of other samples in each epoch
    assert 0 <= missing < order.global_batch_size // order.repeats


@given(orders(), st.data())
def test_shards_ahead_are_those_that_are_read(order: Order, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 2 * order.steps_per_epoch))
    steps = data.draw(st.integers(1, order.steps_per_epoch))
    ids = np.concatenate([order.ids_at(s, range(order.lanes)) for s in range(step, step + steps)])
    read = np.searchsorted(np.cumsum(order.counts), ids, side="right")
    assert set(read.tolist()) <= set(order.shards_ahead(step, range(order.lanes), steps))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop": "random-resized-crop"},
        {"cache": "ram", "erase": 0.5},
        {"policy": "trivial-augment", "flip": "alternate"},
    ],
)
def test_any_number_of_ranks_and_any_restart_sees_the_same(index: Index, changes: dict[str, object]) -> None:
    data = data_of(index, **FIELDS, **changes)
    steps = range(STEPS + 3)
    batches = global_batches(index, data, 1, steps)
    seen = Counter(np.concatenate([parts[0].ids_B for parts in batches[:STEPS]]).tolist())
    assert set(seen.values()) == {REPEATS}
    assert len(seen) == STEPS * 24
    whole = contents(batches)
    for world_size in (2, 6):
        assert contents(global_batches(index, data, world_size, steps)) == whole
    for start in (1, STEPS - 1, STEPS + 1):
        assert contents(global_batches(index, data, 3, range(start, STEPS + 3))) == whole[start:]


SPREAD = {"global_batch_size": 96, "lanes": 24, "repeats": 2, "micro_batch_size": 12, "spread_repeats": True}


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_spread_copies_lie_in_different_micro_batches(index: Index, repeats: int) -> None:
    """Each of the 8 micro-batches has 12 samples, all different, which are those of `repeats` neighbours."""
    data = data_of(index, **(SPREAD | {"repeats": repeats, "spread_repeats": repeats > 1}))
    seen: Counter[int] = Counter()
    steps = sum(COUNTS) * repeats // 96
    for [batch] in global_batches(index, data, 1, range(steps)):
        groups = batch.ids_B.reshape(8 // repeats, repeats, 12)
        assert all(len(set(part.tolist())) == 12 for group in groups for part in group)
        assert (groups == groups[:, :1]).all()
        assert len(np.unique(batch.ids_B)) == 96 // repeats
        seen.update(batch.ids_B.tolist())
    assert set(seen.values()) == {repeats}
    assert 0 <= sum(COUNTS) - len(seen) < 96 // repeats


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop": "random-resized-crop"},
        {"cache": "ram", "erase": 0.5},
        {"policy": "trivial-augment", "flip": "alternate"},
        {"global_batch_size": 144, "micro_batch_size": 12, "lanes": 12, "repeats": 4, "flip": True},
    ],
)
def test_spread_copies_are_the_same_for_any_number_of_ranks(index: Index, changes: dict[str, object]) -> None:
    """Three ranks of twelve micro-batches have one group of copies each, two ranks one and a half, twelve a part."""
    data = data_of(index, **(SPREAD | changes))
    steps = range(sum(COUNTS) * data.repeats // data.global_batch_size + 2)
    batches = global_batches(index, data, 1, steps)
    whole = contents(batches)
    for world_size in {d for d in (2, 3, 4, 8, 12) if data.micro_batches and data.micro_batches % d == 0}:
        assert contents(global_batches(index, data, world_size, steps)) == whole
    assert contents(global_batches(index, data, 4, range(2, steps.stop))) == whole[2:]
    for [batch] in batches[:2]:
        different = [
            len({image.tobytes() for image in batch.images_BSSC.numpy()[batch.ids_B == sample_id]})
            for sample_id in np.unique(batch.ids_B)
        ]
        assert np.mean(different) > data.repeats - 0.6  # Copies are equal by chance alone.


@pytest.fixture
def reads(index: Index, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the ids of the samples that are read, in the order of the reads."""
    reads: list[int] = []
    original = ShardReader.read_at

    def read_at(self: ShardReader, number: int, position: int) -> object:
        reads.append(sum(index.counts[:number]) + position)
        return original(self, number, position)

    monkeypatch.setattr(ShardReader, "read_at", read_at)
    return reads


def test_a_rank_decodes_the_spread_copies_that_it_has_at_once(index: Index, reads: list[int]) -> None:
    data = data_of(index, **(SPREAD | {"prefetch_batches": 1}))
    for world_size, times in ((1, 1), (4, 1), (8, 2)):
        reads.clear()
        parts = global_batches(index, data, world_size, range(1))[0]
        ids = np.concatenate([part.ids_B for part in parts])
        assert {reads.count(sample_id) for sample_id in ids.tolist()} == {times}


def test_the_samples_of_a_rank_are_named_from_its_share(index: Index) -> None:
    data = data_of(index, **SPREAD)
    order = Order(index.counts, 96, 24, data.window, 5, training=True, repeats=2)
    whole = Share.of(order, data, 0, 1)
    for world_size in (2, 4, 8):
        parts = [Share.of(order, data, rank, world_size) for rank in range(world_size)]
        for step in (0, 1, 3):
            assert np.array_equal(np.concatenate([p.ids_at(step) for p in parts]), whole.ids_at(step))
        assert np.array_equal(np.concatenate([part.copies_B for part in parts]), whole.copies_B)


@pytest.mark.parametrize("cache", ["ram", "device"])
def test_a_cached_set_gives_the_same_copies(index: Index, cache: str) -> None:
    expected = contents(global_batches(index, data_of(index, **FIELDS), 1, range(5)))
    assert contents(global_batches(index, data_of(index, cache=cache, **FIELDS), 2, range(5))) == expected


@pytest.mark.parametrize("crop", ["pad-crop", "random-resized-crop"])
def test_copies_differ_and_the_first_is_what_it_is_alone(index: Index, crop: str) -> None:
    data = data_of(index, crop=crop, pad=4, **FIELDS)
    ids = np.repeat(np.arange(20), REPEATS)
    copies = np.tile(np.arange(REPEATS), 20)
    random = randomness(ids, data, seed=1, epoch=2, copies_N=copies)
    alone = randomness(np.arange(20), data, seed=1, epoch=2)
    assert np.array_equal(random.batch_N4[::REPEATS], alone.batch_N4)
    assert np.array_equal(random.crop_NK[::REPEATS], alone.crop_NK)
    assert len(np.unique(random.batch_N4[:, 1])) == 80
    for [batch] in global_batches(index, data, 1, range(3)):
        images = batch.images_BSSC.numpy()
        different = []
        for sample_id in np.unique(batch.ids_B):
            copies_of_it = images[batch.ids_B == sample_id]
            different.append(len({image.tobytes() for image in copies_of_it}))
        assert np.mean(different) > 3.5  # Two of the 4 may be equal by chance.


def test_each_sample_is_read_and_decoded_once(index: Index, reads: list[int]) -> None:
    [[batch]] = global_batches(index, data_of(index, crop="random-resized-crop", **FIELDS), 1, range(1))
    assert len(batch.ids_B) == 96
    assert set(reads) >= set(batch.ids_B.tolist())
    assert max(Counter(reads).values()) == 1  # Batches decoded ahead hold other samples.


@pytest.mark.parametrize("form", ["png", "jpeg"])
@pytest.mark.parametrize("size", [16, 160])
def test_views_cut_from_one_decoding_equal_views_decoded_one_by_one(form: str, size: int) -> None:
    smooth = np.add.outer(np.arange(300), np.arange(400))[..., None] * np.array([1, 2, 3]) // 8
    image = open_image(encoded((smooth % 256).astype(np.uint8), form), 3)
    fields = data_of(Index("x", (), ()), crop="random-resized-crop")
    for seed in range(10):
        draws = list(np.random.default_rng(seed).random((REPEATS, 40)))
        mirror = [True, False, True, False]
        alone = [
            to_sizes(image, fields, [row], [flip], size)[0].copy()
            for row, flip in zip(draws, mirror, strict=True)
        ]
        together = to_sizes(image, fields, draws, mirror, size)
        for ours, theirs in zip(together, alone, strict=True):
            difference = np.abs(ours.astype(int) - theirs)
            if form == "png" or size == 160:  # Nothing is decoded at a smaller scale.
                assert difference.max() == 0
            assert difference.mean() < 2


def test_a_bad_sample_is_bad_in_all_its_copies(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ShardReader.read_at

    def read_at(self: ShardReader, number: int, position: int) -> object:
        sample = original(self, number, position)
        return sample._replace(image=b"junk") if sum(index.counts[:number]) + position == 17 else sample

    monkeypatch.setattr(ShardReader, "read_at", read_at)
    for changes in ({}, {"cache": "ram"}):
        bad = []
        for [batch] in global_batches(index, data_of(index, **FIELDS, **changes), 1, range(STEPS)):
            rows = np.flatnonzero(batch.ids_B == 17)
            assert np.array_equal(np.flatnonzero(batch.weights_B.numpy() == 0), rows)
            assert not batch.images_BSSC[rows].any()
            bad += batch.bad
        assert len(bad) == REPEATS
        assert all("sample000017" in text for text in bad)


def flips(ids: np.ndarray, data: Data, epoch: int, copy: int = 0) -> np.ndarray:
    copies = np.full(len(ids), copy)
    return randomness(ids, data, seed=3, epoch=epoch, copies_N=copies).flip_N


def test_alternate_mirroring_changes_with_every_copy_and_epoch(index: Index) -> None:
    ids, data = np.arange(1000), data_of(index, flip="alternate")
    first = flips(ids, data, 0)
    assert 0.45 < first.mean() < 0.55
    for epoch in range(1, 6):
        assert np.array_equal(flips(ids, data, epoch), first ^ (epoch % 2 == 1))
    other = randomness(ids, data, seed=4, epoch=0).flip_N
    assert 0.4 < (other == first).mean() < 0.6
    repeated = data_of(index, flip="alternate", **(FIELDS | {"repeats": 2}))
    turns = [flips(ids, repeated, epoch, copy) for epoch in range(3) for copy in range(2)]
    assert all(np.array_equal(before, ~after) for before, after in zip(turns, turns[1:], strict=False))


@pytest.mark.parametrize("cache", ["none", "ram", "device"])
def test_an_image_is_mirrored_every_second_epoch(index: Index, cache: str) -> None:
    data = data_of(index, crop="none", flip="alternate", cache=cache)
    steps = sum(COUNTS) // 48
    found: list[dict[int, bool]] = []
    for epoch in range(3):
        mirrored = {}
        for [batch] in global_batches(index, data, 1, range(epoch * steps, (epoch + 1) * steps)):
            for image, sample_id in zip(batch.images_BSSC.numpy(), batch.ids_B.tolist(), strict=True):
                plain = picture(sample_id)
                mirrored[sample_id] = not np.array_equal(image, plain)
                assert np.array_equal(image, plain[:, ::-1] if mirrored[sample_id] else plain)
        found.append(mirrored)
    for earlier, later in zip(found, found[1:], strict=False):
        both = earlier.keys() & later.keys()
        assert len(both) > 150
        assert all(earlier[i] != later[i] for i in both)


def test_a_flip_is_true_false_or_alternate(digits_recipe: Recipe) -> None:
    assert digits_recipe.with_overrides(["data.flip=true"]).data.flip is True
    alternate = digits_recipe.with_overrides(["data.flip=alternate"])
    assert alternate.data.flip == "alternate"
    assert Recipe.from_json(alternate.to_json()) == alternate
    with pytest.raises(
        RecipeError, match="data.flip='sometimes': input should be False, True or 'alternate'"
    ):
        digits_recipe.with_overrides(["data.flip=sometimes"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.repeats=3"], "repeats=3 does not divide the 16 samples .* from each of lanes=8"),
        (["data.spread_repeats=true"], "spread_repeats=True is not read with repeats=1"),
        (
            ["data.repeats=4", "data.spread_repeats=true"],
            r"micro_batch_size=64 cuts it into 2; use micro_batch_size from \[16, 32\]",
        ),
        (
            ["data.repeats=2", "data.spread_repeats=true", "data.lanes=1", "data.micro_batch_size=none"],
            "cuts it into as many as there are ranks; use lanes that repeats=2 divides",
        ),
        (["data.repeats=16", "data.mixup=0.2"], "repeats=16 with mixup=0.2 .* mix an image with itself"),
    ],
)
def test_impossible_repeats_are_refused(digits_recipe: Recipe, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        digits_recipe.with_overrides(overrides)

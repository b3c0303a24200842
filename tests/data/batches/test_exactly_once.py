"""97 uneven shards through the real loader: the same global batches for every world size and resume point."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from resnet_dist.config import Data
from resnet_dist.data.batches import resident
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import UserError
from resnet_dist.order.samples import PADDING
from tests.data.conftest import CLASSES, data_of, global_batches, loaders, picture, write_shards

COUNTS = tuple(np.random.default_rng(0).integers(0, 41, 97).tolist())  # some are empty
TOTAL = sum(COUNTS)
STEPS = TOTAL // 48
WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12, 24)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("uneven")
    names = write_shards(folder, COUNTS)
    return build_index(expand(names), folder, CacheLimits(folder / "cache", 1, 1.0))[0]


def digests_and_ids(
    index: Index, data: Data, world_size: int, steps: Iterable[int], *, training: bool = True
) -> tuple[list[str], list[np.ndarray]]:
    """Return two lists by step: a digest of pixels, labels, weights and ids of all ranks in order, and the ids."""
    digests, ids = [], []
    for parts in global_batches(index, data, world_size, steps, training=training):
        digest = hashlib.sha256()
        for name in ("images_BSSC", "labels_B", "weights_B"):
            digest.update(torch.cat([getattr(part, name) for part in parts]).numpy().tobytes())
        step_ids = np.concatenate([part.ids_B for part in parts])
        digest.update(step_ids.tobytes())
        digests.append(digest.hexdigest())
        ids.append(step_ids)
    return digests, ids


@pytest.fixture(scope="module")
def two_epochs(index: Index) -> tuple[list[str], list[np.ndarray]]:
    return digests_and_ids(index, data_of(index), 1, range(2 * STEPS))


def test_every_world_size_sees_the_same_batches_and_every_sample_once(
    index: Index, two_epochs: tuple[list[str], list[np.ndarray]]
) -> None:
    assert min(COUNTS) == 0
    data = data_of(index)
    expected, ids = two_epochs
    for epoch in range(2):
        seen = np.concatenate(ids[epoch * STEPS : (epoch + 1) * STEPS])
        assert len(np.unique(seen)) == len(seen) == STEPS * 48
        assert TOTAL - len(seen) < 48  # the incomplete last batch, of other samples in each epoch
    for world_size in WORLD_SIZES[1:]:
        assert digests_and_ids(index, data, world_size, range(2 * STEPS))[0] == expected


@pytest.mark.parametrize("start", [1, STEPS // 3, STEPS - 1, STEPS, STEPS + 7])
def test_resuming_at_any_step_with_any_world_size_gives_the_same_batches(
    index: Index, two_epochs: tuple[list[str], list[np.ndarray]], start: int
) -> None:
    data = data_of(index)
    expected, _ = two_epochs
    for world_size in WORLD_SIZES:
        assert digests_and_ids(index, data, world_size, range(start, start + 12))[0] == expected[start:][:12]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_evaluation_sees_every_sample_once(index: Index, world_size: int) -> None:
    steps = -(-TOTAL // 48)
    _, ids = digests_and_ids(index, data_of(index), world_size, range(steps), training=False)
    flat = np.concatenate(ids)
    assert sorted(flat[flat != PADDING].tolist()) == list(range(TOTAL))


def test_pixels_and_labels_are_those_of_the_id(index: Index) -> None:
    data = data_of(index, crop="none", flip=False)
    with loaders(index, data, 1)[0] as loader:
        for step in range(STEPS):
            batch = loader.batch_at(step)
            for row, sample_id in enumerate(batch.ids_B.tolist()):
                assert np.array_equal(batch.images_BSSC[row].numpy(), picture(sample_id))
                assert batch.labels_B[row] == sample_id % CLASSES


def test_a_set_that_does_not_fit_is_refused(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resident.available_memory() > 2**20
    monkeypatch.setattr(resident, "available_memory", lambda: TOTAL * 8 * 8 * 3)
    with pytest.raises(UserError, match="data.cache='ram' needs .* for .* images of 8 x 8 pixels"):
        loaders(index, data_of(index, cache="ram"), 1)


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("ram", {}),
        ("ram", {"crop": "none", "flip": False}),
        ("ram", {"policy": "trivial-augment"}),  # Only "ram": cache="device" refuses policies.
        ("device", {"crop": "none"}),
        ("device", {"pad": 3, "erase": 0.5}),
    ],
)
def test_a_cached_set_gives_the_same_batches(index: Index, mode: str, changes: dict[str, object]) -> None:
    steps = [0, 1, 2, STEPS + 1]
    expected = digests_and_ids(index, data_of(index, **changes), 1, steps)[0]
    cached = data_of(index, cache=mode, **changes)
    assert digests_and_ids(index, cached, 1, steps)[0] == expected
    assert digests_and_ids(index, cached, 3, steps)[0] == expected
    plain_eval = digests_and_ids(index, data_of(index, **changes), 1, range(STEPS + 1), training=False)[0]
    assert digests_and_ids(index, cached, 2, range(STEPS + 1), training=False)[0] == plain_eval

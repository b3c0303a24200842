"""Batches on their way to a GPU: one ahead, from memory that nobody else writes meanwhile, in the order of two streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from resnet_dist.config import Data, Recipe
from resnet_dist.data.batches import loader as loaders
from resnet_dist.data.batches.device_copies import Begun, CudaCopies
from resnet_dist.data.batches.loader import Batch, Loader
from resnet_dist.data.batches.resident import Samples
from resnet_dist.data.shards.index import read_index
from resnet_dist.errors import UserError
from resnet_dist.order.samples import Order
from resnet_dist.world import World

CPU = torch.device("cpu")


class LateCopies:
    """Reads the memory of a batch as late as a GPU may: when the next copies have begun."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self._numbers: list[Samples] = []

    def begin(self, samples: Samples) -> Begun:
        self._numbers.append(samples)
        self.log.append(("begin", len(self._numbers) - 1))
        return samples, len(self._numbers) - 1

    def end(self, begun: Begun) -> Samples:
        samples, number = begun
        self.log.append(("end", number))
        return Samples(*(tensor.clone() for tensor in samples.tensors), samples.bad)


@pytest.fixture(params=["none", "ram"])
def data(request: pytest.FixtureRequest, digits_recipe: Recipe) -> Data:
    changes = {"crop": "pad-crop", "pad": 1, "flip": True, "cache": request.param}
    return digits_recipe.data.model_copy(update=changes)


def loader_of(data: Data, shards: str = "") -> Loader:
    index = read_index(data.train)
    order = Order(index.counts, data.global_batch_size, data.lanes, data.window, 0, training=True)
    return Loader(index, order, data, World(0, 0, 1, CPU), seed=0)


def batches(data: Data, steps: range, before: Callable[[Loader], None] = lambda loader: None) -> list[Batch]:
    with loader_of(data) as loader:
        found = []
        for step in steps:
            found.append(loader.batch_at(step))
            before(loader)
        return found


def wait_for_all(loader: Loader) -> None:
    for _, pending in loader._ahead:
        for task in pending.tasks:
            task.result()


def test_the_next_batch_is_on_its_way_before_it_is_asked_for(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, copies = batches(data, range(9)), LateCopies()
    monkeypatch.setattr(loaders, "copies_to", lambda device: copies)
    late = batches(data, range(9), wait_for_all)
    for ours, theirs in zip(late, plain, strict=True):
        assert torch.equal(ours.images_BSSC, theirs.images_BSSC)
        assert torch.equal(ours.labels_B, theirs.labels_B)
    # From the second batch on, the copy of the next one begins while this one is used.
    ends = [copies.log.index(("end", number)) for number in range(9)]
    begins = [copies.log.index(("begin", number)) for number in range(9)]
    assert all(begins[number] < ends[number] for number in range(9))
    assert sum(begins[number] < ends[number - 1] + 2 for number in range(2, 9)) == 7


def test_another_step_drops_what_is_on_its_way(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, copies = batches(data, range(5, 7)), LateCopies()
    monkeypatch.setattr(loaders, "copies_to", lambda device: copies)
    with loader_of(data) as loader:
        loader.batch_at(0)
        wait_for_all(loader)
        for step, theirs in zip((5, 6), plain, strict=True):
            assert torch.equal(loader.batch_at(step).images_BSSC, theirs.images_BSSC)


def test_an_error_of_the_next_batch_is_raised_at_its_turn(
    digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loader_of(digits_recipe.data.model_copy(update={"prefetch_batches": 1})) as loader:
        fill, first = loader._decoder.fill, set[int]()

        def fail_later(batch: Any, ids: Any, *rest: Any) -> None:
            first.add(id(ids))
            if len(first) > 1:
                raise UserError("the second batch")
            fill(batch, ids, *rest)

        monkeypatch.setattr(loader._decoder, "fill", fail_later)
        loader.batch_at(0)
        with pytest.raises(UserError, match="the second batch"):
            loader.batch_at(1)


class FakeStream:
    def __init__(self, *_: object) -> None:
        self.waited: list[object] = []

    def record_event(self) -> mock.Mock:
        event = mock.Mock()
        event.query.return_value = False
        return event

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_memory_is_held_until_its_copy_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    computing, recorded = FakeStream(), []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append(stream))
    copies = CudaCopies(CPU)
    first, second, third = (
        Samples.around(torch.full((2, 4, 4, 3), value, dtype=torch.uint8)) for value in (1, 2, 3)
    )
    begun = copies.begin(first)
    copied = copies.end(begun)
    assert torch.equal(copied.images_NSSC, first.images_NSSC)
    assert computing.waited == [begun[1]]  # The step comes after the copy,
    assert recorded == [computing] * 3  # and its memory is not given away before the step.
    copies.begin(second)
    assert [samples for _, samples in copies._sources] == [first, second]
    begun[1].query.return_value = True
    copies.begin(third)
    assert [samples for _, samples in copies._sources] == [second, third]

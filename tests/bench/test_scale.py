"""The plan of a run on many nodes: what nodes fetch is what their samples need, and the first limit is named."""

from __future__ import annotations

import numpy as np
import pytest

from resnet_dist.bench.scale import DataSet, Load, Nodes, first_to_break, plan_scale, quantity
from resnet_dist.bench.shard_traffic import shards_of_epoch, simulate, walk
from resnet_dist.config import Recipe, load_recipe
from resnet_dist.errors import RecipeError
from resnet_dist.order.samples import Order
from tests.paths import JOBS

IMAGENET, BILLION = DataSet(1_281_167, 110_000, 2**28), DataSet(1_000_000_000, 110_000, 2**28)
LINK = 25e9 / 8


def recipe_for(world_size: int) -> Recipe:
    """Return the recipe of ImageNet with 32 images a rank, one lane at least."""
    batch, lanes = 32 * world_size, max(64, world_size)
    return load_recipe(JOBS / "imagenet_rn50.py", [f"data.global_batch_size={batch}", f"data.lanes={lanes}"])


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 2), (4, 1), (4, 2), (8, 1)])
def test_nodes_fetch_the_shards_of_their_samples(nodes: int, ranks: int) -> None:
    counts = (40, 55, 38) * 16
    order = Order(counts, 32, 8, 20, seed=3, training=True)
    ends, per_node = np.cumsum(counts), []
    for node in range(nodes):
        lanes = [order.lanes_of(node * ranks + rank, nodes * ranks) for rank in range(ranks)]
        ids = [order.ids_at(step, own) for own in lanes for step in range(order.steps_per_epoch)]
        needed = set(np.searchsorted(ends, np.concatenate(ids), side="right").tolist())
        fetched = shards_of_epoch(order, lanes)
        assert needed <= fetched
        # A shard of which the tail is dropped may be fetched for nothing, at either end of what a node reads.
        assert len(fetched - needed) <= 2
        per_node.append(len(fetched))
        assert walk(order, lanes, len(counts)) == (len(fetched), walk(order, lanes, len(counts))[1])
    whole = simulate(order, nodes, ranks, cache_shards=len(counts))
    assert whole.num_fetched == sum(per_node)
    # A cache that holds less than a node needs at a time fetches shards again.
    assert simulate(order, nodes, ranks, cache_shards=1).num_fetched > whole.num_fetched
    assert 1 <= whole.first_batch <= 32
    assert whole.kept < len(counts) // nodes + 3 * 8


@pytest.mark.parametrize(
    "data", [IMAGENET, pytest.param(BILLION, marks=pytest.mark.long)], ids=["imagenet", "a-billion"]
)
@pytest.mark.parametrize("count", [8, 512])
def test_a_plan_names_what_breaks_first(data: DataSet, count: int) -> None:
    recipe = recipe_for(count * 8)
    loads = {load.name: load for load in plan_scale(recipe, data, Nodes(count, 8, 2500.0, LINK))}
    downloads = loads["downloads of each shard, first epoch"].value
    num_shards = loads["shards"].value
    # A shard is fetched again only where a lane ends inside it: by another node, or at the other end of the epoch.
    assert 1 <= downloads <= 1 + 2 * recipe.data.lanes / num_shards
    assert loads["reads of run.json and lease.json"].value == count * 8 * 0.2
    first = first_to_break(list(loads.values()))
    assert all(load.share <= first.share for load in loads.values())
    assert first.setting
    if (data, count) == (IMAGENET, 512):
        assert first.name == "global batch"
        assert first.share > 10


def test_a_recipe_that_cannot_use_the_ranks_is_refused() -> None:
    with pytest.raises(RecipeError, match="--workers 4096: the recipe has 8 micro-batches a step"):
        plan_scale(load_recipe(JOBS / "imagenet_rn50.py", []), IMAGENET, Nodes(512, 8, 2500.0, LINK))


def test_quantities() -> None:
    assert quantity(2_684_354_560, "B") == "2.68 GB"
    assert quantity(1.5e16, "B/s") == "15,000 TB/s"
    assert quantity(819.2, "/s") == "819/s"
    assert quantity(0.0123, "s") == "0.0123 s"
    assert quantity(1.04, "×") == "1.04×"
    assert quantity(4096, "") == "4,096"
    assert Load("x", 3.0, "s").share == 0.0

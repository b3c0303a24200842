"""`resnet-dist bench scale`: the load of a run on its nodes, network and object store, before anybody pays for them.

The order, the shards that nodes fetch and the times of this machine are computed by the package's own code; speeds of
ranks and links are given. Each part has the limit it meets first, and the setting that moves it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from resnet_dist.bench.shard_traffic import Traffic, simulate
from resnet_dist.config import Recipe
from resnet_dist.config.data.combined import check_world_size
from resnet_dist.data.shards.index import Index, Shard, shards_of
from resnet_dist.launch.fence import LOOK_SECONDS
from resnet_dist.model import build_model
from resnet_dist.order.samples import Order
from resnet_dist.runs.storage.logs import SHIP_SECONDS
from resnet_dist.train.plan import order_of
from resnet_dist.train.start.shapes import shapes_only
from resnet_dist.train.watch.watchdog import slowest_poll_seconds

STORE_REQUESTS_PER_SECOND = 5500  # GETs that S3 answers for one prefix, as its documentation has it
GIGABIT_BYTES = 1e9 / 8
FENCE_OBJECTS = 2  # that each rank reads every LOOK_SECONDS
MIN_STEPS_PER_EPOCH = 100  # With fewer, a batch is so large that recipes for smaller ones no longer hold.
MAX_START_SECONDS = 60.0  # for data, before the first step
SHA256_DIGITS = 64
POLLS_TO_NAME_A_RANK = 10
STATES_PER_WEIGHT = {"sgd": 1, "lars": 1, "muon": 1, "adamw": 2, "lamb": 2}
# What moves a part of the load, by its name.
SETTINGS = {
    "global batch": "data.global_batch_size, fewer nodes",
    "cache that a node needs at a time": "data.shard_cache_bytes, fewer data.lanes, a smaller data.window",
    "shards into each node": "smaller images; data.shard_cache_bytes, for later epochs",
    "requests for shards": "larger shards",
    "time of a node for these": "a smaller data.window, fewer data.lanes, smaller shards",
    "time of a rank to read it, on this machine": "larger shards",
    "indexes out of the store at a start": "larger shards",
    "reads of run.json and lease.json": "fewer ranks",
    "seconds between two positions of a rank": "train.stall_timeout_seconds",
}


@dataclass(frozen=True)
class DataSet:
    """A set of shards of equal size."""

    num_samples: int
    sample_bytes: int
    shard_bytes: int

    def index(self) -> Index:
        """Return the index that the set would have."""
        count = max(1, round(self.num_samples * self.sample_bytes / self.shard_bytes))
        whole, rest = divmod(self.num_samples, count)
        shards = (
            Shard(f"train-{number:06d}.tar", self.shard_bytes, "", whole + (number < rest))
            for number in range(count)
        )
        return Index("s3://bucket/train/index.json", tuple(shards), ("a", "b"))


@dataclass(frozen=True)
class Nodes:
    """Equal nodes, and their speed."""

    count: int
    ranks: int  # on each node
    images_per_second: float  # of each rank
    link_bytes_per_second: float  # of each node

    @property
    def world_size(self) -> int:
        return self.count * self.ranks


@dataclass(frozen=True)
class Load:
    """One part of the load. limit: of the same unit; None: none is known."""

    name: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def setting(self) -> str:
        """The settings that move it; empty where none does."""
        return SETTINGS.get(self.name, "")

    @property
    def share(self) -> float:
        """The part of the limit that is used up; more than 1 is too much."""
        return 0.0 if self.limit is None else self.value / self.limit

    @property
    def text(self) -> str:
        return quantity(self.value, self.unit)

    @property
    def limit_text(self) -> str:
        return "" if self.limit is None else quantity(self.limit, self.unit)

    @property
    def advice(self) -> str:
        return f"moved by {self.setting}" if self.setting else "moved by no setting"


def quantity(value: float, unit: str) -> str:
    """Return a value with its unit, in three digits: `1.23 TB`, `0.02 s`, `4,096`."""
    if unit.startswith("B"):
        power = next((power for power in range(4) if value < 1000 ** (power + 1)), 4)
        value, unit = value / 1000**power, " kMGT"[power].strip() + unit
    digits = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".rstrip() if unit[:1].isalpha() else f"{digits}{unit}"


def plan_scale(recipe: Recipe, data: DataSet, nodes: Nodes) -> list[Load]:
    """Return the load of a run. Raises RecipeError where the recipe cannot use that many ranks or samples."""
    check_world_size(recipe.data, nodes.world_size)
    index = data.index()
    begin = time.perf_counter()
    order = order_of(recipe, index)
    order.ids_at(0, order.lanes_of(0, nodes.world_size))
    order_seconds = time.perf_counter() - begin
    cache_shards = recipe.data.shard_cache_bytes // data.shard_bytes
    traffic = simulate(order, nodes.count, nodes.ranks, cache_shards)
    step_seconds = recipe.data.global_batch_size / (nodes.world_size * nodes.images_per_second)
    return [
        *_steps(order, step_seconds),
        *_fetching(data, len(index.shards), nodes, recipe, traffic, order.steps_per_epoch * step_seconds),
        *_starting(index, nodes, order_seconds),
        *_watching(recipe, nodes),
    ]


def first_to_break(loads: Sequence[Load]) -> Load:
    """Return the part that is nearest to its limit, or furthest beyond it."""
    return max(loads, key=lambda load: load.share)


def _steps(order: Order, step_seconds: float) -> list[Load]:
    return [
        Load("global batch", order.global_batch_size, "images", order.num_samples / MIN_STEPS_PER_EPOCH),
        Load("steps of an epoch", order.steps_per_epoch, ""),
        Load("seconds of a step", step_seconds, "s"),
    ]


def _fetching(
    data: DataSet, num_shards: int, nodes: Nodes, recipe: Recipe, traffic: Traffic, epoch_seconds: float
) -> list[Load]:
    link, max_cache_bytes = nodes.link_bytes_per_second, recipe.data.shard_cache_bytes
    rate = traffic.num_fetched * data.shard_bytes / epoch_seconds
    first = traffic.first_batch * data.shard_bytes
    kept_share = min(1.0, max_cache_bytes / (data.num_samples * data.sample_bytes))
    return [
        Load("shards", num_shards, ""),
        Load("downloads of each shard, first epoch", traffic.num_fetched / num_shards, "×"),
        Load("share of the set that a node's cache keeps", kept_share, ""),
        Load("cache that a node needs at a time", traffic.kept * data.shard_bytes, "B", max_cache_bytes),
        Load("shards into each node", rate / nodes.count, "B/s", link),
        Load("shards out of the store, all nodes", rate, "B/s"),
        Load("requests for shards", traffic.num_fetched / epoch_seconds, "/s", STORE_REQUESTS_PER_SECOND),
        Load("fetched by a node before its first batch", first, "B"),
        Load("time of a node for these", first / link, "s", MAX_START_SECONDS),
    ]


def _starting(index: Index, nodes: Nodes, order_seconds: float) -> list[Load]:
    text, parse_seconds = _index_text(index)
    return [
        Load("order, to the first batch of a rank", order_seconds, "s", MAX_START_SECONDS),
        Load("index, read once by each node", len(text), "B"),
        Load("time of a rank to read it, on this machine", parse_seconds, "s", MAX_START_SECONDS),
        Load("indexes out of the store at a start", len(text) * nodes.count, "B"),
    ]


def _index_text(index: Index) -> tuple[str, float]:
    """Return the index as `resnet-dist index` writes it, and the seconds in which a rank reads it."""
    entries = [
        {
            "url": shard.url,
            "nsamples": shard.num_samples,
            "filesize": shard.num_bytes,
            "sha256": "0" * SHA256_DIGITS,
        }
        for shard in index.shards
    ]
    text = json.dumps({"shardlist": entries, "classes": list(index.classes)}, indent=1)
    begin = time.perf_counter()
    Index(index.location, shards_of(json.loads(text), "s3://bucket/train"), index.classes).digest()
    return text, time.perf_counter() - begin


def _watching(recipe: Recipe, nodes: Nodes) -> list[Load]:
    looks = nodes.world_size * FENCE_OBJECTS / LOOK_SECONDS
    poll = slowest_poll_seconds(nodes.world_size)
    slowest_poll = recipe.train.stall_timeout_seconds / POLLS_TO_NAME_A_RANK
    checkpoint = checkpoint_bytes(recipe)
    seconds = checkpoint / nodes.link_bytes_per_second
    return [
        Load("reads of run.json and lease.json", looks, "/s", STORE_REQUESTS_PER_SECOND),
        Load("writes of metrics, whatever the ranks", 1 / SHIP_SECONDS, "/s"),
        Load("positions that reach rank 0", nodes.world_size / poll, "/s"),
        Load("seconds between two positions of a rank", poll, "s", slowest_poll),
        Load("a checkpoint, written by rank 0", checkpoint, "B"),
        Load("read by all nodes at a restart", checkpoint * nodes.count, "B"),
        Load("time of a node for that", seconds, "s", MAX_START_SECONDS),
    ]


def checkpoint_bytes(recipe: Recipe, num_classes: int = 1000) -> int:
    """Return the bytes of the tensors in a checkpoint: weights, their average, and the optimizer's states."""
    with shapes_only():
        model = build_model(
            **recipe.model.options(), in_channels=recipe.data.channels, num_classes=num_classes
        )
    state = _num_bytes(model.state_dict().values())
    trained = _num_bytes(model.parameters())
    average = state if recipe.train.ema_decay is not None else 0
    return state + average + STATES_PER_WEIGHT[recipe.optim.optimizer] * trained


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

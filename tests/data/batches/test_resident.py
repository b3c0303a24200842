"""What a kept set may take: the machine's memory, the container's, a share of it, and in which parts it comes."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.data.batches import loader
from resnet_dist.data.batches import resident as cache
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.shard_cache import CacheLimits
from resnet_dist.errors import UserError
from resnet_dist.system.memory import available_memory
from tests.data.conftest import data_of, loaders, write_shards

GIB = 2**30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group(folder: Path, limit: str, used: int, *, version: int, file_cache: int = 0) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    if version == 2:
        names = ("memory.max", "memory.current", "inactive_file")
    write(folder / names[0], f"{limit}\n")
    write(folder / names[1], f"{used}\n")
    write(folder / "memory.stat", f"anon {used}\n{names[2]} {file_cache}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(
        tmp_path / "proc/meminfo", f"MemTotal: {99 * GIB // 1024} kB\nMemAvailable:  {64 * GIB // 1024} kB\n"
    )
    return tmp_path


def test_a_machine_without_limits(root: Path) -> None:
    assert available_memory(root) == 64 * GIB
    write(root / "proc/self/cgroup", "0::/user.slice\n")
    group(root / "sys/fs/cgroup/user.slice", "max", GIB, version=2)
    assert available_memory(root) == 64 * GIB


def test_a_container_of_version_2(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/\n")
    group(root / "sys/fs/cgroup", str(8 * GIB), 5 * GIB, version=2, file_cache=2 * GIB)
    assert available_memory(root) == 5 * GIB


def test_a_limit_above_binds_too(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/pod/container\n")
    group(root / "sys/fs/cgroup/pod/container", str(8 * GIB), GIB, version=2)
    group(root / "sys/fs/cgroup/pod", str(4 * GIB), 3 * GIB, version=2)
    assert available_memory(root) == GIB


def test_version_1_and_a_name_that_only_the_host_knows(root: Path) -> None:
    write(root / "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n")
    group(root / "sys/fs/cgroup/memory", str(6 * GIB), 2 * GIB, version=1, file_cache=GIB)
    assert available_memory(root) == 5 * GIB
    group(root / "sys/fs/cgroup/memory/docker/abc", str(3 * GIB), 4 * GIB, version=1)
    assert available_memory(root) == 0  # over its limit, until the kernel acts


def test_this_machine() -> None:
    assert 2**20 < available_memory() < 2**60


COUNTS = (40, 23, 60)
TOTAL_BYTES = sum(COUNTS) * 8 * 8 * 3


@pytest.fixture
def index(tmp_path: Path) -> Index:
    folder = tmp_path / "set"
    return build_index(expand(write_shards(folder, COUNTS)), folder, CacheLimits(folder / "cache", 1, 1.0))[0]


def test_each_rank_of_a_node_keeps_a_set(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "available_memory", lambda: 2 * TOTAL_BYTES)
    loaders(index, data_of(index, cache="ram"), 1)[0].close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="data.cache='ram' needs .* in each of the 2 ranks of this node for 123 images"
    ):
        loaders(index, data_of(index, cache="ram"), 1)


def test_a_set_passes_through_the_host_in_parts(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _batches(index, "none")
    original, taken = cache.Buffers.take, []

    def take(self: cache.Buffers, shape: tuple[int, ...]) -> object:
        taken.append(shape[0])
        return original(self, shape)

    monkeypatch.setattr(cache.Buffers, "take", take)
    monkeypatch.setattr(loader, "CHUNK_BYTES", 10 * 8 * 8 * 3)
    assert _batches(index, "device") == expected
    assert taken == [10]  # images of 123, and the same memory for each part


def _batches(index: Index, cache: str) -> list[bytes]:
    with loaders(index, data_of(index, cache=cache), 1)[0] as loading:
        return [loading.batch_at(step).images_BSSC.numpy().tobytes() for step in range(3)]

"""The memory of a cached data set: limits of machine and container, the share of a rank, decoding in chunks."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.data.batches import resident
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import Index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.cache.folder import CacheLimits
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


def test_the_limit_of_a_parent_group_counts_too(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/pod/container\n")
    group(root / "sys/fs/cgroup/pod/container", str(8 * GIB), GIB, version=2)
    group(root / "sys/fs/cgroup/pod", str(4 * GIB), 3 * GIB, version=2)
    assert available_memory(root) == GIB


def test_version_1_and_a_group_whose_path_exists_only_on_the_host(root: Path) -> None:
    write(root / "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n")
    group(root / "sys/fs/cgroup/memory", str(6 * GIB), 2 * GIB, version=1, file_cache=GIB)
    assert available_memory(root) == 5 * GIB
    group(root / "sys/fs/cgroup/memory/docker/abc", str(3 * GIB), 4 * GIB, version=1)
    assert available_memory(root) == 0  # The group is over its limit, until the kernel acts.


def test_this_machine_has_a_plausible_amount() -> None:
    assert 2**20 < available_memory() < 2**60


COUNTS = (40, 23, 60)
TOTAL_BYTES = sum(COUNTS) * 8 * 8 * 3


@pytest.fixture
def index(tmp_path: Path) -> Index:
    folder = tmp_path / "set"
    return build_index(expand(write_shards(folder, COUNTS)), folder, CacheLimits(folder / "cache", 1, 1.0))[0]


def test_each_rank_of_a_node_keeps_its_own_set(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "available_memory", lambda: 2 * TOTAL_BYTES)
    loaders(index, data_of(index, cache="ram"), 1)[0].close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="data.cache='ram' needs .* in each of the 2 ranks of this node for 123 images"
    ):
        loaders(index, data_of(index, cache="ram"), 1)


def test_a_set_is_decoded_in_chunks_that_share_memory(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _batches(index, "none")
    original, taken = resident.Buffers.take, []

    def take(self: resident.Buffers, shape: tuple[int, ...]) -> object:
        taken.append(shape[0])
        return original(self, shape)

    monkeypatch.setattr(resident.Buffers, "take", take)
    monkeypatch.setattr(resident, "CHUNK_BYTES", 10 * 8 * 8 * 3)
    assert _batches(index, "device") == expected
    assert taken == [10]  # One buffer of 10 images serves all 123.


def _batches(index: Index, cache: str) -> list[bytes]:
    with loaders(index, data_of(index, cache=cache), 1)[0] as loading:
        return [loading.batch_at(step).images_BSSC.numpy().tobytes() for step in range(3)]

"""The use of a machine: sampled beside the training, which it never ends, and summed up in a few keys."""

from __future__ import annotations

import builtins
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resnet_dist.system.node.gpus import GpuUse, gpu_use
from resnet_dist.system.node.host import HostUse, host_use
from resnet_dist.system.node.usage import NO_SUMMARY, QUANTITIES, NodeUsage
from resnet_dist.system.node.versions import driver_version, hosts_text, package_versions
from resnet_dist.train.state.usage_metrics import usage_metrics


class NvmlError(Exception):
    pass


def fake_psutil(counters: list[int], *, has_disk: bool = True) -> Any:
    """Return a psutil whose counters are those of the list's last number."""

    def bytes_of(factor: int) -> Any:
        names = ("read_bytes", "write_bytes", "bytes_recv", "bytes_sent")
        return SimpleNamespace(**{name: counters[-1] * factor for name in names})

    return SimpleNamespace(
        cpu_percent=lambda: 25.0,
        virtual_memory=lambda: SimpleNamespace(percent=50.0),
        disk_usage=lambda path: SimpleNamespace(percent=75.0),
        disk_io_counters=lambda: bytes_of(1) if has_disk else None,
        net_io_counters=lambda pernic: {"lo": bytes_of(1000), "eth0": bytes_of(2), "eth1": bytes_of(3)},
    )


def fake_nvml() -> Any:
    def power(handle: int) -> float:
        if handle == 1:
            raise NvmlError("Not Supported")
        return 300_000

    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=1 + handle, total=4),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=10 * handle),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetTemperature=lambda handle, sensor: 40 + handle,
    )


def table(*nodes: dict[str, list[float]]) -> torch.Tensor:
    """Return the summaries of machines that have measured this, and of a second rank on each."""
    rows = []
    for values in nodes:
        usage = NodeUsage([])
        usage._add(values)
        rows += [usage.summary(), NO_SUMMARY]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("has_disk", [True, False])
def test_rates_are_those_since_the_last_reading(has_disk: bool) -> None:
    counters, times = [0], iter([10.0, 12.0, 14.0])
    use = HostUse(fake_psutil(counters, has_disk=has_disk), lambda: next(times))
    counters.append(4_000_000)
    found = use.read()
    assert found["network_received_mb_per_second"] == [10.0]  # 2 and 3 times 4 MB in 2 s, without `lo`
    assert found.get("disk_read_mb_per_second") == ([2.0] if has_disk else None)
    assert (found["cpu_percent"], found["memory_percent"], found["disk_percent"]) == ([25.0], [50.0], [75.0])
    counters.append(0)  # A counter that has begun anew is no negative rate.
    assert use.read()["network_sent_mb_per_second"] == [0.0]
    assert set(found) <= set(QUANTITIES)


def test_a_gpu_that_does_not_measure_something_is_left_out_of_it_alone() -> None:
    found = GpuUse(fake_nvml(), [0, 1, 2]).read()
    assert found == {
        "gpu_percent": [0.0, 10.0, 20.0],
        "gpu_memory_percent": [25.0, 50.0, 75.0],
        "gpu_power_watts": [300.0, 300.0],
        "gpu_celsius": [40.0, 41.0, 42.0],
    }
    assert set(found) <= set(QUANTITIES)


@pytest.mark.parametrize("name", ["psutil", "pynvml"])
def test_without_its_package_nothing_is_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert (host_use() if name == "psutil" else gpu_use(["GPU-1"])) is None


def test_a_source_that_fails_ends_nothing_and_is_asked_again() -> None:
    answers: list[Any] = [{"cpu_percent": [10.0]}, OSError("the driver hangs"), {"cpu_percent": [30.0]}]
    asked = threading.Event()

    class Source:
        def read(self) -> dict[str, list[float]]:
            if not answers:
                asked.set()
                return {}
            answer = answers.pop(0)
            if isinstance(answer, builtins.Exception):
                raise answer
            return answer  # type: ignore[no-any-return]

    usage = NodeUsage([Source()], sample_seconds=0.001)
    assert asked.wait(30)
    usage.close()
    assert usage.is_new
    assert usage.summary()[:4] == [1.0, 20.0, 20.0, 20.0]
    usage.restart()
    assert not usage.is_new
    assert usage.summary()[:4] == [1.0, 20.0, 20.0, 20.0]  # The last known ones.


def test_one_machine_has_one_key_for_each_quantity() -> None:
    assert usage_metrics(table({"cpu_percent": [10.0]}), per_node=False) == {"system/cpu_percent": 10.0}
    assert usage_metrics(table({}), per_node=False) == {}
    two = usage_metrics(table({"gpu_percent": [10.0, 30.0]}), per_node=False)
    assert two == {"system/gpu_percent": 20.0, "system/gpu_percent_min": 10.0, "system/gpu_percent_max": 30.0}


def test_a_thousand_machines_have_as_many_keys_as_two() -> None:
    rest = {name: [1.0] for name in QUANTITIES}
    few, many = (
        usage_metrics(table({**rest, "cpu_percent": [91.0]}, *[rest] * (count - 1)), per_node=False)
        for count in (2, 1000)
    )
    assert few.keys() == many.keys()
    assert len(many) == 3 * len(QUANTITIES) < 40
    assert (many["system/cpu_percent_min"], many["system/cpu_percent_max"]) == (1.0, 91.0)
    assert many["system/cpu_percent"] == pytest.approx(1.09)
    per_node = usage_metrics(table({"cpu_percent": [1.0]}, {"cpu_percent": [3.0]}), per_node=True)
    assert {name: value for name, value in per_node.items() if "node_" in name} == {
        "system/node_0/cpu_percent": 1.0,
        "system/node_1/cpu_percent": 3.0,
    }


def test_the_versions_of_a_machine(tmp_path: Any) -> None:
    assert package_versions()["torch"] == torch.__version__.partition("+")[0]
    file = tmp_path / "version"
    assert driver_version(file) is None
    for line in ("x86_64 Kernel Module  570.86.15  Thu", "Open Kernel Module for x86_64  570.86.15  Release"):
        file.write_text(f"NVRM version: NVIDIA UNIX {line}\n")
        assert driver_version(file) == "570.86.15"
    assert hosts_text(["a", "a", "b"]) == "a (2 ranks), b"
    assert hosts_text([f"h{number}" for number in range(150)]).endswith("h99 and 50 more")

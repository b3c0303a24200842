"""The nodes of a cluster must have this package, and one version of it and of torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle

from resnet_dist import __version__
from resnet_dist.launch.ray_cluster import packages
from resnet_dist.launch.ray_cluster.packages import describe_problem, packages_here


def node(**changes: str) -> dict[str, str]:
    return {"python": "/bin/python", "reason": "", "resnet_dist": "1.0", "torch": "2.9.0", **changes}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, ""),
        ({"a": node(), "b": node()}, ""),
        (
            {"a": node(resnet_dist="", reason="No module named 'resnet_dist'")},
            "node a cannot import resnet_dist (No module",
        ),
        (
            {"a": node(), "b": node(resnet_dist=""), "c": node(resnet_dist="")},
            "node b and 1 more cannot import",
        ),
        ({"a": node(), "b": node(resnet_dist="0.9")}, "node b has resnet_dist 0.9, this process has 1.0"),
        ({"a": node(), "b": node(torch="")}, "node b does not have torch"),
        ({"a": node(), "b": node(torch="2.8.0")}, "different versions of torch (2.8.0 on b, 2.9.0 on a)"),
    ],
)
def test_problems_name_the_node(found: dict[str, Any], expected: str) -> None:
    problem = describe_problem(found, wanted="1.0")
    assert expected in problem
    assert bool(problem) == bool(expected)


WITHOUT_PACKAGE = """
import pickle, sys
sys.modules["resnet_dist"] = None  # importing it now raises ImportError
print(pickle.load(open(sys.argv[1], "rb"))()["reason"])
"""


def test_the_check_runs_where_the_package_is_missing(tmp_path: Path) -> None:
    data = ray.cloudpickle.dumps(packages._by_value(packages_here))
    found = ray.cloudpickle.loads(data)()
    assert found["resnet_dist"] == __version__
    assert describe_problem({"here": found}) == ""
    (tmp_path / "check").write_bytes(data)
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path / "check")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert "resnet_dist" in done.stdout, done.stderr

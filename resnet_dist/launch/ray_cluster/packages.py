"""Compare this package and torch on the nodes that will hold ranks, before Ray Train starts them.

Ray Train reports a node without the package as a traceback of its controller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from resnet_dist import __version__
from resnet_dist.errors import UserError

# A node starts a process for it. Ray Train has limits of its own for a node that is slower, or lost.
CHECK_SECONDS = 30.0


def check_packages(report: Callable[[str], None]) -> None:
    """Raise UserError where a node of the connected cluster lacks this package, or has another version of it.

    The nodes must have one version of torch too. A node that does not answer in time is reported.
    """
    found, silent = _ask_nodes()
    for name in silent:
        report(f"the node {name} has not answered in {CHECK_SECONDS:g} s: its packages are not checked")
    if problem := describe_problem(found):
        raise UserError(problem)


def _ask_nodes() -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the packages by node, and the nodes that did not answer."""
    # The nodes may lack this package: send the function as a value, not as a name in it.
    task = ray.remote(num_cpus=0, max_retries=0)(_by_value(packages_here))
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1:
            name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=place).remote()] = name
    found, silent = {}, []
    deadline = time.monotonic() + CHECK_SECONDS
    for reference, name in asked.items():
        try:
            found[name] = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
        except RayError:  # A timeout, or a node that has just been lost.
            silent.append(name)
    return found, silent


def _by_value(function: Callable[[], dict[str, str]]) -> Callable[[], dict[str, str]]:
    # Functions of __main__ are sent as values.
    function.__module__ = "__main__"
    return function


def packages_here() -> dict[str, str]:
    """Return the versions on the node that runs this; with an empty one for this package where it cannot be imported."""
    import sys
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.executable, "reason": "", "resnet_dist": ""}
    try:
        import resnet_dist

        found["resnet_dist"] = resnet_dist.__version__
    except Exception as error:  # Mostly ImportError: it, or a library that it imports, is missing or broken.
        found["reason"] = " ".join(str(error).split()) or type(error).__name__
    try:
        found["torch"] = version("torch").partition("+")[0]  # The build for a kind of GPU is left out.
    except PackageNotFoundError:
        found["torch"] = ""
    return found


def describe_problem(found: Mapping[str, Mapping[str, Any]], wanted: str = __version__) -> str:
    """Return what is wrong with the packages of nodes, by their names; empty where all agree."""
    missing = {name: versions for name, versions in found.items() if not versions["resnet_dist"]}
    if missing:
        versions = next(iter(missing.values()))
        return (
            f"the cluster's {_node(missing)} cannot import resnet_dist ({versions['reason']}, with {versions['python']}); "
            f"install version {wanted} there, or start Ray from an environment or image that has it"
        )
    others = {name: versions for name, versions in found.items() if versions["resnet_dist"] != wanted}
    if others:
        version = next(iter(others.values()))["resnet_dist"]
        return f"the cluster's {_node(others)} has resnet_dist {version}, this process has {wanted}; install one version on both"
    torches = {versions["torch"]: name for name, versions in found.items()}
    if "" in torches:
        return f"the cluster's node {torches['']} does not have torch, which every node with ranks needs"
    if len(torches) > 1:
        differ = ", ".join(f"{version} on {name}" for version, name in sorted(torches.items()))
        return f"the nodes of the cluster have different versions of torch ({differ}); ranks need one: install it on all"
    return ""


def _node(found: Mapping[str, Any]) -> str:
    more = len(found) - 1
    return f"node {next(iter(found))}{f' and {more} more' if more else ''}"

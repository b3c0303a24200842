"""The environment variables of Ray that we set or read. Knows no Ray, which reads them when it is imported."""

from __future__ import annotations

import os

ADDRESS_VARIABLE = "RAY_ADDRESS"  # the cluster to join, where no --address is used
# Under `uv run` Ray starts every worker through uv again, in a copy of the working folder.
UV_HOOK_VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    UV_HOOK_VARIABLE: "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    # It would start one more process with the ranks; placement/changes.py watches the same nodes.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray Train looks for ranks that have died so often.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Where a node has just gone, Ray waits so long for it before the ranks can be placed elsewhere.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
}
# The only values with which this package runs.
REQUIRED = {"RAY_TRAIN_V2_ENABLED": "1"}
_ignored: list[str] = []


def set_defaults() -> None:
    """Set the variables that the user has not set, and those that must have our value.

    Call it before Ray is imported.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name, value in REQUIRED.items():
        typed = os.environ.get(name, value)
        if typed.lower() not in (value, "true"):
            _ignored.append(f"{name}={typed}")
        os.environ[name] = value


def ignored_variables() -> tuple[str, ...]:
    """Return the variables of the user, with their values, that set_defaults() has overruled."""
    return tuple(_ignored)

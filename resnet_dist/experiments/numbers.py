"""Metrics, times and states in words."""

from __future__ import annotations

import math
from datetime import datetime

MINUTE, HOUR = 60.0, 3600.0


def metric_text(name: str, value: float | None) -> str:
    """Return a metric as a person reads it: accuracies in percent, speeds without decimals."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    leaf = name.rpartition("/")[2]
    if leaf.startswith("top"):
        return f"{value:.2%}"
    if leaf == "loss":
        return f"{value:.4f}"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    if seconds < HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds // HOUR:.0f} h {seconds % HOUR // MINUTE:02.0f} min"


def time_text(time_ms: int | None) -> str:
    return "-" if time_ms is None else f"{datetime.fromtimestamp(time_ms / 1000):%Y-%m-%d %H:%M}"

"""Lengths of training, such as "10 epochs" or "5 percent", and their conversion to steps."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator

UNITS = ("steps", "epochs", "samples", "percent")


def _check_length(text: str) -> str:
    value, _, unit = text.replace("%", " percent").strip().partition(" ")
    unit = unit.strip()
    unit = unit if unit in UNITS else unit + "s"
    try:
        number = float(value.replace("_", ""))
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0 and unit in UNITS):
        raise ValueError(
            "must be a number and a unit, such as '10 epochs', '64000 steps', '1e6 samples' or '50 percent'"
        )
    return f"{number:.15g} {unit}"


# A number and a unit, validated and in one spelling; `steps_of` converts it once the data set is known.
Length = Annotated[str, AfterValidator(_check_length)]


def steps_of(length: Length, *, steps_per_epoch: int, global_batch_size: int, total_steps: int = 0) -> int:
    """Return the steps in `length`, rounded to the nearest integer, and at least 1 unless the length is zero.

    Percent are relative to `total_steps`, the length of the run.
    """
    value, unit = length.split()
    per_unit = {
        "steps": 1.0,
        "epochs": float(steps_per_epoch),
        "samples": 1 / global_batch_size,
        "percent": total_steps / 100,
    }
    steps = float(value) * per_unit[unit]
    return max(1, round(steps)) if steps > 0 else 0

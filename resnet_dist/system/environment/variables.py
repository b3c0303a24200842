"""Variables that libraries read when they are imported, where a wrong value ends the process or fills its log."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from resnet_dist.errors import UserError

_COUNT = r"[1-9][0-9]*"
# A wrong value is removed and reported: libraries would print lines about it and use their default.
REMOVED = {
    "OMP_NUM_THREADS": (rf"{_COUNT}(\s*,\s*{_COUNT})*", "no positive number"),
    "OMP_THREAD_LIMIT": (_COUNT, "no positive number"),
    "MKL_NUM_THREADS": (_COUNT, "no positive number"),
    "OPENBLAS_NUM_THREADS": (_COUNT, "no positive number"),
    "NUMEXPR_NUM_THREADS": (_COUNT, "no positive number"),
    "TORCH_CPP_LOG_LEVEL": ("INFO|WARNING|ERROR|FATAL|[0-3]", "none of INFO, WARNING, ERROR, FATAL"),
}
# A wrong value is refused: torch cannot be imported with it.
_SETTING = r"\s*[a-z_0-9]+\s*:.+"
REFUSED = {
    "TORCH_DISTRIBUTED_DEBUG": ("(?i:OFF|INFO|DETAIL)", "OFF, INFO or DETAIL"),
    "PYTORCH_ALLOC_CONF": (_SETTING, "settings such as expandable_segments:True"),
    "PYTORCH_CUDA_ALLOC_CONF": (_SETTING, "settings such as expandable_segments:True"),
}
# Ray's variables of these names hold numbers. Some of its processes die of anything else.
_RAY_NUMBER = re.compile(
    r"(?i)RAY_\w+_(s|ms|us|seconds|milliseconds|bytes|mb|interval|retries|attempts|files|lines|size|port|limit|threshold)"
)
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
WARNINGS_VARIABLE = "PYTHONWARNINGS"


def remove_wrong_values() -> list[str]:
    """Remove variables whose value their library would only complain about."""
    notes = []
    for name, (pattern, wrong) in REMOVED.items():
        value = os.environ.get(name)
        if value is not None and not re.fullmatch(pattern, value.strip()):
            del os.environ[name]
            if value:  # An empty variable is none.
                notes.append(f"ignored: {name}={value}, which is {wrong}")
    for name, value in [item for item in os.environ.items() if _RAY_NUMBER.fullmatch(item[0])]:
        if not _is_number(value):
            del os.environ[name]
            if value:
                notes.append(f"ignored: {name}={value}, which is no number")
    return notes


def refuse_wrong_values() -> list[str]:
    """Raise UserError for a variable with which torch cannot be imported."""
    for name, (pattern, accepted) in REFUSED.items():
        value = os.environ.get(name)
        if value == "":
            del os.environ[name]
        elif value is not None and not re.fullmatch(pattern, value):
            raise UserError(f"{name}={value}: torch accepts {accepted}; set it to one of them, or unset it")
    return []


def forgive_warnings() -> list[str]:
    """Let no warning of a library end this process or its children, where PYTHONWARNINGS makes errors of them."""
    options = [option for option in os.environ.get(WARNINGS_VARIABLE, "").split(",") if option]
    kept = [option for option in options if not "error".startswith(option.split(":")[0].strip() or "-")]
    if len(kept) < len(options):
        os.environ[WARNINGS_VARIABLE] = ",".join(kept)
        warnings.filters[:] = [entry for entry in warnings.filters if entry[0] != "error"]  # type: ignore[index]
    return []


def num_gpus(devices: Path = Path("/dev")) -> int:
    """Return the number of NVIDIA GPUs of this machine, hidden ones included."""
    return sum(path.name.removeprefix("nvidia").isdecimal() for path in devices.glob("nvidia*"))


def report_hidden_gpus(*, gpu: bool | None) -> list[str]:
    """Report that GPUs of this machine are not used because a variable hides all of them.

    Raises UserError where `gpu` is true.
    """
    value = os.environ.get(GPU_VARIABLE)
    count = num_gpus()
    if value is None or count == 0 or gpu is False or visible_gpus(value, count):
        return []
    hidden = f"{GPU_VARIABLE}={value!r} hides this machine's {count} GPU(s)"
    if gpu:
        raise UserError(
            f"--gpu: {hidden}; set it to numbers from 0 to {count - 1}, or unset it, or use --cpu"
        )
    return [f"{hidden}: training on the CPU"]


def visible_gpus(value: str, count: int) -> int:
    """Return how many of `count` GPUs CUDA_VISIBLE_DEVICES=`value` leaves: those before the first wrong entry."""
    visible = 0
    for entry in value.split(","):
        entry = entry.strip()
        if not (entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < count)):
            break
        visible += 1
    return visible


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True

"""The software and the GPUs of this machine."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from resnet_dist import __version__

MAX_HOSTS = 100  # that a tag names
_DRIVER = re.compile(r"Kernel Module\s+(?:for \S+\s+)?(\d+[\d.]*)")
DRIVER_FILE = Path("/proc/driver/nvidia/version")


def package_versions() -> dict[str, str]:
    """Return the versions of this package, of Python, and of the libraries that a run depends on, by name."""
    versions = {"resnet_dist": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "ray", "mlflow"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def driver_version(file: Path = DRIVER_FILE) -> str | None:
    """Return the version of NVIDIA's driver; None where there is none."""
    try:
        found = _DRIVER.search(file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def hosts_text(hosts: Sequence[str]) -> str:
    """Return the names of the machines of all ranks, each once, with the number of ranks where it is not one."""
    names = list(dict.fromkeys(hosts))
    shown = [
        f"{name} ({count} ranks)" if (count := hosts.count(name)) > 1 else name for name in names[:MAX_HOSTS]
    ]
    more = f" and {len(names) - MAX_HOSTS} more" if len(names) > MAX_HOSTS else ""
    return ", ".join(shown) + more

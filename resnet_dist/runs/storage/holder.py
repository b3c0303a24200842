"""The process that holds a lease, and whether it lives, as far as this machine can know."""

from __future__ import annotations

import json
import os
import platform
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from resnet_dist.system.provenance import user_name


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease, as the lease records it."""

    id: str  # unique
    host: str
    user: str
    pid: int
    process: str  # identifies the process on its machine; empty: unknown
    since: str
    beat: int = 0  # grows while the holder lives

    @classmethod
    def this_process(cls) -> Holder:
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        pid = os.getpid()
        return cls(uuid.uuid4().hex, platform.node(), user_name(), pid, _identity(pid) or "", since)

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        """Return the holder that a lease names; None where it is free, or was written by another version."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_dead(self) -> bool | None:
        """Report whether the holder's process has ended; None where this machine cannot know."""
        machine = self.process.rpartition(" ")[0].rpartition(" ")[0]
        if not machine or machine != _machine():
            return None
        return _identity(self.pid) != self.process

    def __str__(self) -> str:
        return f"{self.user} on {self.host}, process {self.pid}, since {self.since}"


def _machine() -> str:
    """Return what identifies this machine since its start, and this container on it; empty where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _identity(pid: int) -> str | None:
    """Return what identifies a process of this machine; None where there is none, or where it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" or not _machine() else f"{_machine()} {pid} {fields[19]}"

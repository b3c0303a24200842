"""Memory, threads and open files of the processes that live long, every few seconds, and the disk of each host."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.hosts import Host
from tests.cluster.ray_hosts import GCS, RAYLET

POLL_SECONDS = 15.0
SETTLE_SECONDS = 60.0  # A process that starts grows.
MB = 2**20
# What lives on which host, and what its command line holds.
ROLES = (
    ("driver", "h0", "-m resnet_dist train"),
    ("client", "client", "-m resnet_dist submit"),
    ("GCS", "h0", GCS),
    ("raylet of the head", "h0", RAYLET),
    ("dashboard", "h0", "dashboard/dashboard.py"),
    ("raylet of a node", "h1", RAYLET),
    ("raylet of a node", "h2", RAYLET),
    ("MLflow's server", "mlflow", "mlflow"),
)


@dataclass(frozen=True)
class Sample:
    """A process at one time."""

    time: float
    rss_bytes: int
    num_threads: int
    num_files: int


@dataclass
class Usage:
    """The samples of each process, by role and process."""

    samples: dict[tuple[str, int], list[Sample]] = field(default_factory=lambda: defaultdict(list))

    def lines(self) -> Iterator[str]:
        """Yield a row for each role: of the process that lived longest, once it had settled, and at its end."""
        for role in dict.fromkeys(role for role, _, _ in ROLES):
            of_role = [samples for (name, _), samples in self.samples.items() if name == role]
            if not of_role:
                continue
            # Of several that live from begin to end, the largest.
            longest = max(of_role, key=lambda samples: (len(samples), samples[-1].rss_bytes))
            settled = [one for one in longest if one.time - longest[0].time >= SETTLE_SECONDS] or longest
            begin, end = settled[0], longest[-1]
            yield (
                f"| {role} | {len(of_role)} | {end.time - longest[0].time:.0f} s | {begin.rss_bytes / MB:.0f} → "
                f"{end.rss_bytes / MB:.0f} MB | {begin.num_threads} → {end.num_threads} | {begin.num_files} → {end.num_files} |"
            )


@contextmanager
def watched(all_hosts: Sequence[Host], log: Path | None) -> Iterator[Usage]:
    """Sample inside the context, from a thread. log: gets the samples as JSON lines."""
    usage, stop = Usage(), threading.Event()
    by_name = {host.name: host for host in all_hosts}

    def run() -> None:
        while not stop.wait(POLL_SECONDS):
            for role, name, words in ROLES:
                for pid in by_name[name].find(words) if name in by_name else []:
                    with suppress(OSError, KeyError, ValueError):
                        usage.samples[role, pid].append(sample := sample_of(pid))
                        if log is not None:
                            with log.open("a") as file:
                                file.write(json.dumps([role, pid, *vars(sample).values()]) + "\n")

    thread = threading.Thread(target=run, name="usage", daemon=True)
    thread.start()
    try:
        yield usage
    finally:
        stop.set()
        thread.join()


def sample_of(pid: int) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    rss_bytes = int(status["VmRSS"].split()[0]) * 1024
    return Sample(
        time.time(), rss_bytes, int(status["Threads"]), len(list(Path(f"/proc/{pid}/fd").iterdir()))
    )


def disk_bytes(host: Host) -> int:
    """Return the bytes of the files of a host."""
    done = subprocess.run(["du", "-sxb", str(host.folder)], capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0])

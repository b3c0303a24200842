"""A Slurm cluster on such hosts: a controller and nodes of one CPU each, with munge between them."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.hosts import TEMPORARY, Host, hosts, wait_until
from tests.cluster.ray_hosts import PYTHON
from tests.paths import ROOT

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
SECONDS = 60.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
# `urgent` takes nodes from `normal`, whose jobs have 20 s to end before they are queued again.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
ReturnToService=2
SlurmdParameters=config_overrides
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=30 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PreemptMode=OFF PriorityTier=2
"""


def require_slurm() -> None:
    """Skip the test, with the name of what is missing."""
    for program in PROGRAMS:
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            pytest.skip(f"needs {program} (apt-get install slurmctld slurmd slurm-client munge)")


@dataclass
class Slurm:
    """A controller, where jobs are submitted, and its nodes; `shared` is the one folder that all of them see."""

    controller: Host
    nodes: list[Host]
    shared: Path

    def submit(self, *words: str) -> str:
        """Submit a job from the shared folder; return its id."""
        command = f"cd {self.shared} && exec {shlex.join(['sbatch', '--parsable', *words])}"
        return self.controller.run(["sh", "-c", command]).strip()

    def state(self, job: str) -> str:
        return self._field(job, "JobState")

    def exit_code(self, job: str) -> str:
        """Return the exit code of a job, and the signal that ended it."""
        return self._field(job, "ExitCode")

    def start_now(self, job: str) -> None:
        """Start a job that was queued again without the two minutes that Slurm waits.

        slurmd refuses a credential of the second in which it ended the job, and the job then fails without a line: wait
        for the nodes, and for the next second.
        """
        wait_until(lambda: _idle(self) == len(self.nodes), SECONDS, lambda: self.show(job))
        ended = int(time.time())
        wait_until(lambda: int(time.time()) > ended, SECONDS, lambda: "the clock stands still")
        self.controller.run(["scontrol", "update", f"jobid={job}", "StartTime=now"])

    def wait_for_state(self, job: str, wanted: str, seconds: float) -> None:
        """Wait until a job is in the state `wanted`. Raises AssertionError where it ends in another one."""

        def reached() -> bool:
            state = self.state(job)
            assert state == wanted or state not in ENDED, f"{self.show(job)}\n{self.log(job)}"
            return state == wanted

        wait_until(reached, seconds, lambda: f"{self.show(job)}\n{self.log(job)}")

    def show(self, job: str) -> str:
        return self.controller.run(["scontrol", "show", "job", job])

    def log(self, job: str) -> str:
        (path,) = self.shared.glob(f"*-{job}.log")
        return path.read_text(errors="replace")

    def _field(self, job: str, name: str) -> str:
        words = self.show(job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


@contextmanager
def slurm(shared: Path) -> Iterator[Slurm]:
    """Yield a Slurm cluster of two nodes. shared: a folder outside /tmp."""
    with hosts("control", "n1", "n2") as (controller, *nodes):
        described = "\n".join(
            f"NodeName={node.name} NodeAddr={node.address} CPUs=1 RealMemory=8000" for node in nodes
        )
        text = CONFIGURATION.format(controller=controller.name, folder=TEMPORARY, nodes=described)
        key = secrets.token_bytes(1024)
        path = f"{Path(PYTHON).parent}:{os.environ['PATH']}:/usr/sbin"
        for host in (controller, *nodes):
            (host.folder / "slurm.conf").write_text(text)
            # slurmd looks for cgroups even where no plugin uses them; a network namespace has a /sys without them.
            (host.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
            (host.folder / "spool").mkdir()
            host.environment |= {
                "SLURM_CONF": f"{TEMPORARY}/slurm.conf",
                "PATH": path,
                "PYTHONPATH": str(ROOT),
            }
            host.environment |= {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1"}
            _start_munge(host, key)
        controller.start(["slurmctld", "-D", "-f", f"{TEMPORARY}/slurm.conf"], log="slurm.log")
        cores = sorted(os.sched_getaffinity(0))
        for number, node in enumerate(nodes):
            core = str(cores[number % len(cores)])
            slurmd = ["taskset", "-c", core, "slurmd", "-D", "-N", node.name, "-f", f"{TEMPORARY}/slurm.conf"]
            node.start(slurmd, log="slurm.log")
        made = Slurm(controller, nodes, shared)
        wait_until(lambda: _idle(made) == len(nodes), SECONDS, lambda: _logs([controller, *nodes]))
        yield made


def _start_munge(host: Host, key: bytes) -> None:
    folder = host.folder / "munge"
    folder.mkdir(mode=0o700)
    (folder / "key").write_bytes(key)
    (folder / "key").chmod(0o600)
    inside = TEMPORARY / "munge"
    options = [f"--socket={TEMPORARY}/munge.socket", f"--key-file={inside}/key", f"--pid-file={inside}/pid"]
    options += [f"--log-file={inside}/log", f"--seed-file={inside}/seed"]
    host.start(["munged", "--foreground", "--force", *options], log="munge.log")
    wait_until((host.folder / "munge.socket").exists, SECONDS, lambda: host.output("munge.log"))


def _idle(cluster: Slurm) -> int:
    command = ["sinfo", "--noheader", "--partition=normal", "--Node", "--format=%T"]
    try:
        return cluster.controller.run(command).split().count("idle")
    except AssertionError:  # The controller does not answer yet.
        return 0


def _logs(made: Sequence[Host]) -> str:
    return "\n".join(host.output("slurm.log")[-2000:] for host in made)

"""cluster/slurm.sbatch without Slurm: what it does where nodes, addresses, checkpoints or Slurm itself fail."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster_files.files import CLUSTER

# Stand-ins of the programs that the script of Slurm calls. The job has been preempted.
PROGRAMS = {
    "resnet-dist": 'echo "$SAYS"; exit ${CODE:-0}',
    # Ray does not start at first; later it runs the words after `--`.
    "ray": """
echo ray >> $COUNT
while [[ $1 != -- ]]; do shift; done
(( $(wc -l < $COUNT) <= ${FAILS:-0} )) || "${@:2}"
""",
    "sleep": "",
    "getent": "echo 127.0.1.1 host",
    "hostname": '[[ $1 != -I ]] || echo "$ADDRESSES"',
    "scancel": "",
    # Slurm refuses to queue the job again, and signals its shell meanwhile, as at the time limit.
    "scontrol": """
if [[ $1 == show ]]; then echo StartTime=2026-01-01 PreemptTime=2026-01-02; else kill -USR1 $PPID; false; fi
""",
    "srun": '''echo "srun $* to $HEAD"; SLURM_NODEID=${NODE:-1} SLURMD_NODENAME=h2 timeout 20 "${@:3}"
[[ -e $STATE/code ]] || echo 1 > "$STATE/code"''',
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "1"}


def run_slurm_script(folder: Path, before: str = "", **variables: str) -> tuple[int, str, int]:
    """Run the script on stand-ins; return its exit code, its log, and how often the node (NODE, default 1) has begun Ray."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    log, count = folder / "job.log", folder / "count"
    log.write_text(before)
    count.touch()
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "COUNT": str(count), **SLURM, **variables}
    with log.open("a") as file:
        script = ["bash", str(CLUSTER / "slurm.sbatch"), "x.py"]
        code = subprocess.run(
            script, env=variables, stdout=file, stderr=file, timeout=30, check=False
        ).returncode
    return code, log.read_text().removeprefix(before), len(count.read_text().splitlines())


def test_slurm_ends_a_node_that_cannot_join_and_reports_what_is_not_queued(tmp_path: Path) -> None:
    # More addresses than a pipe holds.
    code, log, joins = run_slurm_script(tmp_path, ADDRESSES="192.0.2.1 " + "192.0.2.2 " * 10_000)
    assert "--kill-on-bad-exit=1" in log
    assert "to 192.0.2.1\n" in log
    assert joins == 10
    assert "error: Ray on h2 ended ten times" in log
    assert "asking Slurm to queue the job again; the next start continues run x-7" in log
    assert "error: Slurm does not queue the job again; this continues its run: NAME=x-7" in log
    assert code == 1


def test_slurm_reports_a_host_without_an_address(tmp_path: Path) -> None:
    code, log, _ = run_slurm_script(tmp_path, ADDRESSES="2001:db8::1")
    assert (code, "has no IPv4 address that other nodes can reach" in log) == (2, True)


@pytest.mark.parametrize(
    ("start", "stops"),
    [
        ("", True),
        ("resumed at step 40 of 99\n", True),
        ("resumed at step 40 of 99\ninterrupted at step 40; saved\n", True),
        ("resumed at step 40 of 99\ninterrupted at step 41; saved\n", False),
        ("resumed at step {} of 99\n", False),
    ],
    ids=["none", "same", "same-interrupted", "saved", "further"],
)
def test_slurm_does_not_queue_forever_a_job_that_saves_nothing(
    tmp_path: Path, start: str, stops: bool
) -> None:
    queued = "asking Slurm to queue the job again; the next start continues run x\n"
    before = "".join(f"{start.format(number)}{queued}" for number in range(4)) + start.format(4)
    code, log, _ = run_slurm_script(tmp_path, before, ADDRESSES="192.0.2.1")
    assert code == 1
    assert ("error: 5 starts began at the same step" in log) == stops
    assert (queued.partition(";")[0] in log) != stops


@pytest.mark.parametrize(("fails", "code", "starts"), [(0, 0, 1), (2, 0, 3), (9, 1, 3)])
def test_slurm_starts_a_head_again_that_ray_gave_up(
    tmp_path: Path, fails: int, code: int, starts: int
) -> None:
    ended, log, began = run_slurm_script(tmp_path, ADDRESSES="192.0.2.1", NODE="0", FAILS=str(fails))
    assert (ended, began) == (code, starts), log
    assert log.count("Ray has not started on h2") == min(fails, 3)


@pytest.mark.parametrize(("code", "repeated"), [(2, "error: no such recipe\n"), (1, ""), (0, "")])
def test_the_result_stands_below_the_lines_of_ray_and_slurm(tmp_path: Path, code: int, repeated: str) -> None:
    before = (
        "error: of an earlier start\nasking Slurm to queue the job again; the next start continues run x\n"
    )
    says = "error: no such recipe" if code == 2 else "a line"
    variables = {"ADDRESSES": "192.0.2.1", "NODE": "0", "SAYS": says, "CODE": str(code)}
    ended, log, _ = run_slurm_script(tmp_path, before, **variables)
    assert ended == code
    result = f"run x-7: exit code {code}\n{repeated}"
    assert log.partition(f"{says}\n")[2].startswith(result), log
    assert "of an earlier start" not in log

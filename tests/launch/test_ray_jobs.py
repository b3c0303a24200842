"""Following a submitted job: its log is printed once, and its name is reported whatever ends the command."""

from __future__ import annotations

import getpass
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.launch import ray_jobs
from resnet_dist.launch.ray_jobs import JobLeft, Submission, submit_job
from resnet_dist.tracking.mlflow.run import origin_tags

LOG = ["a\n", "b\n", "c\n", "d\n"]


@dataclass
class Cluster:
    """A fake JobSubmissionClient. Each connection to the log lasts one chunk longer than the one before."""

    before: Callable[[str], None] = lambda call: None  # called before each request; may raise
    connections: int = 0
    stopped: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def get_address(self) -> str:
        return "http://cluster:8265"

    def submit_job(self, *, submission_id: str, runtime_env: dict[str, Any], **more: Any) -> str:
        self.before("submit")
        self.environment = runtime_env["env_vars"]
        return submission_id

    def get_job_status(self, job: str) -> JobStatus:
        self.before("status")
        if self.stopped:
            return JobStatus.STOPPED
        return JobStatus.SUCCEEDED if self.connections >= len(LOG) - 1 else JobStatus.RUNNING

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        for text in LOG[: self.connections]:
            yield text
        self.before("tail")

    def get_job_logs(self, job: str) -> str:
        return "".join(LOG)

    def get_job_info(self, job: str) -> Any:
        return type("Info", (), {"driver_exit_code": None})

    def stop_job(self, job: str) -> None:
        self.before("stop")
        self.stopped = True


@pytest.fixture
def follow(
    digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Cluster], tuple[int | JobLeft, str]]:
    def run(cluster: Cluster) -> tuple[int | JobLeft, str]:
        monkeypatch.setattr(ray_jobs, "_connect", lambda address: cluster)
        monkeypatch.setattr(ray_jobs, "POLL_SECONDS", 0.01)
        source = Path("jobs/digits.py")
        submission = Submission(
            digits_recipe,
            source,
            "x",
            WorkerRange.exactly(2),
            None,
            None,
            False,
            "/o",
            False,
            "typed",
            10,
            None,
        )
        output: list[str] = []
        try:
            return submit_job(submission, output.append), "".join(output)
        except JobLeft as left:
            return left, "".join(output)

    return run


Follow = Callable[[Cluster], tuple[int | JobLeft, str]]


def after(count: int, do: Callable[[], object], call: str = "status") -> Callable[[str], None]:
    calls = 0

    def before(name: str) -> None:
        nonlocal calls
        calls += name == call
        if name == call and calls > count:
            do()

    return before


def fail() -> None:
    raise ConnectionError("refused\nand more")


@pytest.mark.parametrize("lost", [lambda call: None, after(0, fail, "tail")])
def test_the_log_is_printed_once(follow: Follow, lost: Callable[[str], None]) -> None:
    code, output = follow(Cluster(lost))
    assert code == 0
    assert output.partition("\n")[0].startswith("job raysubmit_")
    assert output.partition("\n")[2] == "".join(LOG)


def test_a_cluster_that_is_back_in_time_is_followed_on(follow: Follow) -> None:
    failures = iter([False, True, True, False, True] + [False] * 9)
    cluster = Cluster(after(0, lambda: next(failures) and fail()))
    assert follow(cluster)[0] == 0


def test_a_cluster_that_is_gone_leaves_the_job_to_itself(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_jobs, "LOST_SECONDS", 0.1)
    left, output = follow(Cluster(after(1, fail)))
    job = output.splitlines()[0].removeprefix("job ")
    assert isinstance(left, JobLeft)
    assert left.exit_code == 1
    assert str(left).startswith(f"no answer for 0 s (refused); job {job} is not stopped by this")
    assert f"ray job stop --address http://cluster:8265 {job}" in str(left)


def test_a_signal_stops_the_job(follow: Follow) -> None:
    code, output = follow(Cluster(after(1, lambda: os.kill(os.getpid(), signal.SIGINT))))
    assert code == 130
    assert output.endswith("".join(LOG))


@pytest.mark.parametrize("call", ["submit", "status"])
def test_an_interruption_names_the_job(follow: Follow, call: str) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    left, _ = follow(Cluster(after(0, interrupt, call)))
    assert isinstance(left, JobLeft)
    assert left.exit_code == 130
    assert str(left).startswith("interrupted; job raysubmit_")


def test_a_job_that_cannot_be_stopped_is_reported(follow: Follow) -> None:
    def before(call: str) -> None:
        if call == "stop":
            fail()
        signalled(call)

    signalled = after(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    code, output = follow(Cluster(before))
    assert code == 0
    assert "could not be stopped (refused); Ctrl-C again leaves it" in output


def test_a_job_is_of_the_person_and_file_that_submitted_it(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("USER", "somebody")
    monkeypatch.setattr(getpass, "getuser", lambda: "person")
    cluster = Cluster()
    follow(cluster)
    monkeypatch.setattr(getpass, "getuser", lambda: "ray")
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    tags = origin_tags("recipe.json", "")
    assert (tags["mlflow.user"], tags["mlflow.source.name"]) == ("person", "jobs/digits.py")

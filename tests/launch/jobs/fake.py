"""A fake of Ray's JobSubmissionClient: the jobs of a cluster, and what happens to a request."""

from __future__ import annotations

import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

from resnet_dist.launch.jobs import job

ADDRESS = "http://cluster:8265"
LOG = ["a\n", "b\n", "c\n", "d\n"]
TYPED = "resnet-dist submit jobs/digits.py --address http://cluster:8265"
START = 1_760_000_000_000  # milliseconds


def details(name: str, run: str = "", *, state: str = "RUNNING", number: int = 0, **more: Any) -> JobDetails:
    """Return a job as Ray describes it. number: of seconds after the first; more: other fields."""
    metadata = {
        job.RUN: run,
        job.USER: "anna",
        job.RECIPE: "digits",
        job.SOURCE: "jobs/digits.py",
        job.OUTPUT: "/mnt/output",
        job.COMMAND: TYPED,
    }
    fields = {
        "type": JobType.SUBMISSION,
        "submission_id": name,
        "status": JobStatus(state),
        "entrypoint": "sh .resnet-dist/start_job.sh 0.3.0 train",
        "start_time": START + 1000 * number,
        "metadata": metadata if run else {},
        **more,
    }
    return JobDetails(**fields)


@dataclass
class Cluster:
    """One job whose log has LOG. Each connection to it lasts one chunk longer than the one before."""

    before: Callable[[str], None] = lambda call: None  # called before each request; may raise
    end: dict[str, Any] = field(default_factory=lambda: {"status": JobStatus.SUCCEEDED})  # of the job
    log: list[str] = field(default_factory=lambda: list(LOG))
    jobs: list[JobDetails] = field(default_factory=list)  # others, and what list_jobs() returns
    connections: int = 0
    stopped: bool = False
    sent: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)  # of the package

    def get_address(self) -> str:
        return ADDRESS

    def submit_job(self, **request: Any) -> str:
        self.before("submit")
        self.sent = request
        package = Path(request["runtime_env"]["working_dir"])
        with zipfile.ZipFile(package) as opened:
            self.files = {name: opened.read(name) for name in opened.namelist()}
        return str(request["submission_id"])

    @property
    def environment(self) -> dict[str, str]:
        return self.sent["runtime_env"]["env_vars"]  # type: ignore[no-any-return]

    def list_jobs(self) -> list[JobDetails]:
        self.before("list")
        return self.jobs

    def get_job_info(self, name: str) -> JobDetails:
        self.before("status")
        if known := [found for found in self.jobs if found.submission_id == name]:
            return known[0].model_copy(update={"status": JobStatus.STOPPED} if self.stopped else {})
        fields: dict[str, Any] = {"status": JobStatus.RUNNING}
        if self.stopped:
            fields = {"status": JobStatus.STOPPED}
        elif self.connections >= len(self.log) - 1:
            fields = self.end
        return details(name).model_copy(update={"metadata": self.sent.get("metadata", {}), **fields})

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        self.connections += 1
        for text in self.log[: self.connections]:
            yield text
        self.before("tail")

    def get_job_logs(self, name: str) -> str:
        self.before("log")
        return "".join(self.log)

    def _do_request(self, method: str, path: str, *, params: Mapping[str, Any]) -> Any:
        self.before("last lines")
        assert (method, path) == ("GET", "/api/v0/logs/file")
        lines = "".join(self.log).splitlines(keepends=True)
        return SimpleNamespace(status_code=200, text="".join(lines[-params["lines"] :]))

    def stop_job(self, name: str) -> None:
        self.before("stop")
        self.stopped = True


def fail() -> None:
    raise ConnectionError("refused\nand more")


def forget() -> None:
    """Answer as a head does that does not know the job."""
    raise RuntimeError("Request failed with status code 404: Job raysubmit_1 does not exist.")


def after(count: int, do: Callable[[], object], call: str = "status") -> Callable[[str], None]:
    """Return a `before` that calls `do` for every request of that kind after the first `count`."""
    calls = 0

    def before(name: str) -> None:
        nonlocal calls
        calls += name == call
        if name == call and calls > count:
            do()

    return before

"""Following a submitted job: its log is printed once, and the command never ends without a sentence and the next line."""

from __future__ import annotations

import asyncio
import getpass
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.launch.jobs import follow as following
from resnet_dist.launch.jobs import submit
from resnet_dist.launch.jobs.advice import JobLeft
from resnet_dist.launch.jobs.client import cause_line
from resnet_dist.launch.jobs.submission import Submission
from resnet_dist.tracking.mlflow.run import origin_tags
from tests.launch.jobs.fake import ADDRESS, LOG, TYPED, Cluster, after, fail, forget


@dataclass
class Followed:
    """The result of `submit` for a person: the code or JobLeft, its log, and our own lines."""

    end: int | JobLeft
    log: str
    lines: str

    @property
    def job(self) -> str:
        return self.log.splitlines()[0].removeprefix("job ").partition(" ")[0]


Follow = Callable[..., Followed]


@pytest.fixture
def follow(digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Follow:
    """Submit a job to a fake cluster, and follow it to its end."""
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)

    def run(cluster: Cluster, *, detach: bool = False, name: str | None = "first") -> Followed:
        monkeypatch.setattr(submit, "connect", lambda address: cluster)
        submission = Submission(
            digits_recipe,
            Path("jobs/digits.py"),
            ADDRESS,
            WorkerRange.exactly(2),
            None,
            name,
            False,
            "/o",
            detach,
            TYPED,
            10,
            None,
        )
        log, lines = list[str](), list[str]()
        end: int | JobLeft
        try:
            end = submit.submit_job(submission, log.append, lines.append)
        except JobLeft as left:
            end = left
        return Followed(end, "".join(log), "\n".join(lines))

    return run


@pytest.mark.parametrize("lost", [lambda call: None, after(0, fail, "tail")])
def test_the_log_is_printed_once(follow: Follow, lost: Callable[[str], None]) -> None:
    followed = follow(Cluster(lost))
    assert (followed.end, followed.lines) == (0, "")
    assert followed.log == f"job {followed.job} (run first)\n{''.join(LOG)}"


def test_the_run_has_a_name_before_the_job_begins(follow: Follow, digits_recipe: Recipe) -> None:
    first, second = Cluster(), Cluster()
    followed = follow(first, name=None)
    follow(second, name=None)
    run = first.sent["metadata"]["resnet_dist.run"]
    assert f"--name {run}" in first.sent["entrypoint"]
    assert f"(run {run})" in followed.log
    assert run.startswith(f"{digits_recipe.name}-")
    assert run != second.sent["metadata"]["resnet_dist.run"]


def test_detached_prints_the_lines_that_come_next(follow: Follow) -> None:
    cluster = Cluster()
    followed = follow(cluster, detach=True)
    assert (followed.end, cluster.connections) == (0, 0)
    assert followed.log.splitlines()[1:] == [
        f"  resnet-dist logs first --follow --address {ADDRESS}",
        f"  resnet-dist status first --address {ADDRESS}",
        f"  resnet-dist stop first --address {ADDRESS}",
    ]


NO_AGENT = "No available agent to submit job, please try …."
REFUSED = "aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 10.0.0.1:52365"
TRACEBACK = f'Traceback (most recent call last):\n  File "job_head.py", line 419, in submit_job\n{REFUSED}\n.'


@pytest.mark.parametrize(("seconds", "sent"), [(60.0, True), (0.0, False)])
@pytest.mark.parametrize(("answer", "cause"), [(NO_AGENT, "No available agent"), (TRACEBACK, REFUSED)])
def test_a_head_that_has_just_started_gets_the_job_when_it_can(
    follow: Follow, monkeypatch: pytest.MonkeyPatch, seconds: float, sent: bool, answer: str, cause: str
) -> None:
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(submit, "AGENT_SECONDS", seconds)
    answers = iter([500, 500])

    def refuse(call: str) -> None:
        if call == "submit" and next(answers, None):
            raise RuntimeError(f"Request failed with status code 500: {answer}")

    followed = follow(Cluster(refuse))
    if sent:
        assert followed.end == 0
        assert followed.lines.count("the cluster cannot begin jobs yet") == 1
        assert cause in followed.lines
    else:
        said = str(followed.end)
        assert "the job may not have begun (Request failed with status code 500: " in said
        assert cause in said
        assert "Traceback" not in said


def test_a_refused_connection_is_named_without_the_tries_around_it() -> None:
    text = "HTTPConnectionPool(host='h', port=9): Max retries exceeded with url: /x (Caused by NewConnectionError(\"HTTPConnection"
    assert cause_line(OSError(f'{text}: [Errno 111] Connection refused"))')) == "Connection refused"
    assert cause_line(OSError(f"{text}: no number")) == f"{text}: no number"


@pytest.mark.parametrize("first", [True, False])
def test_a_job_that_began_though_its_answer_was_lost_is_followed(
    follow: Follow, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    cluster = Cluster(lambda call: None)
    submit_job = cluster.submit_job
    tries: list[str] = []

    def lose(**request: Any) -> str:
        tries.append(request["submission_id"])
        if len(tries) == 1 and not first:
            submit_job(**request)
            raise RuntimeError("Request failed with status code 500: .")
        raise RuntimeError(
            f"Request failed with status code 400: {TRACEBACK.replace(REFUSED, '')}"
            f"ValueError: Job with submission_id {tries[0]} already exists. Please use a different"
        )

    monkeypatch.setattr(cluster, "submit_job", lose)
    followed = follow(cluster)
    if first:
        assert "already exists" in str(followed.end)
    else:
        assert (followed.end, len(tries), len(set(tries))) == (0, 2, 1)


def test_a_cluster_that_is_back_in_time_is_followed_on(follow: Follow) -> None:
    failures = iter([False, True, True, False, True] + [False] * 9)
    cluster = Cluster(after(0, lambda: next(failures) and fail()))
    assert follow(cluster).end == 0


def test_a_cluster_that_is_gone_leaves_the_job_to_itself(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "LOST_SECONDS", 0.1)
    followed = follow(Cluster(after(1, fail)))
    assert isinstance(followed.end, JobLeft)
    assert followed.end.exit_code == 6
    title = f"job {followed.job} (run first)"
    assert str(followed.end).startswith(f"no answer for 0 s (refused); {title} is not stopped by this")
    assert f"\n  resnet-dist stop first --address {ADDRESS}" in str(followed.end)


def test_a_link_that_is_cut_is_noticed(follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection of which nothing comes any more, not even its end."""

    class Cut(Cluster):
        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            self.connections += 1
            yield "a\n"
            await asyncio.sleep(1000)

    monkeypatch.setattr(following, "SILENT_SECONDS", 0.01)
    monkeypatch.setattr(following, "LOST_SECONDS", 0.1)
    followed = follow(Cut(after(3, fail)))
    assert isinstance(followed.end, JobLeft)
    assert followed.log.endswith(")\na\n")


def test_a_silent_job_is_followed_on_one_connection(follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Cluster):
        looks = 0

        def get_job_info(self, name: str) -> Any:
            self.looks += 1
            state = JobStatus.SUCCEEDED if self.looks > 20 else JobStatus.RUNNING
            return super().get_job_info(name).model_copy(update={"status": state})

        async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
            self.connections += 1
            yield "a\n"
            await asyncio.sleep(1000)

    monkeypatch.setattr(following, "SILENT_SECONDS", 0.01)
    cluster = Silent()
    followed = follow(cluster)
    assert (followed.end, cluster.connections, followed.log.partition("\n")[2]) == (0, 1, "".join(LOG))


def test_a_job_that_waits_is_reported_once(follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pending(Cluster):
        looks = 0

        def get_job_info(self, name: str) -> Any:
            self.looks += 1
            state = JobStatus.SUCCEEDED if self.looks > 5 else JobStatus.PENDING
            return super().get_job_info(name).model_copy(update={"status": state})

    monkeypatch.setattr(following, "PENDING_SECONDS", -1.0)
    followed = follow(Pending())
    assert followed.end == 0
    assert followed.lines.count("has not begun after") == 1


def test_a_signal_stops_the_job(follow: Follow) -> None:
    followed = follow(Cluster(after(1, lambda: os.kill(os.getpid(), signal.SIGINT))))
    assert followed.end == 130
    assert followed.log.endswith("".join(LOG))
    assert "it saves a checkpoint first" in followed.lines
    # The log has no line that continues: the job was stopped before its driver could print it.
    assert f"this continues it:\n  {TYPED} --name first" in followed.lines


def test_a_driver_that_reported_its_interruption_has_the_last_word(follow: Follow) -> None:
    log = [*LOG, "interrupted at step 3; this continues it:\n", "  resnet-dist submit x --name first\n"]
    cluster = Cluster(after(1, lambda: os.kill(os.getpid(), signal.SIGINT)), log=log)
    followed = follow(cluster)
    assert followed.end == 130
    assert "this continues it" not in followed.lines


@pytest.mark.parametrize("call", ["submit", "status"])
def test_an_interruption_names_the_job(follow: Follow, call: str) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    followed = follow(Cluster(after(0, interrupt, call)))
    assert isinstance(followed.end, JobLeft)
    assert followed.end.exit_code == 130
    assert str(followed.end).startswith("interrupted; job raysubmit_")


def test_a_job_that_cannot_be_stopped_is_reported(follow: Follow) -> None:
    def before(call: str) -> None:
        if call == "stop":
            fail()
        signalled(call)

    signalled = after(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    followed = follow(Cluster(before))
    assert followed.end == 0
    assert "could not be stopped (refused); Ctrl-C again leaves it" in followed.lines


DUMP = "Job supervisor actor died: The actor died unexpectedly.\n\tclass_name: JobSupervisor\n\tactor_id: 1\n"
ENDS = {
    "killed": ({"driver_exit_code": -9}, 1, "was killed (SIGKILL, as the kernel does where memory runs out)"),
    "killed below a shell": ({"driver_exit_code": 137}, 1, "was killed (SIGKILL"),
    "crashed": ({"driver_exit_code": 139}, 1, "was killed (SIGSEGV)"),
    "node lost": (
        {"error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": DUMP},
        1,
        "Ray lost the process that runs the driver of run first, or its node (Job supervisor actor died: The actor died "
        "unexpectedly.); its ranks end by themselves",
    ),
    "not begun": (
        {"error_type": "RUNTIME_ENV_SETUP_FAILURE", "message": "runtime_env setup failed: no space"},
        1,
        "could not prepare the environment of the driver of run first (runtime_env setup failed: no space); nothing was",
    ),
    "unknown": ({}, 1, "Ray ended the driver of run first (it names no reason)"),
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_lost_driver_is_reported(follow: Follow, kind: str) -> None:
    fields, code, sentence = ENDS[kind]
    log = [*LOG[:3], f"d\n{DUMP}"] if kind == "node lost" else LOG
    followed = follow(Cluster(end={"status": JobStatus.FAILED, **fields}, log=list(log)))
    assert followed.end == code
    assert followed.log.endswith("c\nd\n")  # without Ray's dump
    assert sentence in followed.lines
    assert followed.lines.startswith(f"job {followed.job}: ")
    assert followed.lines.endswith(
        f"this continues it:\n  {TYPED} --name first\nits log:\n  resnet-dist logs first --address {ADDRESS}"
    )


def test_a_line_of_the_driver_like_those_of_ray_hides_nothing(follow: Follow) -> None:
    log = [*LOG[:2], "Unexpected error occurred: mine\n", "d\n"]
    for end in ({"status": JobStatus.FAILED, "driver_exit_code": 1}, {"status": JobStatus.SUCCEEDED}):
        assert follow(Cluster(end=end, log=list(log))).log.partition("\n")[2] == "".join(log)


def test_a_job_that_cannot_be_sent_in_time_is_left(follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "SEND_SECONDS", 0.05)
    hanging = threading.Event()
    followed = follow(Cluster(after(0, lambda: hanging.wait(10), "submit")))
    hanging.set()
    assert isinstance(followed.end, JobLeft)
    assert str(followed.end).startswith(
        "the job may not have begun (no answer within 0.05 s); job raysubmit_"
    )


@pytest.mark.parametrize("code", [1, 2, 4, 130])
def test_a_driver_that_reported_its_end_needs_no_sentence(follow: Follow, code: int) -> None:
    followed = follow(Cluster(end={"status": JobStatus.FAILED, "driver_exit_code": code}))
    assert (followed.end, followed.lines) == (code, "")


def test_a_job_that_somebody_else_stopped(follow: Follow) -> None:
    followed = follow(Cluster(end={"status": JobStatus.STOPPED}))
    assert followed.end == 130
    assert followed.lines.startswith(
        f"job {followed.job} (run first) was stopped by another command, or in Ray's dashboard; this continues it:\n"
    )


def test_a_head_that_has_forgotten_the_job(follow: Follow) -> None:
    followed = follow(Cluster(after(2, forget)))
    assert followed.end == 1
    assert f"does not know job {followed.job} (run first) any more: its head was restarted" in followed.lines
    assert followed.lines.endswith(f"this continues it:\n  {TYPED} --name first")


def test_a_log_that_went_with_its_node_is_not_waited_for(follow: Follow) -> None:
    cluster = Cluster(
        after(0, fail, "log"),
        end={"status": JobStatus.FAILED, "error_type": "JOB_SUPERVISOR_ACTOR_DIED", "message": "gone"},
    )
    followed = follow(cluster)
    assert followed.end == 1
    assert "the rest of its log cannot be read (refused)" in followed.lines
    assert "this continues it" in followed.lines


def test_lines_of_ray_are_not_shown(follow: Follow) -> None:
    ray = "2026-11-28 08:10:19,001\tINFO job_manager.py:568 -- Runtime env is setting up.\n"
    log = [ray, "Running entrypoint for job raysubmit_1: sh start\n", "a\n", "2026-11-28 other\n"]
    followed = follow(Cluster(log=log))
    assert followed.log.partition("\n")[2] == "a\n2026-11-28 other\n"


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
    metadata = {name.removeprefix("resnet_dist."): value for name, value in cluster.sent["metadata"].items()}
    assert metadata == {
        "run": "first",
        "user": "person",
        "recipe": "digits",
        "source": "jobs/digits.py",
        "output": "/o",
        "command": TYPED,
    }

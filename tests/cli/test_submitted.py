"""The commands about submitted jobs, as a person types them, on a fake cluster."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from resnet_dist.cli.main import run_command
from resnet_dist.launch.jobs import follow as following
from resnet_dist.launch.jobs import listing, stop
from resnet_dist.launch.jobs.job import OUTPUT
from resnet_dist.launch.ray_cluster import check
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.spool import Spool
from tests.launch.jobs.fake import ADDRESS, TYPED, Cluster, after, details, fail
from tests.launch.ray_cluster.servers import free_port

SAVED = ["run first: 132 steps, 2 rank(s)\n", "step 50/132  loss 0.1\n", "interrupted at step 52; x\n"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on a cluster; return its exit code, stdout and stderr."""
    monkeypatch.setattr(check, "find_dashboard", lambda address, report: ADDRESS)
    monkeypatch.setattr(following, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(stop, "POLL_SECONDS", 0.01)

    def command(cluster: Cluster, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(listing, "connect", lambda address: cluster)
        monkeypatch.setattr(sys, "argv", ["resnet-dist", *words])
        code = run_command()
        return code, *capsys.readouterr()

    return command


def cluster(log: list[str] | None = None, **more: Any) -> Cluster:
    made = [
        details("raysubmit_1", "first", number=1, state="FAILED", driver_exit_code=1),
        details("raysubmit_2", "first", number=2),
        details("raysubmit_3", "done", number=3, state="SUCCEEDED", driver_exit_code=0),
    ]
    return Cluster(jobs=made, log=list(SAVED[:2] if log is None else log), **more)


def test_a_list_of_jobs_reads_the_end_of_a_log(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a long run has megabytes; the table has one step of it."""
    monkeypatch.setattr(listing, "TAIL_LINES", 2)
    log = [SAVED[0], *(f"step {step}/132  loss 0.1\n" for step in range(10, 60, 10))]
    asked: list[str] = []
    code, out, _ = run(cluster(log, before=asked.append), "jobs")
    assert code == 0
    assert " 50/132 " in out
    assert asked.count("last lines") == 3
    assert "log" not in asked


@pytest.mark.parametrize("end", ["evaluating\nevaluating\n", "fails"])
def test_a_list_of_jobs_reads_the_whole_log_where_its_end_has_no_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(listing, "TAIL_LINES", 2)

    def before(call: str) -> None:
        if call == "last lines" and end == "fails":
            fail()

    log = [*SAVED[:2], *([] if end == "fails" else [end])]
    code, out, _ = run(cluster(log, before=before), "jobs")
    assert code == 0
    assert " 50/132 " in out


def test_jobs_are_listed(run: Run) -> None:
    code, out, err = run(cluster(), "jobs")
    assert (code, err) == (0, "")
    header, *rows = out.splitlines()
    assert header.split() == ["RUN", "JOB", "STATE", "STEP", "STARTED", "USER", "RECIPE", "OUTPUT"]
    assert [row.split()[:2] for row in rows] == [
        ["done", "raysubmit_3"],
        ["first", "raysubmit_2"],
        ["first", "raysubmit_1"],
    ]
    assert " RUNNING " in rows[1]
    assert " 50/132 " in rows[1]
    assert "FAILED (exit code 1)" in rows[2]
    assert rows[0].endswith("anna  digits  /mnt/output")


def test_a_job_that_has_ended_has_its_last_step(run: Run) -> None:
    end = ["checkpoint /mnt/output/runs/first/checkpoints/step-00000132\n"]
    for log, step in ((SAVED, "52/132"), ([*SAVED[:2], *end], "132/132")):
        _, out, _ = run(cluster(log), "jobs")
        assert [row.split()[-6] for row in out.splitlines()[1:]] == [step] * 3
        found = json.loads(run(cluster(log), "jobs", "--json")[1])["jobs"]
        assert [job["step"] for job in found] == [int(step.partition("/")[0])] * 3


@pytest.fixture(params=["folder", "bucket"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the output of a run `done`, whose journal ends with step 130 of its second attempt."""
    place = (
        str(tmp_path)
        if request.param == "folder"
        else f"s3://{request.getfixturevalue('s3').new_bucket()}/some/prefix"
    )
    folder = RunFolder(open_storage(place).at("runs/done"), "done", None, 1, {})
    folder.write()
    with Spool(folder.spool) as spool:
        spool.log({"train/loss": 0.5}, 131)
        spool.log_start({"attempt": 2, "seconds": 1.0}, 121, {}, None)
        spool.log({"train/loss": 0.4}, 130)
        spool.log({"eval/loss": 0.4}, 120)
    return place


def test_where_the_log_is_gone_the_step_is_that_of_the_run_in_its_storage(run: Run, output: str) -> None:
    def lost(**more: Any) -> Cluster:
        made = cluster(before=lambda call: fail() if call in ("log", "last lines") else None)
        metadata = {**(made.jobs[2].metadata or {}), OUTPUT: output}
        made.jobs[2] = made.jobs[2].model_copy(update={"metadata": metadata, **more})
        older = made.jobs[2].model_copy(update={"submission_id": "raysubmit_0", "start_time": 1})
        return replace(made, jobs=[*made.jobs, older])

    steps = [row.split()[:4] for row in run(lost(), "jobs")[1].splitlines()[1:]]
    # The run has another step than its older job.
    assert [step for *_, step in steps] == ["130", "-", "(exit", "-"]
    code, out, err = run(lost(), "status", "raysubmit_3")
    assert (code, "step       130\n" in out) == (0, True)
    assert err == f"job raysubmit_3 (run done): its log cannot be read, the step is of its run in {output}\n"
    # This job has trained nothing: the run is another job's.
    refused = lost(status=JobStatus.FAILED, driver_exit_code=2)
    assert "its steps are not known" in run(refused, "status", "raysubmit_3")[2]


def test_an_output_in_the_folder_of_a_job_is_not_that_of_this_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is one that another program than `submit` has submitted."""
    folder = RunFolder(open_storage(tmp_path / "output").at("runs/done"), "done", None, 1, {})
    folder.write()
    with Spool(folder.spool) as spool:
        spool.log({"train/loss": 0.5}, 131)
    monkeypatch.chdir(tmp_path)
    for output, step in (("output", None), (str(tmp_path / "output"), 131)):
        made = cluster(before=lambda call: fail() if call in ("log", "last lines") else None)
        metadata = {**(made.jobs[2].metadata or {}), OUTPUT: output}
        made.jobs[2] = made.jobs[2].model_copy(update={"metadata": metadata})
        assert json.loads(run(made, "status", "raysubmit_3", "--json")[1])["step"] == step


def test_logs_of_ended_jobs_that_do_not_come_hold_up_no_list(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "LOGS_SECONDS", 0.1)
    answers = threading.Event()

    def before(call: str) -> None:
        if call in ("log", "last lines"):
            answers.wait(60)

    ended = {"state": "FAILED", "driver_exit_code": 1}
    unnamed = details("raysubmit_2", entrypoint="python -m resnet_dist train x.py --resume", **ended)
    made = Cluster(jobs=[details("raysubmit_1", "first", number=1, **ended), unnamed], before=before)
    code, out, _ = run(made, "jobs")
    answers.set()
    assert code == 0
    assert [row.split()[:6] for row in out.splitlines()[1:]] == [
        [name, job, "FAILED", "(exit", "code", "1)"]
        for name, job in (("first", "raysubmit_1"), ("-", "raysubmit_2"))
    ]
    assert out.splitlines()[1].split()[6] == "-"


def test_jobs_as_json(run: Run) -> None:
    code, out, _ = run(cluster(), "jobs", "--json")
    assert code == 0
    found = json.loads(out)["jobs"]
    assert [(job["state"], job["exit_code"]) for job in found] == [
        ("SUCCEEDED", 0),
        ("RUNNING", None),
        ("FAILED", 1),
    ]
    assert (found[1]["step"], found[1]["total_steps"], found[1]["attempt"]) == (50, 132, None)
    assert found[2]["resume"] == f"{TYPED} --name first"
    assert json.loads(run(Cluster(), "jobs", "--json")[1]) == {"jobs": []}


def test_a_cluster_without_jobs(run: Run) -> None:
    assert run(Cluster(), "jobs") == (0, "", f"the cluster at {ADDRESS} has no job of resnet-dist\n")


@pytest.mark.parametrize(
    ("fields", "code", "state"),
    [
        ({"state": "RUNNING"}, 5, "RUNNING"),
        ({"state": "SUCCEEDED", "driver_exit_code": 0}, 0, "SUCCEEDED"),
        ({"state": "FAILED", "driver_exit_code": 2}, 1, "FAILED (exit code 2)"),
        ({"state": "FAILED", "driver_exit_code": 4}, 4, "FAILED (exit code 4)"),
        ({"state": "STOPPED"}, 130, "STOPPED"),
    ],
)
def test_the_status_of_a_job(run: Run, fields: dict[str, Any], code: int, state: str) -> None:
    log = [*SAVED[:2], "error: the training loss is not finite at step 51\n"]
    made = Cluster(jobs=[details("raysubmit_1", "first", **fields)], log=log)
    given, out, err = run(made, "status", "first")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (given, err, lines["state"], lines["step"]) == (code, "", state, "50/132")
    assert ("error" in lines) == (code in (1, 4))
    assert (lines.get("continue") == f"{TYPED} --name first") == (code in (1, 4, 130))
    given, out, _ = run(made, "status", "raysubmit_1", "--json")
    assert given == code
    assert json.loads(out)["exit_code"] == (None if code == 5 else code)


def test_a_name_of_several_jobs_is_the_newest_and_said(run: Run) -> None:
    _, out, err = run(cluster(), "status", "first")
    assert "raysubmit_2" in out
    assert err == "run first has 2 jobs: this is the newest, raysubmit_2; the others: raysubmit_1\n"


@pytest.mark.parametrize("command", ["logs", "status", "stop"])
def test_a_name_without_a_job_is_a_mistake(run: Run, command: str) -> None:
    made = cluster()
    code, out, err = run(made, command, "frst")
    assert (code, out, made.stopped) == (2, "", False)
    assert err.startswith(
        f"error: frst: the cluster at {ADDRESS} has no job of this run or name; the nearest: first"
    )
    assert err.count("\n") == 1


def test_a_job_whose_name_the_cluster_chose_is_found_by_its_log(run: Run) -> None:
    made = Cluster(jobs=[details("raysubmit_1", entrypoint="sh .resnet-dist/start_job.sh x")], log=SAVED[:2])
    assert run(made, "status", "first")[1].startswith("run        first\njob        raysubmit_1\n")


def test_the_log_so_far_and_to_its_end(run: Run) -> None:
    assert run(cluster(), "logs", "raysubmit_2")[:2] == (0, "".join(SAVED[:2]))
    made = cluster()
    made.jobs[1] = made.jobs[1].model_copy(update={"status": JobStatus.FAILED, "driver_exit_code": 137})
    code, out, err = run(made, "logs", "raysubmit_2", "--follow")
    assert (code, out) == (1, "".join(SAVED[:2]))
    assert "the driver of run first was killed (SIGKILL" in err


def test_an_interrupted_follower_leaves_the_job(run: Run) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    made = cluster(before=after(0, interrupt, "tail"))
    code, _, err = run(made, "logs", "raysubmit_2", "-f")
    assert (code, made.stopped) == (130, False)
    assert err.startswith("interrupted; job raysubmit_2 (run first) is not stopped by this.")
    assert f"\n  resnet-dist logs first --follow --address {ADDRESS}\n" in err


def test_a_stop_waits_and_names_what_is_saved(run: Run) -> None:
    made = cluster(SAVED)
    code, out, err = run(made, "stop", "raysubmit_2")
    assert (code, made.stopped) == (0, True)
    assert err == "stopping job raysubmit_2 (run first): it saves a checkpoint first, for up to 28 s\n"
    assert out == (
        "job raysubmit_2 (run first) is stopped, and saved step 52 in /mnt/output/runs/first/checkpoints/step-00000052; "
        f"this continues it:\n  {TYPED} --name first\n"
    )


def test_a_stop_of_a_job_that_has_ended_or_does_not_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cluster()
    assert run(made, "stop", "done")[:2] == (0, "job raysubmit_3 (run done) has ended already: SUCCEEDED\n")
    assert not made.stopped
    monkeypatch.setattr(stop, "MAX_SECONDS", 0.0)
    code, out, err = run(made, "stop", "raysubmit_2")
    assert (code, out) == (1, "")
    assert "it has not ended 0 s after the request to stop" in err


@pytest.mark.parametrize("words", [["jobs"], ["status", "first"], ["logs", "first"], ["stop", "first"]])
def test_a_cluster_that_does_not_answer_is_one_sentence(run: Run, words: list[str]) -> None:
    code, out, err = run(cluster(before=after(0, fail, "list")), *words)
    assert (code, out) == (6, "")
    assert err == f"error: --address {ADDRESS}: the cluster does not answer (refused)\n"


def test_a_log_that_cannot_be_read_breaks_no_command(run: Run) -> None:
    def lost() -> Cluster:
        made = cluster(before=after(0, fail, "log"))
        made.jobs.append(details("raysubmit_4", entrypoint="sh .resnet-dist/start_job.sh x", number=4))
        return made

    code, out, _ = run(lost(), "jobs")
    assert (code, out.count("raysubmit_")) == (0, 4)
    code, out, err = run(lost(), "status", "raysubmit_2")
    assert (code, "RUNNING" in out) == (5, True)
    assert err == "job raysubmit_2 (run first): its log cannot be read, so its steps are not known\n"
    made = lost()
    code, out, _ = run(made, "stop", "raysubmit_2")
    assert (code, made.stopped) == (0, True)
    assert "is stopped; its log cannot be read, so what it has saved is not known; this continues it:" in out


def test_logs_are_read_for_a_name_only_where_the_metadata_have_none_that_runs(run: Run) -> None:
    unnamed = details("raysubmit_4", entrypoint="sh .resnet-dist/start_job.sh x --resume", number=4)
    reads: list[str] = []
    made = cluster(before=reads.append)
    made.jobs.append(unnamed)
    assert run(made, "stop", "raysubmit_2")[0] == 0
    assert reads.count("log") == 1  # for what was saved
    # The run was resumed without its name, after its first job had failed.
    made = Cluster(
        jobs=[details("raysubmit_1", "first", state="FAILED", driver_exit_code=1), unnamed],
        log=list(SAVED[:2]),
    )
    assert "job raysubmit_4 (run first) is stopped" in run(made, "stop", "first")[1]


@pytest.mark.parametrize("words", [["jobs"], ["logs", "first"], ["status", "first"], ["stop", "first"]])
def test_a_cluster_that_is_away_is_no_mistake(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that asks again and again must tell an outage of the head from a wrong command."""
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(sys, "argv", ["resnet-dist", *words, "--address", address])
    assert run_command() == 6
    assert capsys.readouterr().err.startswith(f"error: --address {address}: nothing listens on ")

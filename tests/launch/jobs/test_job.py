"""A job is found by the name of its run or by its own, also where another version or another program submitted it."""

from __future__ import annotations

import pytest
from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobStatus

from resnet_dist.errors import UserError
from resnet_dist.launch.jobs.ending import status_code
from resnet_dist.launch.jobs.job import OUTPUT, Job, find_job, ours
from tests.launch.jobs.fake import START, details

FOUND = [
    details("raysubmit_1", "first", number=1, state="FAILED"),
    details("raysubmit_3", "first", number=3),
    details("raysubmit_2", "second", number=2, state="STOPPED"),
    details("other", number=4, entrypoint="python train.py"),
    details("raysubmit_0", entrypoint="sh start_job.sh 0.3.0 train recipe.json --output /o --name old"),
    details("rayjob", number=5, entrypoint="resnet-dist train /app/digits.py --name=digits --output /mnt"),
    details("driver", number=6).model_copy(update={"type": JobType.DRIVER, "submission_id": None}),
]


def test_jobs_of_this_package_are_listed_the_newest_first() -> None:
    jobs = ours(FOUND)
    assert [job.id for job in jobs] == ["rayjob", "raysubmit_3", "raysubmit_2", "raysubmit_1", "raysubmit_0"]
    newest = jobs[1]
    assert (newest.run, newest.user, newest.recipe, newest.output) == (
        "first",
        "anna",
        "digits",
        "/mnt/output",
    )
    assert newest.started == START / 1000 + 3
    assert [(job.run, job.output) for job in (jobs[0], jobs[-1])] == [("digits", "/mnt"), ("old", "/o")]


@pytest.mark.parametrize(
    ("name", "job", "note"),
    [
        ("second", "raysubmit_2", ""),
        ("raysubmit_1", "raysubmit_1", ""),
        (
            "first",
            "raysubmit_3",
            "run first has 2 jobs: this is the newest, raysubmit_3; the others: raysubmit_1",
        ),
        ("digits", "rayjob", ""),
    ],
)
def test_a_job_is_found_by_either_name(name: str, job: str, note: str) -> None:
    found, said = find_job(ours(FOUND), name, "http://h:8265")
    assert (found.id, said) == (job, note)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("secnd", "the nearest: second; resnet-dist jobs lists all 5"),
        ("fir", "the nearest: first; "),
        ("raysubmit_4", "the nearest: raysubmit_"),
        ("nothing-like-it", "name; resnet-dist jobs lists all 5"),
        ("other", "resnet-dist jobs lists all 5"),
        ("", "resnet-dist jobs lists all 5"),
    ],
)
def test_a_job_that_is_not_there_is_one_sentence_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UserError) as refused:
        find_job(ours(FOUND), name, "http://h:8265")
    assert near in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="the cluster at http://h:8265 has no job of resnet-dist"):
        find_job([], name, "http://h:8265")


def test_a_job_that_runs_comes_before_a_newer_one_that_has_ended() -> None:
    newer = [details("raysubmit_4", "first", number=4, state="FAILED"), *FOUND]
    found, said = find_job(ours(newer), "first", "http://h:8265")
    assert found.id == "raysubmit_3"
    assert (
        said
        == "run first has 3 jobs: this is the one that runs, raysubmit_3; the others: raysubmit_4, raysubmit_1"
    )


def test_an_output_has_no_secret_wherever_it_comes_from() -> None:
    url = "s3://anna:hush@bucket/o"
    typed = details("raysubmit_1", entrypoint=f"sh start_job.sh train x --output {url}")
    named = details("raysubmit_1", metadata={OUTPUT: url})
    assert [Job.of(job).output for job in (typed, named)] == ["s3://***@bucket/o"] * 2


@pytest.mark.parametrize(
    ("state", "driver", "code"),
    [
        (JobStatus.PENDING, None, 5),
        (JobStatus.RUNNING, None, 5),
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.STOPPED, None, 130),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 2, 1),
        (JobStatus.FAILED, 4, 4),
        (JobStatus.FAILED, 5, 1),
        (JobStatus.FAILED, 130, 130),
        (JobStatus.FAILED, -9, 1),
        (JobStatus.FAILED, 137, 1),
        (JobStatus.FAILED, None, 1),
    ],
)
def test_the_exit_code_of_status(state: JobStatus, driver: int | None, code: int) -> None:
    job = Job.of(details("raysubmit_1", "first", state=state, driver_exit_code=driver))
    assert status_code(job) == code

"""The log of a job is read: its lines are those that the commands print."""

from __future__ import annotations

from resnet_dist.launch.jobs.job import Job
from resnet_dist.launch.jobs.progress import Progress, person_lines, read_progress
from resnet_dist.launch.jobs.stop import describe_stop
from resnet_dist.system.command import resume_advice
from resnet_dist.terminal import PlainReporter
from resnet_dist.tracking.spool import Entry

BEGIN = "preparing digits in /o\nMLflow: http://h:5000/#/experiments/1/runs/abc\nrun first: 132 steps, 2 rank(s)\n"


def step_line(step: int) -> str:
    lines: list[str] = []
    reporter = PlainReporter(lines.append)
    reporter.begin(132)
    reporter.entry(Entry(0, step, {"train/loss": 0.5, "train/top1": 0.5}))
    return f"{lines[0]}\n"


def test_a_run_that_begins_and_goes_on() -> None:
    progress = read_progress(BEGIN)
    assert (progress.run, progress.step, progress.total_steps) == ("first", None, 132)
    assert progress.mlflow == "http://h:5000/#/experiments/1/runs/abc"
    lost = "rank 1 on vm (192.0.2.2) was killed or crashed; attempt 2 resumes from step 40\nresumed at step 40 of 132\n"
    progress = read_progress(BEGIN + step_line(50) + lost)
    assert (progress.step, progress.total_steps, progress.attempt) == (40, 132, 2)
    assert read_progress(BEGIN + lost + step_line(45)).step == 45


def test_the_ends_of_a_run() -> None:
    interrupted = f"interrupted at step 52; {resume_advice('first')}\n"
    progress = read_progress(BEGIN + step_line(50) + interrupted)
    assert (progress.saved_step, progress.continues) == (52, True)
    failed = f"error: rank 1 failed: ValueError: no\ndetails are in /o/runs/first/failures\n{resume_advice('first')}\n"
    progress = read_progress(BEGIN + failed)
    assert (progress.error, progress.continues) == ("rank 1 failed: ValueError: no", True)
    finished = (
        "top-1      98.61% of 360 held-out samples\ncheckpoint /o/runs/first/checkpoints/step-00000132\n"
    )
    assert read_progress(BEGIN + finished).checkpoint == "/o/runs/first/checkpoints/step-00000132"
    assert not read_progress(BEGIN + finished).continues


def test_a_stopped_job_says_what_it_saved_and_where() -> None:
    job = Job("raysubmit_1", "STOPPED", "first", output="/o", command="resnet-dist submit x.py --detach")
    interrupted = read_progress(BEGIN + step_line(50) + "interrupted at step 52; this continues it:\n")
    said = describe_stop(job, interrupted)
    assert "saved step 52 in /o/runs/first/checkpoints/step-00000052" in said
    assert said.endswith("this continues it:\n  resnet-dist submit x.py --detach --name first")
    assert "stopped before its first step" in describe_stop(job, read_progress(BEGIN))
    killed = describe_stop(job, read_progress(BEGIN + step_line(50)))
    assert "is stopped after step 50, but has not saved it" in killed
    assert "its log cannot be read, so what it has saved is not known" in describe_stop(
        job, Progress(is_known=False)
    )


def test_lines_of_ray_are_left_out() -> None:
    ray = "2026-11-28 08:10:19,001\tINFO job_manager.py:568 -- Runtime env is setting up.\n"
    dump = "Job supervisor actor died: The actor died.\n\tclass_name: JobSupervisor\n"
    log = f"{ray}Running entrypoint for job x: sh\na\n{dump}"
    assert person_lines(log, has_dump=True) == "a\n"
    assert person_lines(log, has_dump=False) == f"a\n{dump}"

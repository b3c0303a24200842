"""Commands about submitted jobs: list them, follow one, look at one, stop one."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.options import Dashboard, err, leaves_jobs, on_interrupt, out
from resnet_dist.cli.summary import AsJson, print_json
from resnet_dist.system.redact import redact
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import need_stdout

if TYPE_CHECKING:
    from resnet_dist.launch.jobs.job import Job
    from resnet_dist.launch.jobs.listing import Cluster
    from resnet_dist.launch.jobs.progress import Progress

NOTHING_DONE = "interrupted; nothing was changed"
JobName = Annotated[str, typer.Argument(metavar="NAME", help="The run, or the id of a job.")]
COLUMNS = ("run", "job", "state", "step", "started", "user", "recipe", "output")


@on_interrupt(NOTHING_DONE)
def jobs(address: Dashboard = None, as_json: AsJson = False) -> None:
    """List the submitted jobs of a cluster, the newest first."""
    cluster = _connect(address)
    listed = cluster.jobs()
    # The table needs the newest step alone; a script gets all that whole logs have of jobs that run.
    found = list(zip(listed, cluster.looks(listed, whole=as_json), strict=True))
    need_stdout()
    if as_json:
        print_json({"jobs": [_json(job, progress) for job, progress in found]})
        return
    if not found:
        err.print(f"the cluster at {cluster.address} has no job of resnet-dist")
        return
    rows = [dict(zip(COLUMNS, map(str.upper, COLUMNS), strict=True)), *(_row(*each) for each in found)]
    widths = {column: max(len(row[column]) for row in rows) for column in COLUMNS}
    for row in rows:
        out.print("  ".join(row[column].ljust(widths[column]) for column in COLUMNS).rstrip())


@on_interrupt(NOTHING_DONE)
def logs(
    name: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Until its end; exit with the job's code.")
    ] = False,
    address: Dashboard = None,
) -> None:
    """Print the log of a job. With --follow, Ctrl-C ends this command alone, and the job goes on."""
    cluster = _connect(address)
    job = _find(cluster, name)
    need_stdout()
    if not follow:
        out.print(cluster.log(job), end="")
        return
    from resnet_dist.launch.jobs import follow as following

    with leaves_jobs():
        try:
            code = following.follow(cluster.client, job, lambda text: out.print(text, end=""), err.print)
        except KeyboardInterrupt:
            raise following.left_alone(job, cluster.address) from None
    raise typer.Exit(code)


@on_interrupt(NOTHING_DONE)
def status(name: JobName, address: Dashboard = None, as_json: AsJson = False) -> None:
    """Show a job. Exit codes: 0 finished, 1 failed, 4 finished but not all sent to MLflow, 5 not ended yet, 6 no answer, 130 stopped."""
    cluster = _connect(address)
    job = _find(cluster, name)
    from resnet_dist.launch.jobs.ending import status_code

    progress = cluster.progress(job)
    if not progress.is_known:
        progress = cluster.of_storage(job)
        steps = (
            "so its steps are not known"
            if progress.step is None
            else f"the step is of its run in {job.output}"
        )
        err.print(f"{job.title}: its log cannot be read, {steps}")
    need_stdout()
    if as_json:
        print_json(_json(job, progress))
    else:
        for title, text in _lines(job, progress, cluster.address).items():
            out.print(f"{title:<10} {text}")
    raise typer.Exit(status_code(job))


@on_interrupt("interrupted; the job may have been asked to stop: resnet-dist status shows it")
def stop(name: JobName, address: Dashboard = None) -> None:
    """Stop a job: its ranks save a checkpoint first. Wait for its end, and print the line that resumes."""
    cluster = _connect(address)
    job = _find(cluster, name)
    from resnet_dist.launch.jobs.stop import describe_stop, stop_job

    if job.has_ended:
        out.print(f"{job.title} has ended already: {_state(job)}")
        return
    with leaves_jobs():
        ended = stop_job(cluster.client, job, err.print)
    if ended.state == "STOPPED":
        out.print(describe_stop(ended, cluster.progress(ended)))
    else:
        out.print(f"{ended.title} has ended by itself meanwhile: {_state(ended)}")


def _connect(address: str | None) -> Cluster:
    """Connect to a cluster. An exception must not interrupt the imports, as in `train`."""
    from resnet_dist.launch.ray_cluster.check import ClusterAway, find_dashboard

    try:
        dashboard = find_dashboard(address, lambda text: None)
    except ClusterAway as error:
        from resnet_dist.launch.jobs.client import NoAnswer  # Here, because it imports Ray.

        raise NoAnswer(str(error)) from None
    with handle_signals(exit_with_message(NOTHING_DONE)):
        from resnet_dist.launch.jobs.listing import Cluster
    return Cluster.at(dashboard)


def _find(cluster: Cluster, name: str) -> Job:
    job, note = cluster.find(name)
    if note:
        err.print(note)
    return job


def _row(job: Job, progress: Progress | None) -> dict[str, str]:
    values = {
        "run": job.run,
        "job": job.id,
        "state": _state(job),
        "step": "" if progress is None else _step(progress),
        "started": _time(job.started),
        "user": job.user,
        "recipe": job.recipe,
        "output": job.output,
    }
    return {column: values[column] or "-" for column in COLUMNS}


def _lines(job: Job, progress: Progress, address: str) -> Mapping[str, str]:
    """Return what a person reads of a job, by title, without what is not known."""
    from resnet_dist.launch.jobs.advice import command, resume_line
    from resnet_dist.launch.jobs.ending import ending

    lines = {
        "run": job.run,
        "job": job.id,
        "state": _state(job),
        "started": f"{_time(job.started)}{f' by {job.user}' if job.user else ''}",
        "ended": "" if job.ended is None else _time(job.ended),
        "recipe": f"{job.recipe}{f' ({job.source})' if job.source else ''}",
        "output": job.output,
        "step": _step(progress),
        "checkpoint": progress.checkpoint,
        "MLflow": progress.mlflow,
        "error": progress.error or ending(job, "", address).partition(";")[0]
        if job.state == "FAILED"
        else "",
        "log": command("logs", job.name, *(() if job.has_ended else ("--follow",)), address=address),
        "continue": resume_line(job) if job.state in ("FAILED", "STOPPED") else "",
    }
    return {title: text for title, text in lines.items() if text}


def _json(job: Job, progress: Progress | None) -> dict[str, Any]:
    """Return what a script reads of a job; null for what is not known."""
    from resnet_dist.launch.jobs.advice import resume_line
    from resnet_dist.launch.jobs.ending import status_code

    value: dict[str, Any] = {
        "run": job.run,
        "job": job.id,
        "state": job.state,
        "exit_code": status_code(job) if job.has_ended else None,
        "driver_exit_code": job.driver_exit_code,
        "user": job.user,
        "recipe": job.recipe,
        "source": job.source,
        "output": job.output,
        "started": _iso(job.started),
        "ended": _iso(job.ended),
        "resume": resume_line(job),
    }
    if progress is not None:
        value |= {
            "step": progress.step,
            "total_steps": progress.total_steps,
            "attempt": progress.attempt,
            "mlflow": progress.mlflow,
            "checkpoint": progress.checkpoint,
            "error": progress.error,
        }
    return {
        key: redact(text)
        if isinstance(text, str) and text
        else text or (0 if text == 0 and text != "" else None)
        for key, text in value.items()
    }


def _state(job: Job) -> str:
    code = job.driver_exit_code
    return f"{job.state} (exit code {code})" if code and job.state == "FAILED" else job.state


def _step(progress: Progress) -> str:
    if progress.step is None:
        return ""
    attempt = f", attempt {progress.attempt}" if progress.attempt else ""
    total = "" if progress.total_steps is None else f"/{progress.total_steps}"
    return f"{progress.step}{total}{attempt}"


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")

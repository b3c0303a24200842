"""Consoles, options, defaults and messages that several commands share."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import typer

from resnet_dist.config import DEFAULT_WORKERS, Data, ProfiledSteps, WorkerRange
from resnet_dist.errors import INTERRUPTED_EXIT_CODE, UserError
from resnet_dist.runs.storage.open import is_url
from resnet_dist.system.command import DEFAULT_OUTPUT as DEFAULT_OUTPUT
from resnet_dist.system.command import is_main_process
from resnet_dist.system.files import expanded
from resnet_dist.system.redact import redact
from resnet_dist.system.streams import divert
from resnet_dist.terminal import PersonConsole
from resnet_dist.tracking.registration import FLAG, Registration


def drop_impossible_sizes() -> None:
    """Drop COLUMNS and LINES that no terminal has, such as 0: rich and typer would print nothing on them."""
    for name in ("COLUMNS", "LINES"):
        if not os.environ.get(name, "1").strip("0").isdecimal():
            del os.environ[name]


drop_impossible_sizes()  # Consoles read them when they are made.
out = PersonConsole()
err = PersonConsole(stderr=True, above=out)


def parse_workers(text: str) -> WorkerRange:
    try:
        return WorkerRange.parse(text)
    except UserError as error:  # Typer would print nothing of a ValueError but the value.
        raise typer.BadParameter(str(error)) from None


Output = Annotated[Path, typer.Option(help="Where data, runs and the MLflow store go.")]


def typed_place(text: str) -> str:
    """Return the value of an --output that may be a URL, with the home folder in place of `~`: a shell leaves it after `=`.

    Raises UserError for a URL with one slash, which as a path would be a folder such as `./s3:`.
    """
    if is_url(text):
        return text
    if _LIKE_A_URL.match(text) and not text.startswith("file:"):
        raise UserError(f"--output {redact(text)!r}: a URL has two slashes, as s3://BUCKET/PREFIX")
    return str(local_folder(text, "--output"))


RunOutput = Annotated[
    str,
    typer.Option(
        metavar="FOLDER|URL",
        callback=typed_place,
        help="Where data and runs go: a folder, or a URL such as s3://BUCKET/PREFIX.",
    ),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one field.")]
Workers = Annotated[
    WorkerRange | None,
    typer.Option(
        metavar="N|MIN:MAX",
        parser=parse_workers,
        help=f"DDP ranks, or a range to follow the cluster's size; default: {DEFAULT_WORKERS}.",
    ),
]
RayWorkers = Annotated[
    int | None, typer.Option(min=1, help="Workers on Ray; default: this process, or 2 with --address.")
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0, help="Restarts of ranks that were lost, within an hour; preemptions are not counted."
    ),
]
Wait = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="SECONDS",
        help="Wait so long for nodes; default: 0 at the start, 600 after a loss.",
    ),
]
AllowCommands = Annotated[bool, typer.Option("--allow-commands", help="Run shards named pipe:… in a shell.")]
Gpu = Annotated[bool | None, typer.Option("--gpu/--cpu", help="Default: GPUs if there are any.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; default: one here.")]
Dashboard = Annotated[
    str | None,
    typer.Option(
        help="The cluster's dashboard, such as http://127.0.0.1:8265; default: RAY_API_SERVER_ADDRESS."
    ),
]
Register = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[@ALIAS]",
        help="Register the model in MLflow, once it has loaded in a process of its own.",
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the run; an existing run is continued.")]


def parse_profile(text: str) -> ProfiledSteps:
    try:
        return ProfiledSteps.parse(text)
    except UserError as error:  # As above.
        raise typer.BadParameter(str(error)) from None


Profile = Annotated[
    ProfiledSteps | None,
    typer.Option(
        metavar="START:STOP",
        parser=parse_profile,
        help="Write a trace of what these steps do on rank 0 beside the run, and log it in MLflow.",
    ),
]
AlsoTo = Annotated[
    list[str] | None,
    typer.Option(
        "--also", metavar="NAME", help="Send the metrics there too: tensorboard, in the run folder."
    ),
]
BeginFrom = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN[@STEP]",
        help="Begin a new run with a checkpoint of another one, at its step; default: its newest.",
    ),
]

DEFAULT_SHARD_CACHE = Path(Data.model_fields["shard_cache"].default)
SHARD_CACHE_BYTES: int = Data.model_fields["shard_cache_bytes"].default
FETCH_TIMEOUT_SECONDS: float = Data.model_fields["fetch_timeout_seconds"].default
RESUMES = "interrupted; the same command resumes with what is not done yet"
STARTS_OVER = "interrupted; the same command starts over"


_LIKE_A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:{1,2}(/|[a-z0-9]+:)|pipe:|.*://")


def local_folder(text: str, name: str) -> Path:
    """Return a folder on this machine from its path or `file://` URL. name: of the argument, for messages.

    Raises UserError where it is a URL of anything else: as a path it would be a folder such as `./s3:`.
    """
    if text.startswith("file:"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise UserError(f"{name} {text!r}: a file:// URL must have three slashes and a whole path")
        return Path(unquote(parts.path, errors="surrogateescape"))
    if _LIKE_A_URL.match(text):
        raise UserError(
            f"{name} {redact(text)!r} is a URL: this command writes to a folder on this machine; give a path, and copy "
            "what it holds afterwards"
        )
    return expanded(text)


def diverted(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command as one whose libraries write to a log, not to the person. It begins after `--help`."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        divert()
        command(*arguments, **options)

    return run


@contextmanager
def on_interrupt(message: str) -> Iterator[None]:
    """Print `message` and exit with 130 on an interruption. A context manager, and a decorator of commands."""
    try:
        yield
    except KeyboardInterrupt:  # Typer would exit with 130 and print nothing.
        if is_main_process():
            err.print(message)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None


def registration_of(text: str | None) -> Registration | None:
    """Return the value of --register. Raises UserError where it is no name, and where MLflow is missing."""
    if text is None:
        return None
    from resnet_dist.tracking.open import has_mlflow

    found = Registration.parse(text)
    if not has_mlflow():
        raise UserError(f"{FLAG} {text}: MLflow, which keeps registered models, is not installed")
    return found


@contextmanager
def leaves_jobs() -> Iterator[None]:
    """Where a command ends and leaves its job, print why and the next lines, and exit with the code for it."""
    from resnet_dist.launch.jobs.advice import JobLeft  # Here, because most commands have no job.

    try:
        yield
    except JobLeft as left:
        err.print(str(left))
        raise typer.Exit(left.exit_code) from None


def use_gpu(requested: bool | None) -> bool:
    """Return whether to use this machine's GPUs; None: if there are any.

    Raises UserError where GPUs are requested and there are none.
    """
    import torch  # Here, because its import takes seconds.

    available = torch.cuda.is_available()
    if requested and not available:
        raise UserError("--gpu: this machine has no CUDA device that torch can use; use --cpu")
    return available if requested is None else requested

"""Commands about the runs of an output folder."""

from __future__ import annotations

from typing import Annotated

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.options import DEFAULT_OUTPUT, RESUMES, RunOutput, on_interrupt, out
from resnet_dist.system.signals import handle_signals


@on_interrupt(RESUMES)
def sync(
    name: Annotated[
        str | None, typer.Argument(help="A run or a study; default: all of the output folder.")
    ] = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Send what MLflow did not get of a run or a study, and close what a driver that died left open there."""
    # The same as in `train`: an exception must not interrupt the imports.
    with handle_signals(exit_with_message(RESUMES)):
        from resnet_dist.runs.storage.open import resolved
        from resnet_dist.tracking.sync import sync_runs

    if not sync_runs(resolved(output), name, out.print):
        raise typer.Exit(1)

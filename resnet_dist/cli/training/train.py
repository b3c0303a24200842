"""The command that trains one recipe."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from resnet_dist.cli.main import check_machine, check_single_start, exit_with_message
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    Address,
    AlsoTo,
    BeginFrom,
    Gpu,
    MaxRestarts,
    Name,
    Overrides,
    Profile,
    Register,
    RunOutput,
    Wait,
    Workers,
    err,
    on_interrupt,
    out,
    registration_of,
)
from resnet_dist.cli.training.ending import NOTHING_SAVED, browse_line, exit_where_left, short_path
from resnet_dist.config import DEFAULT_MAX_RESTARTS, Recipe, load_recipe
from resnet_dist.errors import INTERRUPTED_EXIT_CODE
from resnet_dist.system.command import resume_advice, started_by_torchrun
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import shown
from resnet_dist.terminal import make_reporter
from resnet_dist.tracking.also.choose import check_also
from resnet_dist.tracking.origin import changes_text
from resnet_dist.tracking.store import check_tracking_uri, store_folder

if TYPE_CHECKING:
    from resnet_dist.driver.request import Summary
    from resnet_dist.launch.torchrun import TorchrunRanks


@on_interrupt(NOTHING_SAVED)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.py")],
    overrides: Overrides = None,
    workers: Workers = None,
    gpu: Gpu = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
    address: Address = None,
    name: Name = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest run of this recipe.")] = False,
    begin_from: BeginFrom = None,
    register: Register = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
    max_restarts: MaxRestarts = DEFAULT_MAX_RESTARTS,
    wait: Wait = None,
    also: AlsoTo = None,
    profile: Profile = None,
) -> None:
    """Train a recipe, or continue its run."""
    check_single_start(address)
    registration = registration_of(register)
    check_machine(
        local=local, address=address, workers=None if workers is None else workers.preferred, gpu=gpu
    )
    others = check_also(also or ())
    loaded = None if started_by_torchrun() else load(recipe, overrides)
    if not local and not started_by_torchrun():
        _begin_on_ray(address)
    # Exit at once: an exception during numpy's or torch's import would leave them half imported.
    with handle_signals(exit_with_message(NOTHING_SAVED)):
        from resnet_dist.driver.output import check_place
        from resnet_dist.driver.request import Interrupted, Request
        from resnet_dist.driver.run import run_training
        from resnet_dist.runs.storage.open import resolved
        from resnet_dist.tracking.abandoned import closing_abandoned
        from resnet_dist.tracking.also.fan_out import with_others
        from resnet_dist.tracking.open import check_tracker, open_publisher

        ranks = _torchrun_ranks()
    if ranks is not None and ranks.rank > 0:
        raise typer.Exit(ranks.follow())
    try:
        with ranks or nullcontext(), make_reporter(out) as reporter:
            # Under torchrun the recipe is loaded here, so that a mistake in it ends the other ranks too.
            value, changes = loaded or load(recipe, overrides)
            place = resolved(output)
            check_place(place)
            check_tracker(store_folder(place), value.experiment or value.name)
            flags = (workers, gpu, local, address, name, resume, begin_from, ranks)
            wanted = (max_restarts, wait, others, profile, str(registration or ""))
            request = Request(value, str(recipe), place, *flags, {}, *wanted, changes)
            summary = run_training(request, reporter, with_others(closing_abandoned(open_publisher)))
    except Interrupted as interrupted:
        where = f" at step {interrupted.step}" if interrupted.step is not None else ""
        err.print(f"interrupted{where}; {resume_advice(interrupted.run.name)}")
        raise typer.Exit(interrupted.exit_code) from None
    except KeyboardInterrupt:
        err.print(NOTHING_SAVED)
        raise typer.Exit(INTERRUPTED_EXIT_CODE) from None
    _print_summary(summary, place, value.experiment or value.name)
    exit_where_left(summary.not_evaluated, [summary.run])


def load(recipe: Path, overrides: list[str] | None) -> tuple[Recipe, str]:
    """Read a recipe file; return the recipe, and what the overrides change of its file.

    What the file prints is shown: it is the person's own code.
    """
    with shown():
        of_file = load_recipe(recipe)
    value = of_file.with_overrides(overrides or ())
    return value, changes_text(value, of_file)


def _begin_on_ray(address: str | None) -> None:
    """Find the cluster, before the large imports and before data is prepared: a wrong address is found in seconds.

    Without a cluster, a process begins to import beside this one, for the ranks.
    """
    check_tracking_uri()
    from resnet_dist.launch.preload.client import import_ahead
    from resnet_dist.launch.ray_cluster.check import find_cluster

    if find_cluster(address) is None:
        import_ahead()


def _torchrun_ranks() -> TorchrunRanks | None:
    """Return the ranks that torchrun has started; None without torchrun."""
    if not started_by_torchrun():
        return None
    from resnet_dist.launch.torchrun import TorchrunRanks

    return TorchrunRanks()


def _print_summary(summary: Summary, output: str, experiment: str) -> None:
    metrics = summary.outcome.metrics
    top1 = "not evaluated"  # where the evaluations beside training have failed
    if "eval/top1" in metrics:
        top1 = f"{metrics['eval/top1']:.2%} of {metrics['eval/samples']:.0f} held-out samples"
    out.print(
        f"top-1      {top1}\n"
        f"speed      {metrics['perf/images_per_second']:,.0f} images/s, {summary.seconds:.0f} s in all\n"
        f"checkpoint {short_path(summary.checkpoint)}{browse_line(store_folder(output), experiment)}"
    )

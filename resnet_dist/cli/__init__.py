"""The command line. Each command parses its arguments, calls one function, and prints the result.

options    options, defaults and messages that several commands share
main       run a command, print the error that ended it, exit with its code
training   train, study, sweep
submit     submit
submitted  jobs, logs, status, stop
data       prepare
indexing   index
summary    the end of both: one table of what was used, left out and passed over, or its JSON
models     evaluate, predict, explain, export, serve
runs       runs (show, best, compare), ui, sync
bench      bench loader, bench step, bench launch, bench scale

Exit codes: 0 success, 2 a mistake in a recipe or flag (nothing was started), 3 done, but something was left out, 4
trained, but MLflow did not get everything, 5 (of `status`) not ended yet, 6 a cluster or tracker does not answer, 130
interrupted, 1 any other error.
torch, Ray, MLflow and NumPy are imported inside the commands, because `--help` must not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from resnet_dist.cli.bench import bench_launch, bench_loader, bench_scale, bench_step
from resnet_dist.cli.data import prepare
from resnet_dist.cli.indexing import index
from resnet_dist.cli.main import HELP_OPTIONS, begin, main
from resnet_dist.cli.models.evaluate import evaluate
from resnet_dist.cli.models.explain import explain
from resnet_dist.cli.models.export import export
from resnet_dist.cli.models.predict import predict
from resnet_dist.cli.models.serve import serve
from resnet_dist.cli.options import diverted
from resnet_dist.cli.runs import runs, sync, ui
from resnet_dist.cli.submit import submit
from resnet_dist.cli.submitted import jobs, logs, status, stop
from resnet_dist.cli.training.study import study
from resnet_dist.cli.training.sweep import sweep
from resnet_dist.cli.training.train import train

__all__ = ["app", "main"]

app = typer.Typer(
    help="Distributed training of residual networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": sorted(HELP_OPTIONS)},
)
app.callback()(begin)
for command in (
    prepare,
    index,
    train,
    study,
    sweep,
    submit,
    jobs,
    logs,
    status,
    stop,
    sync,
    evaluate,
    predict,
    export,
    explain,
    serve,
    ui,
):
    app.command()(diverted(command))
app.add_typer(runs, name="runs")
bench = typer.Typer(help="Measure parts of the package on this machine.", no_args_is_help=True)
BENCHES: dict[str, Callable[..., None]] = {
    "loader": bench_loader,
    "step": bench_step,
    "launch": bench_launch,
    "scale": bench_scale,
}
for name, bench_command in BENCHES.items():
    bench.command(name)(diverted(bench_command))
app.add_typer(bench, name="bench")

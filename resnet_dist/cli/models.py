"""Commands that evaluate a trained model, and serve it over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    STARTS_OVER,
    AllowCommands,
    Gpu,
    RunOutput,
    err,
    on_interrupt,
    out,
    use_gpu,
)
from resnet_dist.cli.predictions import Model
from resnet_dist.errors import UserError
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import need_stdout

SERVED_NOTHING = "interrupted before the server answered"


@on_interrupt(STARTS_OVER)
def evaluate(
    model: Model,
    shards: Annotated[str, typer.Argument(help="A folder with an index.json.")],
    allow_commands: AllowCommands = False,
    gpu: Gpu = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Measure top-1, top-5 and loss of a trained model, with every sample counted once."""
    need_stdout()
    # The same as in `train`: an exception must not interrupt the imports.
    with handle_signals(exit_with_message(STARTS_OVER)):
        from resnet_dist.data.batches.bad_samples import check_bad_fraction
        from resnet_dist.data.shards.index import check_shards, read_index
        from resnet_dist.data.shards.labels import class_difference
        from resnet_dist.predict.find import find_model
        from resnet_dist.train.checkpoint.load import load_model
        from resnet_dist.train.evaluate import evaluate as evaluate_model
        from resnet_dist.train.evaluate import evaluation_loader
        from resnet_dist.train.watch.guards import MAX_LISTED
        from resnet_dist.world import World

    index = read_index(shards)
    check_shards(index)
    world = World.single(gpu=use_gpu(gpu))
    trained = load_model(find_model(model, output), world.device, allow_commands=allow_commands)
    if difference := class_difference(index.classes, trained.classes):
        raise UserError(
            f"{index.location} has other classes than the model was trained on: {difference}; index the shards with "
            "--classes and the index of the training set"
        )
    data, bad = trained.recipe.data, list[str]()

    def report_bad(texts: list[str]) -> None:
        bad.extend(texts)
        for text in texts[:MAX_LISTED]:
            err.print(f"bad sample {text}")
        if len(texts) > MAX_LISTED:
            err.print(
                f"and {len(texts) - MAX_LISTED:,} more; `resnet-dist index {shards} --verify` lists all"
            )

    with evaluation_loader(index, data, world) as loader:
        metrics = evaluate_model(trained.model, loader, world, report_bad=report_bad)
    check_bad_fraction(index.location, bad, index.num_samples, data.max_bad_fraction)
    for key, value in metrics.items():
        out.print(f"{key:<13} {value:.6g}")
    if bad:
        err.print(f"{len(bad):,} of {index.num_samples:,} samples are bad and not counted in the metrics")


@on_interrupt(SERVED_NOTHING)
def serve(
    model: Model,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: 5001, or a free one where it is in use.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    top: Annotated[int, typer.Option(min=1, metavar="K", help="Classes of each image, the best first.")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with the model.")] = 1,
    gpu: Gpu = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Serve a model over HTTP: POST the bytes of images to /predict, or drop them onto the page at /.

    MLflow's own routes are there too: /invocations, /ping, /health, /version.
    """
    # The same as in `train`: an exception must not interrupt the imports.
    with handle_signals(exit_with_message(SERVED_NOTHING)):
        import torch

        from resnet_dist.predict.find import find_model
        from resnet_dist.serve.run import open_port
        from resnet_dist.serve.run import serve as serve_model
        from resnet_dist.train.checkpoint.load import load_model

    on_gpu = use_gpu(gpu)
    with open_port(host, port, out.print) as socket:
        trained = load_model(find_model(model, output), torch.device("cpu"))
        name = f"{trained.recipe.name}: {trained.recipe.model.name}"
        serve_model(trained, name, socket, out.print, top_k=top, workers=workers, gpu=on_gpu)

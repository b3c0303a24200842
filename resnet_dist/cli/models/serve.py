"""The command that serves a model over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.models.predict import Model
from resnet_dist.cli.options import DEFAULT_OUTPUT, Gpu, RunOutput, on_interrupt, out, use_gpu
from resnet_dist.system.signals import handle_signals

SERVED_NOTHING = "interrupted before the server answered"


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

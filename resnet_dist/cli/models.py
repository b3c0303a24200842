"""Commands that use a trained model: evaluate it, export it, serve it over HTTP, explain what it sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    STARTS_OVER,
    AllowCommands,
    Gpu,
    Register,
    RunOutput,
    err,
    on_interrupt,
    out,
    registration_of,
    use_gpu,
)
from resnet_dist.cli.predictions import Model, report_findings
from resnet_dist.cli.summary import AllowLeftOut, exit_where_left_out
from resnet_dist.data.findings import Findings, one_line
from resnet_dist.errors import UserError
from resnet_dist.system.signals import handle_signals
from resnet_dist.system.streams import need_stdout

if TYPE_CHECKING:
    from resnet_dist.tracking.mlflow.registry import Candidate
    from resnet_dist.tracking.registration import Registration

SERVED_NOTHING = "interrupted before the server answered"


@on_interrupt(STARTS_OVER)
def evaluate(
    model: Model,
    shards: Annotated[str, typer.Argument(help="A folder with an index.json.")],
    register: Register = None,
    allow_commands: AllowCommands = False,
    gpu: Gpu = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Measure top-1, top-5 and loss of a trained model, with every sample counted once."""
    need_stdout()
    registration = registration_of(register)
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
    candidate = candidate_of(model, output, registration, trained.step)
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
    if candidate is not None:
        out.print(f"registered as {candidate.register()}")


@on_interrupt(STARTS_OVER)
def export(
    model: Model,
    out_file: Annotated[Path, typer.Argument(metavar="OUT", help="A new file; its end names the format.")],
    format_name: Annotated[
        Literal["safetensors", "onnx", "pt2", "torchvision"] | None,
        typer.Option(
            "--format", help="Default: by the end of OUT: .safetensors, .onnx, .pt2, .pth (torchvision)."
        ),
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="onnx, pt2: take uint8 pixels, which the graph normalizes.")
    ] = False,
    samples: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Images to compare with; default: the held-out set, 1,024 at most."
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of a logit.")] = 1e-4,
    register: Register = None,
    allow_left_out: AllowLeftOut = False,
    allow_commands: AllowCommands = False,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Write a model as a file for other programs, after comparing its logits with the source's on real images.

    --register registers the model that was exported, in MLflow's own format. Exit code 3: the file is written, but some of
    the images could not be compared.
    """
    registration = registration_of(register)
    # The same as in `train`: an exception must not interrupt the imports.
    with handle_signals(exit_with_message(STARTS_OVER)):
        import torch

        from resnet_dist.export.run import export as export_model
        from resnet_dist.export.run import format_of_file
        from resnet_dist.export.samples import samples_of
        from resnet_dist.predict.find import find_model
        from resnet_dist.train.checkpoint.load import load_model

    form = format_of_file(out_file, format_name, pixels=pixels)
    trained = load_model(find_model(model, output), torch.device("cpu"), allow_commands=allow_commands)
    candidate = candidate_of(model, output, registration, trained.step)
    findings = Findings()
    images, name = samples_of(trained, samples, findings)
    found = export_model(trained, out_file, form, images, findings, tolerance, pixels=pixels)
    out.print(f"{out_file}: {found} ({name})")
    if candidate is not None:
        out.print(f"registered as {candidate.register()}")
    report_findings(findings, bad_images=True)
    exit_where_left_out(findings, allow_left_out=allow_left_out, has_strict=False)


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


@on_interrupt(STARTS_OVER)
def explain(
    model: Model,
    images: Annotated[list[str], typer.Argument(help="Images, folders, patterns.")],
    to: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The picture of a single image; a new PNG.")
    ] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="Default: the most probable class.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="K", help="Classes beside the image.")] = 5,
    allow_left_out: AllowLeftOut = False,
    gpu: Gpu = None,
    output: RunOutput = str(DEFAULT_OUTPUT),
) -> None:
    """Draw where in an image the evidence for a class is: a picture beside each image, IMAGE.explained.png.

    Exit code 3: some images could not be decoded.
    """
    # The same as in `train`: an exception must not interrupt the imports.
    with handle_signals(exit_with_message(STARTS_OVER)):
        from resnet_dist.explain.run import class_number, pictures_of
        from resnet_dist.explain.run import explain as explain_images
        from resnet_dist.predict.find import find_model
        from resnet_dist.predict.inputs import inputs_of
        from resnet_dist.train.checkpoint.load import load_model
        from resnet_dist.world import World

    device, findings = World.single(gpu=use_gpu(gpu)).device, Findings()
    trained = load_model(find_model(model, output), device)
    label = class_number(trained, class_name)
    pictures = pictures_of(inputs_of(images, trained.recipe.data, findings), to, findings)
    for found in explain_images(trained, pictures, label, device, top, findings):
        out.print(f"{one_line(str(found.picture))}: {one_line(found.shown)}, {found.share:.1%}")
    report_findings(findings, bad_images=True)
    exit_where_left_out(findings, allow_left_out=allow_left_out, has_strict=False)


def candidate_of(
    model: str, output: str, registration: Registration | None, step: int | None = None
) -> Candidate | None:
    """Return the model that --register names, once the command has done its work; None without it.

    step: of the model that the command works with. Raises UserError where MLflow does not have that model.
    """
    if registration is None:
        return None
    from resnet_dist.runs.storage.open import resolved
    from resnet_dist.tracking.locate import run_id_of
    from resnet_dist.tracking.mlflow.registry import Candidate
    from resnet_dist.tracking.open import check_tracker
    from resnet_dist.tracking.store import store_folder

    place = resolved(output)
    check_tracker(store_folder(place), "")
    # Another output may have a run of the same name in the same tracker.
    candidate = Candidate.find(run_id_of(model, place) or model, store_folder(place), registration)
    if step is not None:
        candidate.check_step(step)
    return candidate

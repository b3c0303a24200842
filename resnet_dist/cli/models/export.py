"""The command that writes a model as a file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.models.predict import Model, report_findings
from resnet_dist.cli.models.register import candidate_of
from resnet_dist.cli.options import (
    DEFAULT_OUTPUT,
    STARTS_OVER,
    AllowCommands,
    Register,
    RunOutput,
    on_interrupt,
    out,
    registration_of,
)
from resnet_dist.cli.summary import AllowLeftOut, exit_where_left_out
from resnet_dist.data.findings import Findings
from resnet_dist.system.signals import handle_signals

Pixels = Annotated[
    bool, typer.Option("--pixels", help="onnx, pt2: take uint8 pixels, which the graph normalizes.")
]
Quantize = Annotated[
    Literal["int8"] | None,
    typer.Option(help="onnx: 8-bit integers; accuracy before and after is measured on labelled shards."),
]
MaxDrop = Annotated[
    float, typer.Option(min=0, max=1, help="With --quantize: largest drop of top-1, a share.")
]


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
    pixels: Pixels = False,
    samples: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Images to compare with; default: the held-out set, 1,024 at most."
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest difference of a logit.")] = 1e-4,
    quantize: Quantize = None,
    max_drop: MaxDrop = 0.01,
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

        from resnet_dist.export.quantize import check_quantize, export_int8, labelled_sets
        from resnet_dist.export.run import export as export_model
        from resnet_dist.export.run import format_of_file
        from resnet_dist.export.samples import samples_of
        from resnet_dist.predict.find import find_model
        from resnet_dist.train.checkpoint.load import load_model

    form = format_of_file(out_file, format_name, pixels=pixels)
    if quantize:
        check_quantize(form)
    trained = load_model(find_model(model, output), torch.device("cpu"), allow_commands=allow_commands)
    candidate = candidate_of(model, output, registration, trained.step)
    findings = Findings()
    if quantize:
        sets = labelled_sets(trained, samples)
        found = str(export_int8(trained, out_file, sets, findings, max_drop, pixels=pixels))
    else:
        images, name = samples_of(trained, samples, findings)
        made = export_model(trained, out_file, form, images, findings, tolerance, pixels=pixels)
        found = f"{made} ({name})"
    out.print(f"{out_file}: {found}")
    report_findings(findings, bad_images=True)
    if candidate is not None:  # Last: whatever it raises, the left-out images are reported.
        out.print(f"registered as {candidate.register()}")
    exit_where_left_out(findings, allow_left_out=allow_left_out, has_strict=False)

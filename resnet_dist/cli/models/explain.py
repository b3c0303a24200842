"""The command that shows what a model sees in an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resnet_dist.cli.main import exit_with_message
from resnet_dist.cli.models.predict import Model, report_findings
from resnet_dist.cli.options import DEFAULT_OUTPUT, STARTS_OVER, Gpu, RunOutput, on_interrupt, out, use_gpu
from resnet_dist.cli.summary import AllowLeftOut, exit_where_left_out
from resnet_dist.data.findings import Findings, one_line
from resnet_dist.system.signals import handle_signals


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

"""Explain images: a picture for each, beside it, of where the evidence for a class lies."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from resnet_dist.data.findings import BAD_IMAGE, Findings, one_line
from resnet_dist.data.images.augment import normalize
from resnet_dist.errors import StorageError, UserError
from resnet_dist.explain.grad_cam import averaged_grad_cam
from resnet_dist.figures.explained import draw_explained
from resnet_dist.model import Variant, variants
from resnet_dist.predict.classify import decoded_batches
from resnet_dist.predict.unread import Input
from resnet_dist.system.files import write_bytes_atomically
from resnet_dist.train.checkpoint.load import TrainedModel
from resnet_dist.train.evaluate import logits_of

SUFFIX = ".explained.png"
PASSED_OVER = "a picture of an earlier explanation"


@dataclass(frozen=True)
class Explained:
    """A picture that was written, and the classes of its image, the best first."""

    name: str  # of the image
    picture: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    shown: str  # the class whose evidence the picture shows
    share: float  # its probability


def class_number(trained: TrainedModel, name: str | None) -> int | None:
    """Return the number of a class; None for None. Raises UserError where the model has no such class."""
    if name is None:
        return None
    if name in trained.classes:
        return trained.classes.index(name)
    near = difflib.get_close_matches(name, trained.classes, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(trained.classes[:5])}"
    more = ", …" if not near and len(trained.classes) > 5 else ""
    raise UserError(f"--class {name!r}: the model has no such class; {one_line(hint)}{more}")


def pictures_of(inputs: Iterable[Input], out: Path | None, findings: Findings) -> list[tuple[Input, Path]]:
    """Return each image with the place of its picture: beside it, or `out`.

    Pictures of an earlier explanation are passed over. Raises UserError where a picture has no place, or would replace
    something, and where there is no image.
    """
    found: list[tuple[Input, Path]] = []
    for given in inputs:
        if given.name.endswith(SUFFIX):
            findings.pass_over(given.name, PASSED_OVER)
        else:
            found.append((given, out if out is not None else _beside(given)))
    if not found:
        raise UserError("no images in what the paths name")
    if out is not None:
        _check_out(out, len(found))
    return found


def _beside(given: Input) -> Path:
    if given.path is None:
        raise UserError(
            f"{given.name}: is no file on this machine; --out FILE names the picture of one such image"
        )
    return given.path.with_name(given.path.name + SUFFIX)


def _check_out(out: Path, num_images: int) -> None:
    if num_images > 1:
        raise UserError(
            f"--out {out}: one picture for {num_images:,} images; leave it out, and each gets NAME{SUFFIX} beside it"
        )
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture is a PNG; give a name that ends with .png")
    if out.exists():
        raise UserError(f"--out {out}: exists already; give another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: no such folder {out.absolute().parent}")


def explain(
    trained: TrainedModel,
    images: Sequence[tuple[Input, Path]],
    label: int | None,
    device: torch.device,
    top_k: int,
    findings: Findings,
) -> Iterator[Explained]:
    """Write a picture for each image and yield it. label: of the class to explain; None: the most probable one.

    findings: gets the images that cannot be decoded. Raises StorageError where a picture cannot be written.
    """
    pictures = iter([picture for _, picture in images])
    for batch in decoded_batches([given for given, _ in images], trained.recipe.data):
        for given, problem, image_SSC, picture in zip(
            batch.inputs, batch.problems, batch.images_NSSC, pictures, strict=False
        ):
            if problem is None:
                findings.used += 1
                yield _explained(trained, given, image_SSC, picture, label, device, top_k)
            else:
                findings.leave_out(given.name, BAD_IMAGE, problem)


def _explained(
    trained: TrainedModel,
    given: Input,
    image_SSC: Tensor,
    picture: Path,
    label: int | None,
    device: torch.device,
    top_k: int,
) -> Explained:
    data = trained.recipe.data
    images_1CSS = normalize(image_SSC[None].to(device), data)
    with torch.inference_mode():
        best = logits_of(trained.model, images_1CSS, data).float().softmax(dim=1)[0]
    values, labels = best.topk(min(top_k, len(trained.classes)))
    chosen = int(labels[0]) if label is None else label
    # An image at a time: the activations of a whole batch, which gradients need, would fill the memory.
    label_1 = torch.tensor([chosen], device=device)
    map_SS = (
        averaged_grad_cam(trained.model, images_1CSS, label_1, _seen(trained, images_1CSS))[0].cpu().numpy()
    )
    classes = tuple(trained.classes[number] for number in labels.tolist())
    found = Explained(
        given.name, picture, classes, tuple(values.tolist()), trained.classes[chosen], float(best[chosen])
    )
    png = draw_explained(image_SSC.numpy(), map_SS, found.shown, found.classes, found.probabilities)
    try:
        write_bytes_atomically(picture, png)
    except OSError as error:
        raise StorageError(f"{picture}: cannot be written: {error.strerror or error}") from None
    return found


def _seen(trained: TrainedModel, images_1CSS: Tensor) -> tuple[Variant, ...]:
    """Return the variants of the image whose logits its answer is the mean of."""
    data = trained.recipe.data
    if data.eval_confidence is not None:
        with torch.inference_mode():
            alone = trained.model(images_1CSS).float().softmax(dim=1)
        if float(alone.amax()) >= data.eval_confidence:
            return variants(flip=False, shift=0)
    return variants(flip=data.eval_flip, shift=data.eval_shift)

"""Test-time augmentation: the mean of a net's logits over an image, its mirror image, and shifted images.

A net whose training moved and mirrored images answers slightly differently for each variant of an image, and the mean
is more often right than any of them. The variants and weights are those of airbench94 (Jordan 2024, arXiv 2404.00498):

    the image        1/2     shifted down and right 1/4     shifted up and left 1/4

each half of it for its mirror image. Where the answer for the image alone is confident, it can be kept: further variants
then cost time for uncertain images only. Each image is decided by itself, so an answer does not depend on the others.

Shapes: N images, C channels, H height, W width, K classes; M uncertain images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Net = Callable[[Tensor], Tensor]  # images (N, C, H, W) → logits (N, K)

# Uncertain images go through the net in parts of this share of a batch, the last part filled up: compiled code then
# sees two batch sizes, not as many as there are numbers of uncertain images.
PARTS_OF_A_BATCH = 4


@dataclass(frozen=True)
class Variant:
    """A variant of an image: shifted down and right by `moved` pixels (negative: up and left), then mirrored."""

    weight: float
    moved: int = 0
    mirrored: bool = False

    def of(self, images_NCHW: Tensor) -> Tensor:
        """Return the variant of each image, in the same memory layout; it has the reflection beyond an edge."""
        images = moved(images_NCHW, self.moved) if self.moved else images_NCHW
        return images.flip(-1) if self.mirrored else images

    def undone(self, maps_NHW: Tensor) -> Tensor:
        """Return maps of the variant, such as of where a net looked, at the places of the image."""
        maps = maps_NHW.flip(-1) if self.mirrored else maps_NHW
        return moved(maps[:, None], -self.moved)[:, 0] if self.moved else maps


def moved(images_NCHW: Tensor, pixels: int) -> Tensor:
    """Return the images, shifted down and right over their reflection; negative: up and left."""
    height, width = images_NCHW.shape[2:]
    edge = abs(pixels)
    padded = F.pad(images_NCHW, (edge,) * 4, mode="reflect")
    first = edge - pixels
    part = padded[:, :, first : first + height, first : first + width]
    # Copy it into the layout of the images: compiled code would compile once more for another one.
    return torch.empty_like(images_NCHW).copy_(part)


def variants(*, flip: bool, shift: int) -> tuple[Variant, ...]:
    """Return the variants that are averaged, the image itself first; their weights add up to one.

    flip: with mirror images. shift: pixels; 0 for none.
    """
    places = ((1.0, 0),) if not shift else ((0.5, 0), (0.25, shift), (0.25, -shift))
    if not flip:
        return tuple(Variant(weight, place) for weight, place in places)
    return tuple(
        Variant(weight / 2, place, mirrored) for weight, place in places for mirrored in (False, True)
    )


def averaged_logits(
    net: Net, images_NCHW: Tensor, *, flip: bool, shift: int, confidence: float | None = None
) -> Tensor:
    """Return logits (N, K): the mean over `variants`, or for a confident image those of the image alone.

    confidence: probability of the most probable class from which the answer for the image alone is kept. None: the
    mean for all images. With a number, the host waits for the device, to learn how many images are uncertain; in a
    graph that is exported, all variants of all images are computed.
    """
    chosen = variants(flip=flip, shift=shift)
    # Copy the first logits: the next replay of a CUDA graph overwrites its outputs.
    first_NK = net(images_NCHW) if len(chosen) == 1 else net(images_NCHW).clone()
    if len(chosen) == 1:
        return first_NK
    if confidence is None:
        return _mean(net, images_NCHW, first_NK, chosen)
    is_unsure_N = first_NK.float().softmax(dim=1).amax(dim=1) < confidence
    if torch.compiler.is_exporting():
        mean_NK = _mean(net, images_NCHW, first_NK, chosen)
        return torch.where(is_unsure_N[:, None], mean_NK, first_NK.to(mean_NK.dtype))
    return _where_unsure(net, images_NCHW, first_NK, chosen, is_unsure_N.nonzero()[:, 0])


def _where_unsure(
    net: Net, images_NCHW: Tensor, first_NK: Tensor, chosen: tuple[Variant, ...], rows_M: Tensor
) -> Tensor:
    """Return the logits of the first variant, and in rows `rows_M` the mean over all variants."""
    answers_NK = first_NK.float()
    size = -(-len(images_NCHW) // PARTS_OF_A_BATCH)
    for first in range(0, len(rows_M), size):
        rows = rows_M[first : first + size]
        # The last part again and again, until it is full: a net in evaluation treats each image by itself.
        filled = rows.repeat(-(-size // len(rows)))[:size]
        part = torch.empty_like(images_NCHW[:size]).copy_(images_NCHW[filled])
        answers_NK[rows] = _mean(net, part, first_NK[filled], chosen)[: len(rows)]
    return answers_NK


def _mean(net: Net, images_NCHW: Tensor, first_NK: Tensor, chosen: tuple[Variant, ...]) -> Tensor:
    """Return the mean over the variants in fp32: half precision would round each sum. first_NK: logits of the first."""
    total_NK = chosen[0].weight * first_NK.float()
    for variant in chosen[1:]:
        total_NK = total_NK + variant.weight * net(variant.of(images_NCHW)).float()
    return total_NK

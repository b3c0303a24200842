"""The loss of every image of a micro-batch, mixed or not.

An image may be mixed with its neighbour (data/images/mix.py): its target is then `share` of its own label and
1 - share of the neighbour's. A sample that could not be decoded has weight 0, and so has its part of a mixed image.

Shapes: M images of a micro-batch, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_dist.config import Train
from resnet_dist.data.images.mix import Mixed

MIN_WEIGHT = torch.finfo(torch.float32).tiny  # avoids 0 / 0


def sample_losses(
    logits_MK: Tensor, labels_M: Tensor, weights_M: Tensor, share: Tensor | None, train: Train
) -> Tensor:
    """Return weighted losses (M,). `share` is a scalar tensor, or None where nothing is mixed."""
    if train.loss == "bce":
        return binary_cross_entropy(
            logits_MK,
            labels_M,
            weights_M,
            share,
            smoothing=train.label_smoothing,
            threshold=train.bce_target_threshold,
        )
    return cross_entropy(logits_MK, labels_M, weights_M, share, smoothing=train.label_smoothing)


def cross_entropy(
    logits_MK: Tensor, labels_M: Tensor, weights_M: Tensor, share: Tensor | None, *, smoothing: float
) -> Tensor:
    """Return the cross-entropy of both labels, weighted by their shares: it equals that of the mixed target."""

    def of(labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_MK, labels, reduction="none", label_smoothing=smoothing)

    losses = of(labels_M) * weights_M
    if share is None:
        return losses
    return share * losses + (1 - share) * (of(Mixed.partner(labels_M)) * Mixed.partner(weights_M))


def binary_cross_entropy(
    logits_MK: Tensor,
    labels_M: Tensor,
    weights_M: Tensor,
    share: Tensor | None,
    *,
    smoothing: float,
    threshold: float | None,
) -> Tensor:
    """Return the losses of one yes-or-no question per class (arXiv 2110.00476, section 4).

    They are means over classes, not sums, as in timm, which produced the paper's results: the clipping and the eps of
    its LAMB suit gradients of that size.
    """
    num_classes = logits_MK.shape[1]

    def target(labels: Tensor) -> Tensor:
        one_hot = F.one_hot(labels, num_classes).to(logits_MK.dtype)
        return one_hot * (1 - smoothing) + smoothing / num_classes

    targets, weights = target(labels_M), weights_M
    if share is not None:
        first, second = share * weights_M, (1 - share) * Mixed.partner(weights_M)
        weights = first + second
        # Only decoded samples make up the target; the clamp is for images whose two samples are both bad.
        part = (first / weights.clamp(min=MIN_WEIGHT))[:, None]
        targets = part * targets + (1 - part) * target(Mixed.partner(labels_M))
    if threshold is not None:
        targets = (targets > threshold).to(targets.dtype)
    losses = F.binary_cross_entropy_with_logits(logits_MK, targets, reduction="none").mean(dim=1)
    return losses * weights

"""Grad-CAM: where in an image the evidence for a class lies (Selvaraju et al. 2017, arXiv 1610.02391).

    image ── stages ── A (C channels of h x w) ── mean over h, w ── linear ── logits y

Each channel of the last stage has learnt a feature, and its activation A_c shows where in the image the feature is: the
net keeps places until it averages over them. Which features speak for class k is in the gradient of its logit:

    weight_c = mean over h, w of  dy_k / dA_c          (equation 1: how much feature c speaks for k)
    map      = ReLU(sum over c of weight_c · A_c)      (equation 2: where such features are; what speaks against k is cut)

For a net that ends in a mean and one linear layer, weight_c is that layer's own weight from c to k, divided by h · w: the
gradient is the same at all places. The map is as coarse as the last stage, such as 7 x 7 for an image of 224 pixels.

Shapes: N images, C channels, H, W height and width of an image, h, w of the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.model import Variant


def grad_cam(model: nn.Module, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    """Return the maps (N, H, W) of the evidence for a class of each image, from 0 to 1; all 0 where there is none.

    model: a net of this package, in evaluation mode: it has `stages`. images: normalized.
    """
    kept: list[Tensor] = []
    handle = last_of(model).register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        with torch.enable_grad():
            logits_NK = model(images_NCHW.detach().requires_grad_())
    finally:
        handle.remove()
    (activations_NChw,) = kept
    # The logits of an image depend on that image alone, so one gradient of their sum has those of all.
    chosen = logits_NK.gather(1, labels_N[:, None]).sum()
    (gradients_NChw,) = torch.autograd.grad(chosen, activations_NChw)
    weights_NC11 = gradients_NChw.mean(dim=(2, 3), keepdim=True)
    maps_N1hw = F.relu((weights_NC11 * activations_NChw.detach()).sum(dim=1, keepdim=True))
    maps_N1HW = F.interpolate(maps_N1hw, images_NCHW.shape[2:], mode="bilinear", align_corners=False)
    return _scaled(maps_N1HW[:, 0].detach())


def last_of(model: nn.Module) -> nn.Module:
    """Return what computes the output of the last stage: the stage, or its last block where a net calls the blocks."""
    stage: nn.Module = model.stages[-1]  # type: ignore[index, assignment, operator, union-attr]
    return stage[-1] if isinstance(stage, nn.Sequential) else stage


def averaged_grad_cam(
    model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, seen: Sequence[Variant]
) -> Tensor:
    """Return the maps for a net that sees several variants of each image, and averages their logits."""
    all_images = torch.cat([variant.of(images_NCHW) for variant in seen])
    maps = grad_cam(model, all_images, labels_N.repeat(len(seen))).chunk(len(seen))
    total_NHW = torch.zeros_like(maps[0])
    for variant, map_NHW in zip(seen, maps, strict=True):
        total_NHW = total_NHW + variant.weight * variant.undone(map_NHW)
    return _scaled(total_NHW)


def _scaled(maps_NHW: Tensor) -> Tensor:
    """Return maps whose largest value is 1."""
    return maps_NHW / maps_NHW.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps_NHW.dtype).tiny)

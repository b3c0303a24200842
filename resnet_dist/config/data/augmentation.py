"""Augmentation: random changes of training images, one by one and mixed with one another."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from resnet_dist.config.part import Part, refuse_unread

Crop = Literal["none", "pad-crop", "random-resized-crop"]

# Fields that only some choices read. A value that nothing reads is a mistake, not a preference.
_CROPS_THAT_READ = {"pad": ("pad-crop",), "pad_fill": ("pad-crop",), "resize": ("random-resized-crop",)}
_RAND, _TRIVIAL = ("rand-augment",), ("trivial-augment",)
_POLICIES_THAT_READ = {
    "policy_ops": _RAND,
    "policy_magnitude": _RAND,
    "policy_space": _RAND,
    "policy_probability": _RAND,
    "policy_noise": _RAND,
    "policy_translation": _TRIVIAL,
    "policy_backend": _RAND + _TRIVIAL,
}
_BACKENDS_THAT_READ = {
    "policy_space": ("pillow",),
    "policy_interpolation": ("pillow",),
    "policy_fill": ("pillow",),
}


class Augmentation(Part):
    """Random changes of training images."""

    crop: Crop = "none"
    """none: the middle of the image, as in evaluation. pad-crop: the middle, shifted by up to `pad` pixels
    over black. random-resized-crop: 8 to 100 % of the area (arXiv 1409.4842)."""
    pad: int = Field(default=4, ge=0)
    """Largest shift of pad-crop, in pixels."""
    pad_fill: Literal["black", "reflect"] = "black"
    """Pixels around the image in pad-crop. reflect: the mirror image at each edge, as CIFAR speed recipes have."""
    resize: Literal["bilinear", "bicubic", "random"] = "bilinear"
    """Interpolation of random-resized-crop, always antialiased. random: bilinear or bicubic for each image, as
    in timm."""
    flip: Literal[False, True, "alternate"] = False
    """True: mirror a random half of the images. alternate: mirror each image every second time that it is
    drawn, the first time at random (arXiv 2404.00498)."""
    policy: Literal["none", "rand-augment", "trivial-augment"] = "none"
    """rand-augment: RandAugment (arXiv 1909.13719) with `policy_ops` and `policy_magnitude`. trivial-augment:
    TrivialAugment (arXiv 2103.10158)."""
    policy_ops: int = Field(default=2, ge=1, le=8)
    """Operations that RandAugment applies to each image."""
    policy_magnitude: int = Field(default=9, ge=0, le=30)
    """Strength of RandAugment's operations, on its scale of 0 to 30. timm's scale goes to 10: its 6 is 18."""
    policy_space: Literal["torchvision", "timm"] = "torchvision"
    """RandAugment's operations and their largest strengths. torchvision: 14, of which one is the identity.
    timm: the 15 of its "increasing" set, with invert and solarize-add."""
    policy_probability: float = Field(default=1.0, gt=0, le=1)
    """Probability with which RandAugment applies each chosen operation; 0.5 in timm."""
    policy_noise: float = Field(default=0.0, ge=0, le=30)
    """Standard deviation of the strength of each operation of RandAugment around `policy_magnitude`, on the
    same scale: timm's `mstd0.5` is 1.5."""
    policy_translation: Literal["share", "pixels"] = "share"
    """TrivialAugment's largest translation. share: 32/224 of the image. pixels: 32 pixels at any image size, as
    in torchvision."""
    policy_backend: Literal["tensor", "pillow"] = "tensor"
    """Library of the policy's operations. pillow: Pillow, as torchvision's and timm's training used. tensor:
    torchvision's operations on tensors, whose results differ by rounding."""
    policy_interpolation: Literal["nearest", "bilinear", "random"] = "nearest"
    """Interpolation where the policy shears, moves or rotates; all but nearest need pillow. random: bilinear or
    bicubic for each operation, as in timm."""
    policy_fill: Literal["black", "mean"] = "black"
    """Color of what the policy moves into view. mean: the color `mean`, which needs pillow."""
    color_jitter: float = Field(default=0.0, ge=0, le=1)
    """Range x of random changes: brightness, contrast and saturation are scaled by factors in 1 - x .. 1 + x."""
    erase: float = Field(default=0.0, ge=0, le=1)
    """Probability that a rectangle is filled with the mean color (arXiv 1708.04896)."""
    mixup: float = Field(default=0.0, ge=0)
    """alpha of mixup (arXiv 1710.09412), 0 for none. With `cutmix` too, each micro-batch gets one of them."""
    cutmix: float = Field(default=0.0, ge=0)
    """alpha of CutMix (arXiv 1905.04899), 0 for none."""

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        refuse_unread(self, "crop", _CROPS_THAT_READ)
        refuse_unread(self, "policy", _POLICIES_THAT_READ)
        refuse_unread(self, "policy_backend", _BACKENDS_THAT_READ)
        return self
